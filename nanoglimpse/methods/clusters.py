"""Clusters by density peaks, in tiles: the square matrix of all pairs never exists."""

import torch
from torch import Tensor

from .similarity import TILE, best


def density_peaks(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """DPC-KNN: centres int64 [clusters] of rows x [M, C], and the cluster of each row, int64 [M].

    As in the code: density from the `clusters` nearest, itself among them; for the densest row the
    distance to a denser one is the largest of all. Of equally dense rows the first counts as
    denser, where the code adds noise: mutual neighbours are always equal.
    """
    order, scale, near = torch.arange(len(x), device=x.device), x.shape[1] ** 0.5, []
    # In tiles, twice: the square matrix of all pairs never exists.
    for tile in x.split(TILE):
        distance = torch.cdist(tile, x) / scale
        near.append(distance.topk(min(clusters, len(x)), largest=False).values)
    density = (-torch.cat(near).square().mean(1)).exp()
    apart, widest = [], []
    for own in order.split(TILE):
        distance = torch.cdist(x[own], x) / scale
        equal = (density[None] == density[own, None]) & (order[None] < own[:, None])
        denser = (density[None] > density[own, None]) | equal
        apart.append(distance.masked_fill(~denser, torch.inf).amin(1))
        widest.append(distance.amax())
    apart = torch.cat(apart)
    apart = torch.where(apart.isinf(), torch.stack(widest).amax(), apart)
    centres = best(density * apart, clusters)
    member = torch.cdist(x, x[centres]).argmin(1)
    member[centres] = torch.arange(len(centres), device=x.device)
    return centres, member
