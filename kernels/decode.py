"""Attention of one query row a sequence against the contiguous cache: decoding, and last rows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Sequence[int] | Tensor,
    lengths: Sequence[int] | Tensor,
) -> Tensor:
    """Softmax attention of one row a sequence to all its rows in the cache, scaled by 1/√D.

    Args:
        q: [B, HQ, D], one row a sequence.
        k, v: [1, H, R, D], one layer of the cache as a view with heads before rows; query head h
            reads kv head h // (HQ / H).
        starts: first cache row of each sequence.
        lengths: number of cache rows of each sequence, at least 1. Both may be integers [B] on the
            device, int32 for a kernel; nothing then waits for them but the reference.

    Returns:
        [B, HQ · D], heads side by side.
    """
    if isinstance(lengths, Tensor):
        starts, lengths = starts.tolist(), lengths.tolist()
    if len(starts) == 1:
        return _one(q, k, v, starts[0], lengths[0])
    rows = zip(q.split(1), starts, lengths, strict=True)
    return torch.cat([_one(row, k, v, start, length) for row, start, length in rows])


def _one(q: Tensor, k: Tensor, v: Tensor, start: int, length: int) -> Tensor:
    # The query heads that share a kv head become query rows, so that its keys are read once.
    grouped = q.view(1, k.shape[1], -1, q.shape[-1])  # [1, H, G, D]
    k, v = k.narrow(2, start, length), v.narrow(2, start, length)
    return F.scaled_dot_product_attention(grouped, k, v).view(1, -1)
