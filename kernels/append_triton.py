"""Bias, M-RoPE and append in one launch; the public kernels known to us fuse two of the three."""

import triton
import triton.language as tl
from torch import Tensor

from . import append as reference
from .launch import launch, served, tile
from .rope import Rope


@triton.jit(do_not_specialize=["first", "N"])
def _rotate_append_kernel(
    qkv,  # [T, HQ + 2H, D]
    bias,  # [HQ + 2H, D], or None: it is in there
    cos,
    sin,
    q,  # [T, HQ, D]
    k_rows,  # [R, H, D]
    v_rows,
    rows,  # int64 [T], or None: from `first` on
    first,
    N,  # T times HQ + 2H
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
    if bias is not None:
        # Rounded before it is turned, as where the projection adds the bias.
        o_bias = head[:, None] * 2 * HALF + o_d
        b_low = (b_low + tl.load(bias + o_bias, m_d, 0.0)).to(dtype).to(tl.float32)
        b_high = (b_high + tl.load(bias + o_bias + HALF, m_d, 0.0)).to(dtype).to(tl.float32)
    # v stays as it is.
    turns = (head < HQ + H)[:, None]
    table = row[:, None] * 2 * HALF + HALF + o_d
    b_cos = tl.load(cos + table, m_n & m_d & turns, 1.0)
    b_sin = tl.load(sin + table, m_n & m_d & turns, 0.0)
    b_out1 = (b_low * b_cos - b_high * b_sin).to(dtype)
    b_out2 = (b_high * b_cos + b_low * b_sin).to(dtype)
    target = first + row if rows is None else tl.load(rows + row, o_n < N, 0)
    to_q = (row * HQ + head)[:, None] * 2 * HALF + o_d
    to_k = (target * H + head - HQ)[:, None] * 2 * HALF + o_d
    to_v = (target * H + head - HQ - H)[:, None] * 2 * HALF + o_d
    m_q = m_n & m_d & (head < HQ)[:, None]
    m_k = m_n & m_d & (head >= HQ)[:, None] & turns
    m_v = m_n & m_d & (head >= HQ + H)[:, None]
    tl.store(q + to_q, b_out1, m_q)
    tl.store(q + to_q + HALF, b_out2, m_q)
    tl.store(k_rows + to_k, b_out1, m_k)
    tl.store(k_rows + to_k + HALF, b_out2, m_k)
    tl.store(v_rows + to_v, b_out1, m_v)
    tl.store(v_rows + to_v + HALF, b_out2, m_v)


def rotate_append(
    qkv: Tensor,
    bias: Tensor | None,
    rope: Rope,
    k_rows: Tensor,
    v_rows: Tensor,
    rows: slice | Tensor,
) -> Tensor:
    """As the reference, in one launch."""
    if not served(qkv, k_rows, v_rows):
        return reference.rotate_append(qkv, bias, rope, k_rows, v_rows, rows)
    (count, all_heads, width), heads = qkv.shape, k_rows.shape[1]
    assert k_rows.shape == v_rows.shape
    assert k_rows.shape[2] == width
    assert rope.cos.shape == rope.sin.shape == (count, 1, width)
    for x in (qkv, k_rows, v_rows, rope.cos, rope.sin):
        assert x.is_contiguous()
    if bias is not None:
        assert bias.shape == (all_heads * width,)
        assert bias.dtype == qkv.dtype
    q = qkv.new_empty(count, all_heads - 2 * heads, width)
    block_n, block_d = tile(count * all_heads, width // 2)
    # Half as many, as in `rotate`.
    block_n = max(block_n // 2, 1)
    sliced = isinstance(rows, slice)
    launch(
        _rotate_append_kernel,
        (triton.cdiv(count * all_heads, block_n),),
        qkv,
        bias,
        rope.cos,
        rope.sin,
        q,
        k_rows,
        v_rows,
        None if sliced else rows,
        rows.start if sliced else 0,
        count * all_heads,
        HQ=all_heads - 2 * heads,
        H=heads,
        HALF=width // 2,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )
    return q
