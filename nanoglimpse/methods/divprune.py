"""DivPrune (arXiv 2503.02175): the subset whose nearest members are farthest apart.

As in the public code (llava_arch.py) the first token is the one farthest from its nearest
neighbour, and each next one the farthest from all chosen. There the minimum over all chosen is
taken anew in each step; here it is carried along, with the same result. Exact duplicates, which
have distance 0 to a chosen token as the chosen tokens themselves, are told apart from those. The
quota is per image (`PruningContext.per_image`), and no matrix of all pairs is made.
"""

import torch
from torch import Tensor

from nanoglimpse.methods.base import Decision, PruningContext, PruningMethod
from nanoglimpse.methods.similarity import nearest, unit


class DivPrune(PruningMethod):
    """Max-min diversity of the visual tokens, before the decoder."""

    name = "divprune"
    about = "DivPrune, arXiv 2503.02175: before the decoder, tokens as different as possible"

    def choose(self, context: PruningContext) -> Decision:
        """Farthest first, image by image."""
        return Decision(context.per_image(lambda own, count: diverse(context.visual[own], count)))


def diverse(x: Tensor, count: int) -> Tensor:
    """int64 [count], rows of x [N, D] in the order they are chosen."""
    rows = unit(x)
    if count == 0 or len(x) == 1:
        return torch.arange(count, device=x.device)
    alone, _ = nearest(x, x, same=True)
    chosen = [alone.argmin()]
    distance = 1 - rows @ rows[chosen[0]]
    distance[chosen[0]] = -torch.inf
    while len(chosen) < count:
        pick = distance.argmax()
        chosen.append(pick)
        distance = torch.minimum(distance, 1 - rows @ rows[pick])
        distance[pick] = -torch.inf
    return torch.stack(chosen)
