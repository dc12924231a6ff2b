"""Nearest neighbours and clusters, in tiles: the square matrix of all pairs never exists."""

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


def density_peaks(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """DPC-KNN: centres int64 [clusters] of rows x [M, C], and the cluster of each row, int64 [M].

    As in the code: density from the `clusters` nearest, itself among them; for the densest row the
    distance to a denser one is the largest of all. Of equally dense rows the first counts as
    denser, where the code adds noise: mutual neighbours are always equal.
    """
    order, scale, near = torch.arange(len(x), device=x.device), x.shape[1] ** 0.5, []
    for tile in x.split(TILE):
        distance = torch.cdist(tile, x) / scale
        near.append(distance.topk(min(clusters, len(x)), largest=False).values)
    density = (-torch.cat(near).square().mean(1)).exp()
    spaces, widest = [], []
    for own in order.split(TILE):
        distance = torch.cdist(x[own], x) / scale
        equal = (density[None] == density[own, None]) & (order[None] < own[:, None])
        denser = (density[None] > density[own, None]) | equal
        spaces.append(distance.masked_fill(~denser, torch.inf).amin(1))
        widest.append(distance.amax())
    apart = torch.cat(spaces)
    apart = torch.where(apart.isinf(), torch.stack(widest).amax(), apart)
    centres = best(density * apart, clusters)
    member = torch.cdist(x, x[centres]).argmin(1)
    member[centres] = torch.arange(len(centres), device=x.device)
    return centres, member
