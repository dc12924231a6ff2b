"""Bootstrap intervals of means and of ratios of sums (percentile method, seeded)."""

import torch
from torch import Tensor

DRAWS, LEVEL, CHUNK = 1000, 0.95, 100


def resampled(sums: Tensor, weights: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """Ratios of column sums over resampled rows.

    Every draw takes as many rows as there are, with replacement, the same for all columns and, at
    one seed and number of rows, for all calls: what is compared is resampled alike.

    Args:
        sums, weights: fp64 [n, columns]; a column's figure is the sum of one over that of the
            other, a mean where all weights are 1; a weight of 0 leaves a row out.
        draws: how many.
        seed: of the draws.

    Returns:
        fp64 [draws, columns]; NaN where a draw has no weight.
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
    """[2, columns], lower and upper end of the middle `level` of resampled figures [draws, …]."""
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=figures.dtype)
    return figures.nanquantile(tails, dim=0)
