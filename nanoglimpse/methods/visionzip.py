"""VisionZip (arXiv 2412.04467): dominant tokens stay, the others are merged into a few contextual.

After the Qwen2.5-VL port that comparisons use (qwen2_5vl_visionzip.py): scores are the attention
that a token receives in the last vision block, keys of that block say who is alike, and a
contextual token is its own embedding plus the mean of those that join it, behind the merger. Unlike
there, attention stays inside an image, and the quota is per image, 54 dominant to 10 contextual as
in the original.
"""

import torch
from torch import Tensor

from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.similarity import best, nearest, rest
from nanoglimpse.model.model import Model

CONTEXTUAL = 10 / 64


class VisionZip(PruningMethod):
    """Dominant and contextual tokens, before the decoder."""

    name = "visionzip"
    about = "VisionZip, arXiv 2412.04467: before the decoder, most attended tokens, others merged"

    def needs(self, model: Model) -> Needs:
        """Attention and keys of the last block of the vision encoder."""
        return Needs(vision_blocks=(len(model.vision.blocks) - 1,))

    def choose(self, context: PruningContext) -> Decision:
        """Image by image."""
        (block,) = context.block_stats.blocks
        values = context.visual.clone()

        def pick(own: slice, count: int) -> Tensor:
            score, keys = (
                context.block_stats.received[block][own],
                context.block_stats.keys[block][own],
            )
            extra = min(max(round(CONTEXTUAL * count), 1), count)
            dominant = best(score, count - extra)
            others = rest(len(score), dominant)
            targets = others[:: max(len(others) // max(extra, 1), 1)][:extra]
            merge(values[own], keys, targets, rest(len(score), torch.cat((dominant, targets))))
            return torch.cat((dominant, targets))

        kept = context.per_image(pick)
        return Decision(kept, values=values[kept])


def merge(values: Tensor, keys: Tensor, targets: Tensor, others: Tensor) -> None:
    """Adds to each target [in place] the mean of the others that are most like it."""
    if not len(others) or not len(targets):
        return
    _, joins = nearest(keys[others], keys[targets])
    sums = torch.zeros(len(targets), values.shape[1], device=values.device)
    sums.index_add_(0, joins, values[others].float())
    counts = torch.bincount(joins, minlength=len(targets)).clamp_min(1)
    values[targets] += (sums / counts[:, None]).to(values.dtype)
