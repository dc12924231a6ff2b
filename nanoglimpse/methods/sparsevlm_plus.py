"""SparseVLM+, version 2.0 of the code of SparseVLM (arXiv 2410.04417): corrected attention.

It clusters nothing and keeps positions. Attention is divided by what rotary embedding alone makes
of two rows, the product of all-ones vectors at their positions, and of the heads only those count
that attend to the picture most, 14 of the 28 of Qwen2.5-VL-7B, here half. The product may pass zero
at a distance; as in the code, tokens where it is negative come last. The list of counts is 300,
200, 118; all else is as in version 1.5.
"""

from torch import Tensor

from ..kernels.ops import Rope
from .similarity import best
from .sparsevlm import SparseVLM


class SparseVLMPlus(SparseVLM):
    """Three stages rated by the question, without the pull of positions."""

    name = "sparsevlm+"
    about = "SparseVLM 2.0: the same, attention without the pull of positions, rest dropped"
    levels = (300 / 118, 200 / 118, 1.0)

    def weighed(self, attention: Tensor, rope: Rope, rater: Tensor, rows: Tensor) -> Tensor:
        """Attention without the distance."""
        return attention / pull(rope, rater, rows)[:, None]

    def stay(self, values: Tensor, mine: Tensor, score: Tensor, allowed: int) -> Tensor:
        """The best."""
        return mine[best(leading(score), allowed)]


def pull(rope: Rope, row: Tensor, rows: Tensor) -> Tensor:
    """fp32 [N], what rotation leaves of the product of one row and others, all ones; at most 1."""
    near = rope.cos[rows, 0] @ rope.cos[row, 0] + rope.sin[rows, 0] @ rope.sin[row, 0]
    return near / rope.cos.shape[-1]


def leading(score: Tensor) -> Tensor:
    """fp32 [N], the mean of scores [N, HQ] over the half of the heads with the largest sums."""
    heads = best(score.sum(0), max(score.shape[1] // 2, 1))
    return score[:, heads].mean(1)
