"""EVS, efficient video sampling, after its public code in vLLM (multimodal/evs.py).

How much a visual token has changed is 1 − cosine to the token at the same place of the pair of
frames before; all of a clip's first pair count as changed. Those that changed most stay, over the
whole clip, as many as the cap allows and at least as many as one pair has; of equals the first.
Positions stay. There images are left alone; here neighbouring pictures of one size are taken for
the frames of a clip, so that a picture alone is kept whole.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from nanoglimpse.methods.base import Decision, PruningContext, PruningMethod
from nanoglimpse.methods.similarity import best, unit

FIRST = 255.0  # above every distance


class EVS(PruningMethod):
    """What differs from the frames before, before the decoder."""

    name = "evs"
    about = "EVS, of vLLM: before the decoder, what has changed since the frames before"
    for_videos = True

    def choose(self, context: PruningContext) -> Decision:
        """Clip by clip."""
        kept, rule = ~context.prunable, context.rule
        for own, frames in clips(context):
            count = own.stop - own.start
            least = max(count // frames, min(rule.min_tokens or 0, count))
            allowed = max(int(context.max_ratio * count), least)
            kept[own.start + best(changes(context.visual[own], frames), allowed)] = True
        return Decision(kept)


def clips(context: PruningContext) -> Iterator[tuple[slice, int]]:
    """The visual tokens of each clip, and of how many images or pairs of frames it is."""

    def clip(numbered: tuple[int, tuple[slice, tuple[int, int]]]) -> tuple:
        number, (own, size) = numbered
        # Neighbours of one size and pool have the same distance from where the first would stand.
        start = own.start - number * (own.stop - own.start)
        return int(context.pools[own.start]), size, start

    for _, group in groupby(enumerate(context.images()), clip):
        own = [own for _, (own, _) in group]
        yield slice(own[0].start, own[-1].stop), len(own)


def changes(x: Tensor, frames: int) -> Tensor:
    """fp32 [N], 1 − cosine of rows of x [N, C] to those as many places before as a frame has."""
    rows = unit(x).unflatten(0, (frames, -1))
    changed = torch.full(rows.shape[:2], FIRST, device=x.device)
    changed[1:] = 1 - (rows[1:] * rows[:-1]).sum(-1)
    return changed.flatten()
