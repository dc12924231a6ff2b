"""Rotary position embedding, alone and with the append to the KV cache in one launch.

M-RoPE and two dimensions differ in their tables only.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import rope as reference
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.triton_ops.launch import launch, row_target, supported, tile_shape


@triton.jit(do_not_specialize=["N"])
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    stride,  # elements from row to row of x
    N,  # rows · heads
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (o_n < N)[:, None] & (o_d < HALF)
    row, head = (o_n // H)[:, None], (o_n % H)[:, None]
    source = row * stride + head * 2 * HALF + o_d
    table = row * 2 * HALF + HALF + o_d
    b_low = tl.load(x + source, mask, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    b_high = tl.load(x + source + HALF, mask, 0.0).to(tl.float32)
    b_cos = tl.load(cos + table, mask, 0.0)
    b_sin = tl.load(sin + table, mask, 0.0)
    target = out + o_n[:, None] * 2 * HALF + o_d
    dtype = out.dtype.element_ty
    tl.store(target, (b_low * b_cos - b_high * b_sin).to(dtype), mask)
    tl.store(target + HALF, (b_high * b_cos + b_low * b_sin).to(dtype), mask)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """As the reference. It reads the second half of each table only: the first repeats it."""
    if not supported(x):
        return reference.rotate(x, rope)
    rows, heads, width = x.shape
    assert x.stride()[1:] == (width, 1)
    assert rope.cos.shape == rope.sin.shape == (rows, 1, width)
    assert rope.cos.is_contiguous()
    assert rope.sin.is_contiguous()
    out = x.new_empty(x.shape)
    block_n, block_d = tile_shape(width // 2)
    # Half the rows of a plain tile, since a program loads both halves of x and two fp32 tables.
    block_n = max(block_n // 2, 1)
    sizes = {"H": heads, "HALF": width // 2, "BLOCK_N": block_n, "BLOCK_D": block_d}
    grid, numbers = (triton.cdiv(rows * heads, block_n),), (x.stride(0), rows * heads)
    launch(_rotate_kernel, grid, x, rope.cos, rope.sin, out, *numbers, **sizes)
    return out


@triton.jit(do_not_specialize=["first", "N"])
def _rope_append_kernel(
    qkv,  # [T, HQ + 2H, D]
    cos,
    sin,
    q,  # [T, HQ, D]
    k_rows,  # [R, H, D]
    v_rows,
    rows,  # int64 [T], or None if the target is contiguous from `first` on
    first,
    N,  # T · (HQ + 2H)
    HQ: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_n, m_d = (o_n < N)[:, None], o_d < HALF
    row, head = o_n // (HQ + 2 * H), o_n % (HQ + 2 * H)
    source = o_n[:, None] * 2 * HALF + o_d
    b_low = tl.load(qkv + source, m_n & m_d, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    b_high = tl.load(qkv + source + HALF, m_n & m_d, 0.0).to(tl.float32)
    dtype = q.dtype.element_ty
    # Heads of v are not rotated: their cosine is 1 and their sine 0.
    rotated = (head < HQ + H)[:, None]
    table = row[:, None] * 2 * HALF + HALF + o_d
    b_cos = tl.load(cos + table, m_n & m_d & rotated, 1.0)
    b_sin = tl.load(sin + table, m_n & m_d & rotated, 0.0)
    b_out1 = (b_low * b_cos - b_high * b_sin).to(dtype)
    b_out2 = (b_high * b_cos + b_low * b_sin).to(dtype)
    target = first + row if rows is None else tl.load(rows + row, o_n < N, 0)
    to_q = (row * HQ + head)[:, None] * 2 * HALF + o_d
    to_k = (target * H + head - HQ)[:, None] * 2 * HALF + o_d
    to_v = (target * H + head - HQ - H)[:, None] * 2 * HALF + o_d
    m_q = m_n & m_d & (head < HQ)[:, None]
    m_k = m_n & m_d & (head >= HQ)[:, None] & rotated
    m_v = m_n & m_d & (head >= HQ + H)[:, None]
    tl.store(q + to_q, b_out1, m_q)
    tl.store(q + to_q + HALF, b_out2, m_q)
    tl.store(k_rows + to_k, b_out1, m_k)
    tl.store(k_rows + to_k + HALF, b_out2, m_k)
    tl.store(v_rows + to_v, b_out1, m_v)
    tl.store(v_rows + to_v + HALF, b_out2, m_v)


def rope_append(
    qkv: Tensor, rope: Rope, k_rows: Tensor, v_rows: Tensor, rows: slice | Tensor
) -> Tensor:
    """As the reference, in one launch."""
    if not supported(qkv, k_rows, v_rows):
        return reference.rope_append(qkv, rope, k_rows, v_rows, rows)
    (count, all_heads, width), heads = qkv.shape, k_rows.shape[1]
    assert k_rows.shape == v_rows.shape
    assert k_rows.shape[2] == width
    assert rope.cos.shape == rope.sin.shape == (count, 1, width)
    for x in (qkv, k_rows, v_rows, rope.cos, rope.sin):
        assert x.is_contiguous()
    q = qkv.new_empty(count, all_heads - 2 * heads, width)
    block_n, block_d = tile_shape(width // 2)
    # Half the rows of a plain tile, as in `rotate`.
    block_n = max(block_n // 2, 1)
    target, first = row_target(rows)
    sizes = {"HQ": all_heads - 2 * heads, "H": heads, "HALF": width // 2}
    sizes |= {"BLOCK_N": block_n, "BLOCK_D": block_d}
    tensors, all_rows = (qkv, rope.cos, rope.sin, q, k_rows, v_rows, target), count * all_heads
    grid = (triton.cdiv(all_rows, block_n),)
    launch(_rope_append_kernel, grid, *tensors, first, all_rows, **sizes)
    return q
