"""ToMe, merged-token variant (after arXiv 2210.09461): not the original, which cannot run here.

The original merges patches inside every vision block; Qwen2.5-VL's windows, merge units and 2-D
rotary embedding forbid that. This variant runs its bipartite soft matching on visual tokens before
the decoder, in rounds until the budget is met: even tokens find the odd token with the most similar
key of the last vision block, and the best pairs merge, weighted by how much each has merged
already. A merged token stands where the odd one stood.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Choice, Look, Method
from .similarity import best, nearest

if TYPE_CHECKING:
    from ..engine import Engine


class ToMe(Method):
    """Merging of like tokens, before the decoder."""

    name = "tome"
    about = "ToMe on merged tokens, after arXiv 2210.09461: before the decoder, like tokens merge"

    def stops(self, engine: "Engine") -> Sequence[int]:
        """Before the decoder."""
        return (0,)

    def watches(self, engine: "Engine") -> Sequence[int]:
        """The last block."""
        return (len(engine.vision.blocks) - 1,)

    def choose(self, look: Look) -> Choice:
        """Image by image."""
        (block,) = look.watch.blocks
        values = look.visual.clone()

        def pick(own: slice, count: int) -> Tensor:
            return match(values[own], look.watch.keys[block][own].clone(), count)

        kept = look.per_image(pick)
        return Choice(kept, values=values[kept])


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
