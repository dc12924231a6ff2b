"""Received attention in two passes over tiles: the log-sum-exp of each row, then column sums.

With the log-sum-exps known a column needs no other column, so that the second pass goes key block
by key block over all queries and sums exp(score - lse) where the first went the other way round.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import received as reference
from .attention_triton import _rows, split_width
from .launch import launch, served_heads
from .packing import Packing


@triton.jit(do_not_specialize=["blocks", "HQ", "G_HELD", "G_PASSING"])
def _received_kernel(
    held,  # q, then k
    passing,  # k, then q
    cu_seqlens,
    lse,  # fp32 [T, HQ], in base 2: written, then read
    out,  # fp32 [T, HQ]
    scale,  # log2(e) / √D
    stride_held,  # elements from row to row
    stride_passing,
    blocks,  # blocks of the longest sequence
    HQ,
    G_HELD,  # query heads to a head of it
    G_PASSING,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,  # the second pass
):
    sequence, head = tl.program_id(0) // blocks, tl.program_id(1)
    start = tl.load(cu_seqlens + sequence)
    count = tl.load(cu_seqlens + sequence + 1) - start
    o_m = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) % blocks * BLOCK >= count:
        return
    m_m = o_m < count
    row = (start + o_m).to(tl.int64)
    h_held, h_passing = head // G_HELD * D, head // G_PASSING * D
    b_x1 = _rows(held, row, m_m, stride_held, h_held, D, 0, D1)  # [BLOCK, D1]
    if D2 > 0:
        b_x2 = _rows(held, row, m_m, stride_held, h_held, D, D1, D2)
    # The pivot starts finite, so that nothing is ever subtracted from infinity.
    b_top = tl.full([BLOCK], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for n in range(0, count, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        m_n = o_n < count
        other = (start + o_n).to(tl.int64)
        b_y = _rows(passing, other, m_n, stride_passing, h_passing, D, 0, D1)
        b_s = tl.dot(b_x1, tl.trans(b_y), input_precision="ieee")  # [BLOCK, BLOCK]
        if D2 > 0:
            b_y = _rows(passing, other, m_n, stride_passing, h_passing, D, D1, D2)
            b_s = tl.dot(b_x2, tl.trans(b_y), b_s, input_precision="ieee")
        b_s *= scale
        if SUMS:
            b_lse = tl.load(lse + other * HQ + head, m_n, float("inf"))
            # No score is above the log-sum-exp; only 0 for a row that is not there may be.
            b_sum += tl.sum(tl.exp2(tl.minimum(b_s - b_lse[None, :], 0.0)), 1)
        else:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_top, tl.max(b_s, 1))
            b_sum = b_sum * tl.exp2(b_top - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
            b_top = b_new
    if SUMS:
        tl.store(out + row * HQ + head, b_sum, m_m)
    else:
        tl.store(lse + row * HQ + head, b_top + tl.log2(b_sum), m_m)


def received_attention(q: Tensor, k: Tensor, packing: Packing) -> Tensor:
    """As the reference, in two launches."""
    if not served_heads(q, k):
        return reference.received_attention(q, k, packing)
    assert packing.rows is None
    (rows, query_heads, width), heads = q.shape, k.shape[1]
    for x in (q, k):
        assert x.stride()[1:] == (width, 1)
    assert k.shape == (rows, heads, width)
    lse, out = q.new_empty(2, rows, query_heads, dtype=torch.float32)
    # 64 × 64 with four warps: 32 scores a thread; fp32 as in prefill attention.
    block = 64 if q.element_size() == 2 else 32
    most = triton.cdiv(max(packing.lengths, default=0), block)
    d1, d2 = split_width(width)
    passes = ((q, k, 1, query_heads // heads), (k, q, query_heads // heads, 1))
    for number, (held, passing, g_held, g_passing) in enumerate(passes):
        launch(
            _received_kernel,
            (most * len(packing.lengths), query_heads),
            held,
            passing,
            packing.cu_seqlens,
            lse,
            out,
            math.log2(math.e) * width**-0.5,
            held.stride(0),
            passing.stride(0),
            most,
            query_heads,
            g_held,
            g_passing,
            D=width,
            D1=d1,
            D2=d2,
            BLOCK=block,
            SUMS=bool(number),
            num_stages=2,
        )
    return out
