"""VScan (arXiv 2505.22654): two stages, before the decoder and in its middle.

After the public code for Qwen2.5-VL (qwen2_5_vl_custom.py). First half the tokens are the most
attended of their 4 × 4 window in the first block that attends to the whole image, the other half
the most attended of the last one, and each token that goes joins the most similar one that stays,
which becomes their mean. Then the next layer's projections, without rotary embedding, say what the
last prompt token attends to. Shares are those of the code, a third of the first stage's in the
second, scaled to the cap. Unlike there, attention is that of the block as it runs, grids of less
than four rows work, windows that cannot fill their quota leave it to the best of the others, and
each image has its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglimpse.inputs.prompt import last_rows
from nanoglimpse.kernels.varlen import Segments, upload
from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.similarity import best, nearest, rest
from nanoglimpse.model.model import Model

WINDOW, SECOND_SHARE = 4, 1 / 3


class VScan(PruningMethod):
    """Local and global tokens, then what the text looks at."""

    name = "vscan"
    about = "VScan, arXiv 2505.22654: local and global tokens, others merged; then half way again"

    def layers(self, model: Model) -> Sequence[int]:
        """Before the decoder, and after half its layers."""
        return (0, -(-model.depth // 2))

    def needs(self, model: Model) -> Needs:
        """The first and the last block that attend to the whole image; hidden rows half way."""
        blocks = sorted(model.config.vision_config.fullatt_block_indexes)
        return Needs(vision_blocks=(blocks[0], blocks[-1]), hidden=True)

    def stage_ratio(self, model: Model, ratio: float, kv_drop: str) -> float:
        """What the second stage leaves of all tokens."""
        if kv_drop == "all":
            return ratio
        depth, half = model.depth, self.layers(model)[1]
        first = ratio * depth / (half + (depth - half) * SECOND_SHARE)
        if first <= 1:
            return first * SECOND_SHARE
        return max((ratio * depth - half) / (depth - half), 0.0)

    def choose(self, context: PruningContext) -> Decision:
        """The stage's choice."""
        final = context.max_ratio
        first = min(final / SECOND_SHARE, 1.0)
        if context.stage:
            again = context.with_ratio(final / first)
            return Decision(again.select(again.mean_softmax(self._ranking(context)), threshold=0.0))
        return self._scan(context.with_ratio(first))

    def _ranking(self, context: PruningContext) -> Tensor:
        """Logits [T, HQ] of each prompt's last row in the next layer, unrotated."""
        block, batch = context.model.decoder.layers[self.layers(context.model)[1]], context.batch
        last = last_rows(batch.counts, context.hidden.device)
        normed = block.input_layernorm(context.hidden)
        q = block.project_heads(normed[last], 0, block.heads)
        k = block.project_heads(normed, block.heads, block.heads + block.kv_heads)
        return context.model.ops.row_logits(q, k, Segments(batch.counts, normed.device))

    def _scan(self, context: PruningContext) -> Decision:
        local, whole = (context.block_stats.received[block] for block in context.block_stats.blocks)
        values = context.visual.clone()
        sizes = {own.start: size for own, size in context.images()}

        def pick(own: slice, count: int) -> Tensor:
            near = of_windows(local[own], *sizes[own.start], count // 2)
            score = whole[own].clone()
            score[near] = -torch.inf
            chosen = torch.cat((near, best(score, count - len(near))))
            average(values[own], chosen)
            return chosen

        kept = context.per_image(pick)
        return Decision(kept, values=values[kept])


def of_windows(score: Tensor, height: int, width: int, count: int) -> Tensor:
    """int64 [count], the best of each window of a grid; what is left of windows joins the last."""
    down, across = max(height // WINDOW, 1), max(width // WINDOW, 1)
    rows = (torch.arange(height) // WINDOW).clamp_max(down - 1)
    columns = (torch.arange(width) // WINDOW).clamp_max(across - 1)
    window = (rows[:, None] * across + columns).flatten().tolist()
    limit, taken = -(-count // (down * across)), [0] * (down * across)
    order = best(score, len(score)).tolist()
    chosen: list[int] = []
    for token in order:
        if len(chosen) < count and taken[window[token]] < limit:
            taken[window[token]] += 1
            chosen.append(token)
    spare = set(order) - set(chosen)
    chosen += [token for token in order if token in spare][: count - len(chosen)]
    return upload(torch.tensor(chosen, dtype=torch.int64), score.device)


def average(values: Tensor, chosen: Tensor) -> None:
    """Makes each chosen token [in place] the mean of itself and of those most like it."""
    others = rest(len(values), chosen)
    if not len(others) or not len(chosen):
        return
    _, joins = nearest(values[others], values[chosen])
    sums = values[chosen].float().index_add_(0, joins, values[others].float())
    counts = 1 + torch.bincount(joins, minlength=len(chosen))
    values[chosen] = (sums / counts[:, None]).to(values.dtype)
