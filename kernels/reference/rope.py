"""Rotary position embedding by precomputed tables, alone and with the append to the KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation tables of packed rows, built once per prompt; indexing selects rows.

    Attributes:
        cos: fp32 [T, 1, D].
        sin: fp32 [T, 1, D], the first half negated, so that out = x·cos + roll(x, D/2)·sin.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angles: Tensor) -> "Rope":
        """Builds tables from angles [T, D/2] in radians; angle j turns dimensions j and j + D/2."""
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])

    def __getitem__(self, rows: int | slice | Tensor) -> "Rope":
        return Rope(self.cos[rows], self.sin[rows])

    # Otherwise `cos, sin = rope` would fall back to __getitem__ and unpack rows.
    __iter__ = None


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates every head of every row in fp32 and casts back once.

    Args:
        x: [T, H, D].
        rope: the tables of the T rows.

    Returns:
        [T, H, D] in the dtype of x.
    """
    wide = x.float()
    rolled = wide.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(wide * rope.cos, rolled, rope.sin).type_as(x)


def rope_append(
    qkv: Tensor, rope: Rope, k_rows: Tensor, v_rows: Tensor, rows: slice | Tensor
) -> Tensor:
    """Rotates q and k, writes k and v to rows of the cache, and returns the rotated q.

    Args:
        qkv: [T, HQ + 2H, D], the heads of q, then of k, then of v.
        rope: the tables of the T rows, in which the axes of M-RoPE are merged.
        k_rows, v_rows: [R, H, D], one layer of the cache.
        rows: T rows of k_rows and v_rows, int64 [T] or a slice.

    Returns:
        [T, HQ, D]
    """
    heads = k_rows.shape[1]
    qk, v = qkv.split_with_sizes((qkv.shape[1] - heads, heads), 1)
    q, k = rotate(qk, rope).split_with_sizes((qk.shape[1] - heads, heads), 1)
    k_rows[rows], v_rows[rows] = k, v
    return q
