"""Attention over packed sequences: FlashAttention-2 (arXiv 2307.08691) forward.

What differs: a head of 80 or 192 elements is read as 64 + 16 or 128 + 64 instead of being padded to
a power of two; queries may be some rows of their sequence; and the raw logits of one row a sequence
are stored on the way, so that reading the glimpse costs no second pass over the keys.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from . import attention as reference
from .attention import Probe, Queries
from .launch import hopper, launch, served_heads
from .packing import Packing


@triton.jit(do_not_specialize=["blocks", "HQ", "G"])
def _attention_kernel(
    q,
    k,
    v,
    out,
    cu_q,  # int32 [B + 1]
    cu_k,  # int32 [B + 1]
    positions,  # int64 [TQ], or None: all rows of a sequence attend
    asking,  # int64 [B], or None: nothing is read
    first,  # int64 [B]
    stop,  # int64 [B]
    logits,  # [T, HQ]
    scale,  # log2(e) / √D
    stride_q,  # elements from row to row
    stride_k,
    stride_v,
    blocks,  # query blocks of the longest sequence
    HQ,
    G,
    D: tl.constexpr,
    DV: tl.constexpr,
    D1: tl.constexpr,  # D1 + D2 covers D, DV1 + DV2 covers DV; the second may be 0
    D2: tl.constexpr,
    DV1: tl.constexpr,
    DV2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    # Late blocks see the most keys where attention is causal: they begin first.
    index, head = tl.program_id(0), tl.program_id(1)
    sequence, block = index // blocks, blocks - 1 - index % blocks
    q_start, k_start = tl.load(cu_q + sequence), tl.load(cu_k + sequence)
    q_count = tl.load(cu_q + sequence + 1) - q_start
    k_count = tl.load(cu_k + sequence + 1) - k_start
    if block * BLOCK_M >= q_count:
        return

    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < q_count
    row = (q_start + o_m).to(tl.int64)
    b_q1 = _rows(q, row, m_m, stride_q, head * D, D, 0, D1)  # [BLOCK_M, D1]
    if D2 > 0:
        b_q2 = _rows(q, row, m_m, stride_q, head * D, D, D1, D2)
    seen = tl.full([BLOCK_M], 0, tl.int32) + k_count  # keys that each row sees
    if CAUSAL:
        seen = o_m + 1
        if positions is not None:
            seen = tl.load(positions + row, m_m, 0).to(tl.int32) + 1
    # Keys before `whole` are seen by every row, those from `end` on by none.
    whole = tl.min(tl.where(m_m, seen, k_count), 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.max(tl.where(m_m, seen, 0), 0), k_count)
    if asking is not None:
        asks = tl.load(asking + sequence).to(tl.int32) - q_start
        reads = (asks >= block * BLOCK_M) & (asks < (block + 1) * BLOCK_M)
        read_first, read_stop = tl.load(first + sequence), tl.load(stop + sequence)

    # The pivot starts finite, so that nothing is ever subtracted from infinity.
    b_top = tl.full([BLOCK_M], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc1 = tl.zeros([BLOCK_M, DV1], tl.float32)
    if DV2 > 0:
        b_acc2 = tl.zeros([BLOCK_M, DV2], tl.float32)
    for masked in tl.static_range(2):
        for n in range(whole if masked else 0, end if masked else whole, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < end
            key = (k_start + o_n).to(tl.int64)
            b_k = _rows(k, key, m_n, stride_k, head // G * D, D, 0, D1)  # [BLOCK_N, D1]
            b_s = tl.dot(b_q1, tl.trans(b_k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if D2 > 0:
                b_k = _rows(k, key, m_n, stride_k, head // G * D, D, D1, D2)
                b_s = tl.dot(b_q2, tl.trans(b_k), b_s, input_precision="ieee")
            b_s *= scale
            if masked:
                b_s = tl.where(o_n[None, :] < seen[:, None], b_s, float("-inf"))
            if asking is not None:  # noqa: SIM102 (decided while compiling, the other while running)
                if reads:
                    b_row = tl.sum(tl.where((o_m == asks)[:, None], b_s, 0.0), 0)  # [BLOCK_N]
                    wanted = (key >= read_first) & (key < read_stop) & (b_row > float("-inf"))
                    b_row = (b_row * 0.6931471805599453).to(logits.dtype.element_ty)  # ln(2)
                    tl.store(logits + key * HQ + head, b_row, wanted)
            b_new = tl.maximum(b_top, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_new[:, None])
            b_old = tl.exp2(b_top - b_new)
            b_sum = b_sum * b_old + tl.sum(b_p, 1)
            b_top = b_new
            b_v = _rows(v, key, m_n, stride_v, head // G * DV, DV, 0, DV1)  # [BLOCK_N, DV1]
            b_p = b_p.to(b_v.dtype)
            b_acc1 = tl.dot(b_p, b_v, b_acc1 * b_old[:, None], input_precision="ieee")
            if DV2 > 0:
                b_v = _rows(v, key, m_n, stride_v, head // G * DV, DV, DV1, DV2)
                b_acc2 = tl.dot(b_p, b_v, b_acc2 * b_old[:, None], input_precision="ieee")

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    _store(out, row, m_m, HQ * DV, head * DV, DV, 0, DV1, b_acc1 / b_sum)
    if DV2 > 0:
        _store(out, row, m_m, HQ * DV, head * DV, DV, DV1, DV2, b_acc2 / b_sum)


@triton.jit
def _rows(
    x, row, m_row, stride, base, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr
):
    """Elements START to START + SIZE of a head of these rows, 0 past its width."""
    o_d = START + tl.arange(0, SIZE)
    mask = m_row[:, None] & (o_d < WIDTH)[None, :]
    return tl.load(x + row[:, None] * stride + (base + o_d)[None, :], mask, 0.0)


@triton.jit
def _store(
    x, row, m_row, stride, base, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, value
):
    o_d = START + tl.arange(0, SIZE)
    mask = m_row[:, None] & (o_d < WIDTH)[None, :]
    tl.store(x + row[:, None] * stride + (base + o_d)[None, :], value.to(x.dtype.element_ty), mask)


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, that cover a head; 16 is the least that tl.dot takes."""
    head = max(1 << (width.bit_length() - 1), 16)
    rest = width - head
    return head, max(triton.next_power_of_2(rest), 16) if rest > 0 else 0


def blocks_of(q: Tensor, longest: int, reads: bool) -> dict[str, int]:
    """Rows and keys of a step, warps and stages, for the longest of the packed sequences.

    With 128 rows, eight warps and a head of 128, 64 keys take 186 registers of a thread on Hopper,
    whose tensor cores read shared memory, but spill on Ampere, where 32 keys take 202. Reading adds
    a reduction to the loop, and takes 64 × 32 to spill nowhere. Windows of 64 patches and what is
    shorter need fewer rows. In fp32 there are no tensor cores to feed: 32 × 32, and eight
    warps for heads of 128 and more not to spill.
    """
    if q.element_size() == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    rows = min(max(triton.next_power_of_2(longest), 16), 64 if reads else 128)
    return {
        "BLOCK_M": rows,
        "BLOCK_N": 64 if hopper() and not reads else 32,
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": 2,
    }


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> Tensor:
    """As the reference, in one launch; scattered rows are gathered before and after it."""
    if not served_heads(q, k, v):
        return reference.attention(q, k, v, packing, causal=causal, queries=queries)
    if packing.rows is None:
        return _launch(q, k, v, packing, causal, queries, None, None)
    assert queries is None
    rows = packing.rows
    out = q.new_empty(len(q), q.shape[1] * v.shape[-1])
    out[rows] = _launch(q[rows], k[rows], v[rows], packing, causal, None, None, None)
    return out


def attention_reading(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    reading: Probe,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference, in one launch."""
    if not served_heads(q, k, v):
        return reference.attention_reading(
            q, k, v, packing, reading, causal=causal, queries=queries
        )
    assert packing.rows is None
    logits = k.new_zeros(len(k), q.shape[1])
    return _launch(q, k, v, packing, causal, queries, reading, logits), logits


def _launch(q, k, v, packing, causal, queries, reading, logits) -> Tensor:
    (rows, query_heads, width), heads, v_width = q.shape, k.shape[1], v.shape[2]
    for x in (q, k, v):
        assert x.stride()[1:] == (x.shape[2], 1)
    assert k.shape == (len(v), heads, width)
    assert v.shape[1] == heads
    own = packing if queries is None else queries.packing
    assert len(own.lengths) == len(packing.lengths)
    block = blocks_of(q, max(own.lengths, default=0), reading is not None)
    most = triton.cdiv(max(own.lengths, default=0), block["BLOCK_M"])
    (d1, d2), (dv1, dv2) = split_width(width), split_width(v_width)
    out = q.new_empty(rows, query_heads * v_width)
    launch(
        _attention_kernel,
        (most * len(own.lengths), query_heads),
        q,
        k,
        v,
        out,
        own.cu_seqlens,
        packing.cu_seqlens,
        queries.positions if queries and causal else None,
        *(reading or (None, None, None)),
        logits,
        math.log2(math.e) * width**-0.5,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        most,
        query_heads,
        query_heads // heads,
        D=width,
        DV=v_width,
        D1=d1,
        D2=d2,
        DV1=dv1,
        DV2=dv2,
        CAUSAL=causal,
        **block,
    )
    return out
