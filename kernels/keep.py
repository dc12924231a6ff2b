"""The one gather of pruning: surviving K/V rows of all layers, out of place."""

import torch
from torch import Tensor


def keep_rows(source: Tensor, rows: Tensor, target: Tensor, target_rows: slice | Tensor) -> None:
    """Writes `source[:, rows]` to `target[:, target_rows]`.

    Args:
        source: [L, R, H, D], keys or values of all layers.
        rows: int64 [S], the surviving rows.
        target: [L, R', H, D], another allocation.
        target_rows: where they go, S rows.
    """
    if isinstance(target_rows, slice):
        torch.index_select(source, 1, rows, out=target[:, target_rows])
    else:
        target.index_copy_(1, target_rows, source.index_select(1, rows))
