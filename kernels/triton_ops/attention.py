"""Attention within the segments of packed rows: FlashAttention-2 (arXiv 2307.08691), forward only.

Two things differ. A head of 80 or 192 elements is read as 64 + 16 or 128 + 64 elements instead of
being padded to a power of two, and the query rows may be a subset of the rows of their segment.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import attention as reference
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.triton_ops.gather_kernel import Copies, gather_kernel
from nanoglimpse.kernels.triton_ops.launch import launch, reads_shared_operands, supported_heads
from nanoglimpse.kernels.varlen import Segments

# The arguments of `gather_kernel` where nothing is gathered.
NO_COPIES = (*8 * [None], *6 * [0])


@triton.jit(do_not_specialize=["blocks", "HQ", "G", "first", "L", "S"])
def _attention_kernel(
    q,
    k,
    v,
    out,
    cu_seqlens_q,  # int32 [B + 1]
    cu_seqlens_k,  # int32 [B + 1]
    positions,  # int64 [TQ], or None if all rows of a segment are query rows
    scale,  # log2(e) / √D
    stride_q,  # elements from row to row
    stride_k,
    stride_v,
    blocks,  # query blocks of the longest segment
    HQ,
    G,
    cache_k,  # these and the following as `gather_kernel`; None if nothing is gathered
    cache_v,
    hidden,
    rows,
    new_k,
    new_v,
    new_hidden,
    target_rows,
    first,
    stride_cache,
    stride_new,
    L,
    S,
    C,
    D: tl.constexpr,
    DV: tl.constexpr,
    D1: tl.constexpr,  # D1 + D2 covers D, and DV1 + DV2 covers DV; the second may be 0
    D2: tl.constexpr,
    DV1: tl.constexpr,
    DV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr = 0,
    BLOCK_S: tl.constexpr = 0,
    BLOCK_W: tl.constexpr = 0,
):
    index, head = tl.program_id(0), tl.program_id(1)
    # Attention takes longer, so its programs start first.
    if rows is not None:
        tile = (head - HQ) * tl.num_programs(0) + index
        if tile >= 0:
            # fmt: off
            gather_kernel(
                cache_k, cache_v, hidden, rows, new_k, new_v, new_hidden, target_rows, first,
                stride_cache, stride_new, L, S, C, WIDTH, BLOCK_S, BLOCK_W, tile,
            )
            # fmt: on
            return
    # Later blocks attend to more keys in causal attention, so they start first.
    segment, block = index // blocks, blocks - 1 - index % blocks
    q_start, k_start = tl.load(cu_seqlens_q + segment), tl.load(cu_seqlens_k + segment)
    q_count = tl.load(cu_seqlens_q + segment + 1) - q_start
    k_count = tl.load(cu_seqlens_k + segment + 1) - k_start
    if block * BLOCK_M >= q_count:
        return

    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < q_count
    row = (q_start + o_m).to(tl.int64)
    b_q1 = load_rows(q, row, m_m, stride_q, head * D, D, 0, D1)  # [BLOCK_M, D1]
    if D2 > 0:
        b_q2 = load_rows(q, row, m_m, stride_q, head * D, D, D1, D2)
    visible = tl.full([BLOCK_M], 0, tl.int32) + k_count  # number of keys that each row attends to
    if CAUSAL:
        visible = o_m + 1
        if positions is not None:
            visible = tl.load(positions + row, m_m, 0).to(tl.int32) + 1
    # Every row attends to the keys before `unmasked`, no row to those from `end` on.
    unmasked = tl.min(tl.where(m_m, visible, k_count), 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.max(tl.where(m_m, visible, 0), 0), k_count)

    # The maximum starts finite, so that infinity is never subtracted from infinity.
    b_max = tl.full([BLOCK_M], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc1 = tl.zeros([BLOCK_M, DV1], tl.float32)
    if DV2 > 0:
        b_acc2 = tl.zeros([BLOCK_M, DV2], tl.float32)
    for masked in tl.static_range(2):
        for n in range(unmasked if masked else 0, end if masked else unmasked, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < end
            key = (k_start + o_n).to(tl.int64)
            b_k = load_rows(k, key, m_n, stride_k, head // G * D, D, 0, D1)  # [BLOCK_N, D1]
            b_s = tl.dot(b_q1, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if D2 > 0:
                b_k = load_rows(k, key, m_n, stride_k, head // G * D, D, D1, D2)
                b_s = tl.dot(b_q2, tl.trans(b_k), b_s, input_precision="ieee")
            b_s *= scale
            if masked:
                b_s = tl.where(o_n[None, :] < visible[:, None], b_s, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_new_max[:, None])
            b_rescale = tl.exp2(b_max - b_new_max)
            b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
            b_max = b_new_max
            b_v = load_rows(v, key, m_n, stride_v, head // G * DV, DV, 0, DV1)  # [BLOCK_N, DV1]
            b_p = b_p.to(b_v.dtype)
            b_acc1 = tl.dot(b_p, b_v, b_acc1 * b_rescale[:, None], input_precision="ieee")
            if DV2 > 0:
                b_v = load_rows(v, key, m_n, stride_v, head // G * DV, DV, DV1, DV2)
                b_acc2 = tl.dot(b_p, b_v, b_acc2 * b_rescale[:, None], input_precision="ieee")

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    _store_rows(out, row, m_m, HQ * DV, head * DV, DV, 0, DV1, b_acc1 / b_sum)
    if DV2 > 0:
        _store_rows(out, row, m_m, HQ * DV, head * DV, DV, DV1, DV2, b_acc2 / b_sum)


@triton.jit
def load_rows(
    x, row, m_row, stride, base, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr
):
    """Loads elements START to START + SIZE of one head of some rows; 0 beyond its WIDTH."""
    o_d = START + tl.arange(0, SIZE)
    mask = m_row[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(x + row[:, None] * stride + (base + o_d)[None, :], mask, 0.0)


@triton.jit
def _store_rows(
    x, row, m_row, stride, base, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, value
):
    o_d = START + tl.arange(0, SIZE)
    mask = m_row[:, None] & (o_d < WIDTH)[None, :]
    tl.store(x + row[:, None] * stride + (base + o_d)[None, :], value.to(x.dtype.element_ty), mask)


def split_head_dim(width: int) -> tuple[int, int]:
    """Splits a head into two powers of two, or one and 0, each at least 16 as `tl.dot` requires."""
    first = max(1 << (width.bit_length() - 1), 16)
    rest = width - first
    return first, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0


def block_sizes(q: Tensor, longest: int) -> dict[str, int]:
    """Block sizes, warps and stages for segments of which the longest has `longest` query rows.

    With 128 rows, eight warps and a head of 128, blocks of 64 keys take 186 registers per thread on
    Hopper, whose tensor cores read operands from shared memory; on Ampere they spill, and blocks of
    32 keys take 202. Segments of at most 64 rows, such as vision windows, get blocks of 64 rows,
    with a third stage, without which Triton 3.6 spills on sm_80. In fp32, which has no tensor cores
    to feed, blocks are 32 × 32, and heads of 128 and more need eight warps so as not to spill.
    """
    if q.element_size() == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    sizes = {"BLOCK_N": 64 if reads_shared_operands() else 32}
    if longest <= 64:
        return sizes | {"BLOCK_M": 64, "num_warps": 4, "num_stages": 3}
    return sizes | {"BLOCK_M": 128, "num_warps": 8, "num_stages": 2}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> Tensor:
    """As the reference, in one launch; rows that are not contiguous are gathered for it."""
    if not supported_heads(q, k, v):
        return reference.attention(q, k, v, segments, causal=causal, queries=queries)
    if segments.rows is None:
        return launch_attention(q, k, v, segments, causal, queries)
    assert queries is None
    rows = segments.rows
    out = q.new_empty(len(q), q.shape[1] * v.shape[-1])
    out[rows] = launch_attention(q[rows], k[rows], v[rows], segments, causal, None)
    return out


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    causal: bool,
    queries: Queries | None,
    copies: Copies | None = None,
) -> Tensor:
    """Attention over contiguous segments; the same launch makes the copies of a gather."""
    (rows, query_heads, width), heads, v_width = q.shape, k.shape[1], v.shape[2]
    for x in (q, k, v):
        assert x.stride()[1:] == (x.shape[2], 1)
    assert k.shape == (len(v), heads, width)
    assert v.shape[1] == heads
    q_segments = segments if queries is None else queries.segments
    assert len(q_segments.lengths) == len(segments.lengths)
    longest = max(q_segments.lengths, default=0)
    sizes = block_sizes(q, longest)
    blocks = triton.cdiv(longest, sizes["BLOCK_M"])
    (d1, d2), (dv1, dv2) = split_head_dim(width), split_head_dim(v_width)
    out = q.new_empty(rows, query_heads * v_width)
    programs, extra_heads = blocks * len(q_segments.lengths), 0
    if copies:
        tiles, tiling = copies.tiling(sizes["num_warps"])
        sizes, extra_heads = sizes | tiling, triton.cdiv(tiles, max(programs, 1))
    positions = queries.positions if queries and causal else None
    tensors = (q, k, v, out, q_segments.cu_seqlens, segments.cu_seqlens, positions)
    strides = q.stride(0), k.stride(0), v.stride(0)
    numbers = math.log2(math.e) * width**-0.5, *strides, blocks, query_heads, query_heads // heads
    sizes |= {"D": width, "DV": v_width, "D1": d1, "D2": d2, "DV1": dv1, "DV2": dv2}
    grid, copied = (programs, query_heads + extra_heads), copies.arguments if copies else NO_COPIES
    launch(_attention_kernel, grid, *tensors, *numbers, *copied, CAUSAL=causal, **sizes)
    return out
