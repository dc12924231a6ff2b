"""ToMe, merged-token variant (after arXiv 2210.09461): not the original, which cannot run here.

The original merges patches inside every vision block; Qwen2.5-VL's windows, merge units and 2-D
rotary embedding forbid that. This variant runs its bipartite soft matching on visual tokens before
the decoder, in rounds until the budget is met: even tokens find the odd token with the most similar
key of the last vision block, and the best pairs merge, weighted by how much each has merged
already. A merged token stands where the odd one stood.
"""

import torch
from torch import Tensor

from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.similarity import best, nearest
from nanoglimpse.model.model import Model


class ToMe(PruningMethod):
    """Merging of like tokens, before the decoder."""

    name = "tome"
    about = "ToMe on merged tokens, after arXiv 2210.09461: before the decoder, like tokens merge"

    def needs(self, model: Model) -> Needs:
        """Attention and keys of the last block of the vision encoder."""
        return Needs(vision_blocks=(len(model.vision.blocks) - 1,))

    def choose(self, context: PruningContext) -> Decision:
        """Image by image."""
        (block,) = context.block_stats.blocks
        values = context.visual.clone()

        def pick(own: slice, count: int) -> Tensor:
            return match(values[own], context.block_stats.keys[block][own].clone(), count)

        kept = context.per_image(pick)
        return Decision(kept, values=values[kept])


def match(values: Tensor, keys: Tensor, count: int) -> Tensor:
    """Merges rows of values and keys [in place] until `count` are left; returns which, int64."""
    left = torch.arange(len(values), device=values.device)
    size = torch.ones(len(values), device=values.device)
    while len(left) > max(count, 1):
        even, odd = left[::2], left[1::2]
        alike, partner = nearest(keys[even], keys[odd])
        gone = best(alike, min(len(even), len(left) - max(count, 1)))
        source, target = even[gone], odd[partner[gone]]
        for x in (values, keys):
            total = x.float() * size[:, None]
            total.index_add_(0, target, total[source])
            weight = size.index_add(0, target, size[source])
            x[target] = (total[target] / weight[target, None]).to(x.dtype)
        size.index_add_(0, target, size[source])
        left = left[~torch.isin(left, source)]
    return left[:count]
