"""Nearest neighbours by cosine, in tiles: the square matrix of all pairs never exists."""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1024


def unit(x: Tensor) -> Tensor:
    """Rows of length one, fp32."""
    return F.normalize(x.float(), dim=-1)


def nearest(x: Tensor, y: Tensor, *, same: bool = False) -> tuple[Tensor, Tensor]:
    """Cosine and index of the nearest row of y for each row of x.

    Args:
        x: [A, D].
        y: [B, D], B at least 1.
        same: x is y, and a row is not its own neighbour.

    Returns:
        fp32 [A] and int64 [A].
    """
    best, where, other = [], [], unit(y)
    for start in range(0, len(x), TILE):
        tile = unit(x[start : start + TILE]) @ other.T
        if same:
            tile.diagonal(start).fill_(-2.0)
        value, index = tile.max(1)
        best.append(value)
        where.append(index)
    return torch.cat(best), torch.cat(where)


def best(scores: Tensor, count: int) -> Tensor:
    """int64 [count], indices of the largest scores in descending order; of equals the first."""
    return scores.argsort(descending=True, stable=True)[:count]


def rest(count: int, taken: Tensor) -> Tensor:
    """int64, what is left of `count` indices, ascending."""
    left = torch.ones(count, dtype=torch.bool, device=taken.device)
    left[taken] = False
    return left.nonzero().flatten()
