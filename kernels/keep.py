"""The one gather of pruning: surviving rows of K and V of all layers, and of the hidden state."""

import torch
from torch import Tensor


def keep_rows(
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    rows: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    target_rows: slice | Tensor,
) -> Tensor:
    """Writes `k[:, rows]` to `new_k[:, target_rows]`, the same of v, and returns `hidden[rows]`.

    Args:
        k, v: [L, R, H, D], all layers.
        hidden: [R, C], numbered as the rows of k and v; [R, 0] if there is none to keep.
        rows: int64 [S], the surviving rows.
        new_k, new_v: [L, R', H, D], another allocation.
        target_rows: where they go, S rows.

    Returns:
        [S, C]
    """
    for source, target in ((k, new_k), (v, new_v)):
        if isinstance(target_rows, slice):
            torch.index_select(source, 1, rows, out=target[:, target_rows])
        else:
            target.index_copy_(1, target_rows, source.index_select(1, rows))
    return hidden.index_select(0, rows)
