"""Column sums of attention in two passes over tiles.

The first pass computes the log-sum-exp of each query row. With these known, a column can be summed
without the other columns: the second pass runs the same kernel with queries and keys exchanged and
sums exp(score - lse) over all query rows for a block of keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import attention_colsum as reference
from nanoglimpse.kernels.triton_ops.attention import load_rows, split_head_dim
from nanoglimpse.kernels.triton_ops.launch import launch, supported_heads
from nanoglimpse.kernels.varlen import Segments


@triton.jit(do_not_specialize=["blocks", "HQ", "G_HELD", "G_STREAMED"])
def _attention_colsum_kernel(
    held,  # one block per program: q in the first pass, k in the second
    streamed,  # all rows of the segment: k in the first pass, q in the second
    cu_seqlens,  # int32 [B + 1]
    lse,  # fp32 [T, HQ], in base 2: written by the first pass, read by the second
    out,  # fp32 [T, HQ]
    scale,  # log2(e) / √D
    stride_held,  # elements from row to row
    stride_streamed,
    blocks,  # blocks of the longest segment
    HQ,
    G_HELD,  # query heads per head of `held`
    G_STREAMED,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,  # whether this is the second pass
):
    segment, head = tl.program_id(0) // blocks, tl.program_id(1)
    start = tl.load(cu_seqlens + segment)
    count = tl.load(cu_seqlens + segment + 1) - start
    o_m = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) % blocks * BLOCK >= count:
        return
    m_m = o_m < count
    row = (start + o_m).to(tl.int64)
    o_held, o_streamed = head // G_HELD * D, head // G_STREAMED * D
    b_x1 = load_rows(held, row, m_m, stride_held, o_held, D, 0, D1)  # [BLOCK, D1]
    if D2 > 0:
        b_x2 = load_rows(held, row, m_m, stride_held, o_held, D, D1, D2)
    # The maximum starts finite, so that infinity is never subtracted from infinity.
    b_max = tl.full([BLOCK], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for n in range(0, count, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        m_n = o_n < count
        other = (start + o_n).to(tl.int64)
        b_y = load_rows(streamed, other, m_n, stride_streamed, o_streamed, D, 0, D1)
        b_s = tl.dot(b_x1, tl.trans(b_y), input_precision="ieee")  # [BLOCK, BLOCK]
        if D2 > 0:
            b_y = load_rows(streamed, other, m_n, stride_streamed, o_streamed, D, D1, D2)
            b_s = tl.dot(b_x2, tl.trans(b_y), b_s, input_precision="ieee")
        b_s *= scale
        if SUMS:
            b_lse = tl.load(lse + other * HQ + head, m_n, float("inf"))
            # No score exceeds its log-sum-exp, except in padding rows of `held`, whose exponent
            # could overflow.
            b_sum += tl.sum(tl.exp2(tl.minimum(b_s - b_lse[None, :], 0.0)), 1)
        else:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
            b_rescale = tl.exp2(b_max - b_new_max)
            b_sum = b_sum * b_rescale + tl.sum(tl.exp2(b_s - b_new_max[:, None]), 1)
            b_max = b_new_max
    if SUMS:
        tl.store(out + row * HQ + head, b_sum, m_m)
    else:
        tl.store(lse + row * HQ + head, b_max + tl.log2(b_sum), m_m)


def attention_colsum(q: Tensor, k: Tensor, segments: Segments) -> Tensor:
    """As the reference, in two launches."""
    if not supported_heads(q, k):
        return reference.attention_colsum(q, k, segments)
    assert segments.rows is None
    (rows, query_heads, width), heads = q.shape, k.shape[1]
    for x in (q, k):
        assert x.stride()[1:] == (width, 1)
    assert k.shape == (rows, heads, width)
    lse, out = q.new_empty(2, rows, query_heads, dtype=torch.float32)
    # 64 × 64 with four warps is 32 scores per thread; in fp32 the blocks of `attention`.
    block = 64 if q.element_size() == 2 else 32
    blocks = triton.cdiv(max(segments.lengths, default=0), block)
    d1, d2 = split_head_dim(width)
    group, scale = query_heads // heads, math.log2(math.e) * width**-0.5
    sizes = {"D": width, "D1": d1, "D2": d2, "BLOCK": block, "num_stages": 2}
    grid = (blocks * len(segments.lengths), query_heads)
    passes = ((q, k, 1, group, False), (k, q, group, 1, True))
    for held, streamed, g_held, g_streamed, sums in passes:
        tensors = (held, streamed, segments.cu_seqlens, lse, out)
        numbers = scale, held.stride(0), streamed.stride(0), blocks, query_heads, g_held, g_streamed
        launch(_attention_colsum_kernel, grid, *tensors, *numbers, SUMS=sums, **sizes)
    return out
