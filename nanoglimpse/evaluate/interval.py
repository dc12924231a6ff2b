"""Bootstrap intervals of means and of ratios of sums (percentile method, seeded)."""

import torch
from torch import Tensor

DRAWS, LEVEL, CHUNK = 1000, 0.95, 100


def resampled(sums: Tensor, weights: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Ratios of column sums over resampled rows.

    Every draw takes n rows with replacement. All columns share the rows of a draw, and so do all
    calls with the same seed and n, so that variants are compared on the same resamples.

    Args:
        sums, weights: fp64 [n, columns]; the figure of a column is the sum of `sums` over the sum
            of `weights`: a mean if all weights are 1. A row of weight 0 does not count.
        draws: the number of draws.
        seed: the seed of the draws.

    Returns:
        fp64 [draws, columns]; NaN where the weights of a draw sum to 0.
    """
    generator, n, parts = torch.Generator().manual_seed(seed), len(sums), []
    for first in range(0, draws, CHUNK):
        count = min(CHUNK, draws - first)
        picks = torch.randint(n, (count, n), generator=generator)
        times = torch.zeros(count, n, dtype=torch.float64)
        times.scatter_add_(1, picks, torch.ones(1, dtype=torch.float64).expand(count, n))
        parts.append((times @ sums) / (times @ weights))
    return torch.cat(parts)


def bounds(figures: Tensor, level: float = LEVEL) -> Tensor:
    """Ends [2, columns] of the interval with a share `level` of the figures [draws, columns]."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=figures.dtype)
    return figures.nanquantile(tails, dim=0)
