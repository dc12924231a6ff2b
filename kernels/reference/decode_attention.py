"""Attention of one query row per sequence to the KV cache: decode, and the last prefill layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglimpse.kernels.reference.attention import sdpa


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor
) -> Tensor:
    """Softmax attention of one row per sequence to all its rows in the cache, scaled by 1/√D.

    `starts` and `lengths` are either both sequences or both tensors [B] on the device, int32 for
    the kernel. Given tensors, the kernel does not make the host wait; the reference does.

    Args:
        q: [B, HQ, D].
        k, v: [1, H, R, D], one layer of the cache as a view with heads before rows; query head h
            reads kv head h // (HQ / H).
        starts: first cache row of each sequence.
        lengths: number of cache rows of each sequence, at least 1.

    Returns:
        [B, HQ · D], heads side by side.
    """
    starts, lengths = _on_host(starts), _on_host(lengths)
    if len(starts) == 1:
        return _one(q, k, v, starts[0], lengths[0])
    rows = zip(q.split(1), starts, lengths, strict=True)
    return torch.cat([_one(row, k, v, start, length) for row, start, length in rows])


def _on_host(numbers: Sequence[int] | Tensor) -> Sequence[int]:
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers


def _one(q: Tensor, k: Tensor, v: Tensor, start: int, length: int) -> Tensor:
    # Query heads that share a kv head become rows of one query, so that its keys are read once.
    grouped = q.view(1, k.shape[1], -1, q.shape[-1])  # [1, H, G, D]
    k, v = k.narrow(2, start, length), v.narrow(2, start, length)
    return sdpa(grouped, k, v).reshape(1, -1)
