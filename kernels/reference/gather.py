"""The gather of pruning: surviving keys, values and hidden states of all layers at once.

Pruning inside a layer also needs attention of the survivors. Both only read what the layers so far
have written, so one launch does both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanoglimpse.kernels.reference.attention import Queries, attention
from nanoglimpse.kernels.varlen import Segments


class SurvivorAttention(NamedTuple):
    """Causal attention of the surviving rows; arguments of `attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    segments: Segments
    queries: Queries


def gather(
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    rows: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    target_rows: slice | Tensor,
    attends: SurvivorAttention | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Writes `k[:, rows]` to `new_k[:, target_rows]`, the same of v, and returns `hidden[rows]`.

    Args:
        k, v: [L, R, H, D], the cache rows of all layers.
        hidden: [R, C], in the same row order; [R, 0] if no hidden state is needed.
        rows: int64 [S], the surviving rows.
        new_k, new_v: [L, R', H, D], must not overlap k and v.
        target_rows: S rows of new_k and new_v, int64 [S] or a slice.
        attends: attention to compute beside it; or None.

    Returns:
        [S, C], and what `attention` returns; None without `attends`.
    """
    attended = attends and attention(*attends[:4], causal=True, queries=attends.queries)
    for source, target in ((k, new_k), (v, new_v)):
        if isinstance(target_rows, slice):
            torch.index_select(source, 1, rows, out=target[:, target_rows])
        else:
            target.index_copy_(1, target_rows, source.index_select(1, rows))
    return hidden.index_select(0, rows), attended
