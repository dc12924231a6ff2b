"""What stands between the projection of a decoder layer and its attention."""

from torch import Tensor

from .rope import Rope, rotate


def rotate_append(
    qkv: Tensor,
    bias: Tensor | None,
    rope: Rope,
    k_rows: Tensor,
    v_rows: Tensor,
    rows: slice | Tensor,
) -> Tensor:
    """Adds the bias, rotates q and k, writes k and v to rows of the cache, and returns q.

    Args:
        qkv: [T, HQ + 2H, D], heads of q, then of k, then of v.
        bias: [(HQ + 2H) · D], or None if the projection has added it.
        rope: tables of the T rows, the axes of M-RoPE merged; the same in all layers.
        k_rows, v_rows: [R, H, D], one layer of the cache.
        rows: T rows there, int64 or a slice.

    Returns:
        [T, HQ, D]
    """
    if bias is not None:
        qkv = qkv + bias.view(qkv.shape[1:])
    heads = k_rows.shape[1]
    qk, v = qkv.split_with_sizes((qkv.shape[1] - heads, heads), 1)
    q, k = rotate(qk, rope).split_with_sizes((qk.shape[1] - heads, heads), 1)
    k_rows[rows], v_rows[rows] = k, v
    return q
