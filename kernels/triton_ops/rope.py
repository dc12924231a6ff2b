"""Rotary position embedding, alone and with what follows it in a decoder layer, in one launch.

M-RoPE and two dimensions differ in their tables only. A key is scored with the few query heads of
its kv head. That is less work than reading it, so tensor cores would not help, and the rows of a
program may belong to several segments.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import rope as reference
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.triton_ops.launch import launch, row_target, supported, tile_shape
from nanoglimpse.kernels.varlen import Segments


@triton.jit(do_not_specialize=["first", "N", "B"])
def _rope_kernel(
    x,  # [T, HEADS, D], HQ heads of q, H of k, and the rest of v
    cos,  # None if x is rotated already
    sin,
    q,  # [T, HQ, D]
    k_rows,  # [R, H, D], or None if there is nothing to append
    v_rows,
    rows,  # int64 [T], or None if the target is contiguous from `first` on
    first,
    query,  # [B, H · G, D], rotated, or None if no key is scored
    cu_seqlens,  # int32 [B + 1]
    logits,  # [T, H · G]
    scale,  # 1 / √D
    stride,  # elements from row to row of x
    N,  # T · HEADS
    B,
    HEADS: tl.constexpr,
    HQ: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (o_n < N)[:, None] & (o_d < HALF)
    row, head = o_n // HEADS, o_n % HEADS
    source = (row * stride + head * 2 * HALF)[:, None] + o_d
    dtype = x.dtype.element_ty
    b_out1 = tl.load(x + source, mask, 0.0)  # [BLOCK_N, BLOCK_D]
    b_out2 = tl.load(x + source + HALF, mask, 0.0)
    m_k = mask & (head >= HQ)[:, None] & (head < HQ + H)[:, None]
    if cos is not None:
        # Heads of v are not rotated: their cosine is 1 and their sine 0.
        rotated = mask & (head < HQ + H)[:, None]
        table = row[:, None] * 2 * HALF + HALF + o_d
        b_cos = tl.load(cos + table, rotated, 1.0)
        b_sin = tl.load(sin + table, rotated, 0.0)
        b_low, b_high = b_out1.to(tl.float32), b_out2.to(tl.float32)
        b_out1 = (b_low * b_cos - b_high * b_sin).to(dtype)
        b_out2 = (b_high * b_cos + b_low * b_sin).to(dtype)
    if HQ > 0:
        to_q = (row * HQ + head)[:, None] * 2 * HALF + o_d
        m_q = mask & (head < HQ)[:, None]
        tl.store(q + to_q, b_out1, m_q)
        tl.store(q + to_q + HALF, b_out2, m_q)
    if k_rows is not None:
        target = first + row if rows is None else tl.load(rows + row, o_n < N, 0)
        to_k = (target * H + head - HQ)[:, None] * 2 * HALF + o_d
        to_v = to_k - H * 2 * HALF
        m_v = mask & (head >= HQ + H)[:, None]
        tl.store(k_rows + to_k, b_out1, m_k)
        tl.store(k_rows + to_k + HALF, b_out2, m_k)
        tl.store(v_rows + to_v, b_out1, m_v)
        tl.store(v_rows + to_v + HALF, b_out2, m_v)
    if query is not None:
        # Keys are scored as they are stored, so that scoring them later gives the same.
        b_k1, b_k2 = b_out1.to(tl.float32), b_out2.to(tl.float32)
        segment = row * 0
        for b in range(1, B):
            segment += (row >= tl.load(cu_seqlens + b)).to(tl.int64)
        o_q = ((segment * H + head - HQ) * G)[:, None] * 2 * HALF + o_d
        to_logits = logits + (row * H + head - HQ) * G
        for g in range(G):
            b_q1 = tl.load(query + o_q + g * 2 * HALF, m_k, 0.0).to(tl.float32)
            b_q2 = tl.load(query + o_q + g * 2 * HALF + HALF, m_k, 0.0).to(tl.float32)
            b_s = tl.sum(b_k1 * b_q1 + b_k2 * b_q2, 1) * scale
            m_s = (o_n < N) & (head >= HQ) & (head < HQ + H)
            tl.store(to_logits + g, b_s.to(dtype), m_s)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """As the reference."""
    if not supported(x):
        return reference.rotate(x, rope)
    return _launch(x, rope, x.shape[1], 0)[0]


def rope_append(
    qkv: Tensor,
    rope: Rope,
    k_rows: Tensor,
    v_rows: Tensor,
    rows: slice | Tensor,
    scored: tuple[Tensor, Segments] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As the reference, in one launch."""
    if not supported(qkv, k_rows, v_rows, *(scored or ())[:1]):
        return reference.rope_append(qkv, rope, k_rows, v_rows, rows, scored)
    assert k_rows.shape == v_rows.shape
    assert k_rows.shape[2] == qkv.shape[2]
    assert k_rows.is_contiguous()
    assert v_rows.is_contiguous()
    target, heads = (k_rows, v_rows, *row_target(rows)), k_rows.shape[1]
    return _launch(qkv, rope, qkv.shape[1] - 2 * heads, heads, target, scored)


def row_logits(q: Tensor, k: Tensor, segments: Segments) -> Tensor:
    """As the reference, in one launch for all segments. The kernel reads heads in two halves."""
    if not supported(q, k) or k.shape[2] % 2:
        return reference.row_logits(q, k, segments)
    _, logits = _launch(k, None, 0, k.shape[1], scored=(q.contiguous(), segments))
    assert logits is not None
    return logits


def _launch(
    x: Tensor,
    rope: Rope | None,
    query_heads: int,
    heads: int,
    target: tuple[object, ...] = (None, None, None, 0),
    scored: tuple[Tensor, Segments] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Launches the kernel for x [T, HQ + …, D], the heads of q, then `heads` of k, then those of v.

    Only the second half of each table is read: the first repeats it.

    Returns:
        q [T, HQ, D], and the logits; None without `scored`.
    """
    rows, all_heads, width = x.shape
    assert x.stride()[1:] == (width, 1)
    tables = (None, None) if rope is None else (rope.cos, rope.sin)
    for table in tables:
        assert table is None or (table.shape == (rows, 1, width) and table.is_contiguous())
    scores: tuple[Tensor | None, ...] = (None, None, None)
    q, count, group = x.new_empty(rows, query_heads, width), 1, 1
    if scored is not None:
        query, segments = scored
        assert query.is_contiguous()
        assert query.shape[::2] == (len(segments.lengths), width)
        assert rows == sum(segments.lengths)
        count, group = len(query), query.shape[1] // heads
        scores = (query, segments.cu_seqlens, x.new_empty(rows, query.shape[1]))
    block_n, block_d = tile_shape(width // 2)
    # Half the rows of a plain tile, since a program loads both halves of x and two fp32 tables.
    block_n = max(block_n // 2, 1)
    sizes = {"HEADS": all_heads, "HQ": query_heads, "H": heads, "G": group, "HALF": width // 2}
    sizes |= {"BLOCK_N": block_n, "BLOCK_D": block_d}
    grid, numbers = (triton.cdiv(rows * all_heads, block_n),), (rows * all_heads, count)
    pointers = (x, *tables, q, *target, *scores)
    launch(_rope_kernel, grid, *pointers, width**-0.5, x.stride(0), *numbers, **sizes)
    return q, scores[2]
