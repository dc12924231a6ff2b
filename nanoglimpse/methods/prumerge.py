"""LLaVA-PruMerge (arXiv 2403.15388): as many tokens as stand out, each with what is like it.

After the public code (clip_encoder.py), with the attention received in the last vision block in
place of the [CLS] row that Qwen2.5-VL does not have, scaled to add up to one. Without a cap the
number of tokens is adaptive: outliers by the interquartile range; "+" adds evenly spaced ones. A
kept token gains the 32 tokens whose keys are most like its own, weighted by their attention and not
normalised. Unlike there, tokens stay in raster order at their own positions, the extra token is
left out, and no outliers at all keeps one token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanoglimpse.kernels.varlen import upload
from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.similarity import best, unit
from nanoglimpse.model.model import Model

NEIGHBOURS = 32


@dataclass(frozen=True)
class PruMerge(PruningMethod):
    """Outliers of attention, before the decoder."""

    name: str
    about: str
    spaced: bool
    budget: Literal["cap", "adaptive", "fixed"] = "adaptive"

    def needs(self, model: Model) -> Needs:
        """Attention and keys of the last block of the vision encoder."""
        return Needs(vision_blocks=(len(model.vision.blocks) - 1,))

    def choose(self, context: PruningContext) -> Decision:
        """Image by image."""
        (block,) = context.block_stats.blocks
        values = context.visual.clone()

        def pick(own: slice, count: int) -> Tensor:
            score = context.block_stats.received[block][own]
            attention = score / score.sum()
            chosen = self.standing_out(attention)[:count]
            gain(values[own], context.block_stats.keys[block][own], attention, chosen)
            return chosen

        kept = context.per_image(pick)
        return Decision(kept, values=values[kept])

    def standing_out(self, attention: Tensor) -> Tensor:
        """int64, indices of the tokens that stay without a cap, the most important first."""
        total = len(attention)
        quarters = torch.quantile(attention, upload(torch.tensor([0.25, 0.75]), attention.device))
        count = int((attention > quarters[1] + 1.5 * (quarters[1] - quarters[0])).sum())
        chosen = best(attention, max(count, 1))
        if self.spaced:
            step = max(int(int(total / len(chosen)) / 3), 1)
            spaced = torch.arange(0, total, step, device=attention.device)
            chosen = torch.cat((chosen, spaced[~torch.isin(spaced, chosen)]))
        return chosen


def gain(values: Tensor, keys: Tensor, attention: Tensor, chosen: Tensor) -> None:
    """Adds to each chosen token [in place] its nearest others, weighted by their attention."""
    count = min(NEIGHBOURS, len(keys) - 1)
    if not count:
        return
    rows, before = unit(keys), values.clone()
    for index in chosen.tolist():
        likeness = rows @ rows[index]
        likeness[index] = -2.0
        near = best(likeness, count)
        weighted = attention[near, None] * before[near].float()
        values[index] += weighted.sum(0).to(values.dtype)
