"""Rotary position embedding by precomputed tables, alone and with what follows it in a layer.

Keys are appended to the KV cache, and may be scored: GlimpsePrune's predictor reads the raw
attention logits of one query row per prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoglimpse.kernels.varlen import Segments


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


def row_logits(q: Tensor, k: Tensor, segments: Segments) -> Tensor:
    """Raw logits, scaled by 1/√D, of each row for the query of its segment: no mask, no softmax.

    Args:
        q: [B, HQ, D], rotated, one row per segment.
        k: [T, H, D], rotated; query head h reads kv head h // (HQ / H).
        segments: B of them, contiguous, that the T rows make up.

    Returns:
        [T, HQ] in the dtype of k, columns in the order of query heads.
    """
    assert segments.rows is None
    heads, width = k.shape[1:]
    pairs = zip(q.unflatten(1, (heads, -1)), k.split(segments.lengths), strict=True)
    parts = [torch.einsum("hgd,nhd->nhg", *pair).flatten(1) * width**-0.5 for pair in pairs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rotate_qk(
    qkv: Tensor, rope: Rope, heads: int, rotate: Callable[[Tensor, Rope], Tensor] = rotate
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, HQ, D] and k, v [T, H, D], q and k rotated, of qkv [T, HQ + 2H, D]; `heads` is H."""
    qk, v = qkv.split_with_sizes((qkv.shape[1] - heads, heads), 1)
    q, k = rotate(qk, rope).split_with_sizes((qk.shape[1] - heads, heads), 1)
    return q, k, v


def rope_append(
    qkv: Tensor,
    rope: Rope,
    k_rows: Tensor,
    v_rows: Tensor,
    rows: slice | Tensor,
    scored: tuple[Tensor, Segments] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotates q and k, writes k and v to rows of the cache, and scores the keys on their way.

    Args:
        qkv: [T, HQ + 2H, D], the heads of q, of which there may be none, then of k, then of v.
        rope: the tables of the T rows, in which the axes of M-RoPE are merged.
        k_rows, v_rows: [R, H, D], one layer of the cache.
        rows: T rows of k_rows and v_rows, int64 [T] or a slice.
        scored: q and segments as `row_logits` takes them, to score the T keys with; or None.

    Returns:
        The rotated q [T, HQ, D], and what `row_logits` returns; None without `scored`.
    """
    q, k, v = rotate_qk(qkv, rope, k_rows.shape[1])
    k_rows[rows], v_rows[rows] = k, v
    return q, None if scored is None else row_logits(scored[0], k, scored[1])
