"""A fused linear layer for few rows in one launch, bound by reading the matrix once.

Each program multiplies some columns of the result for all rows, over a part of the sum. Where there
is more than one part, the last program to finish adds them up, in their order. The norm costs no
pass of its own: its weight scales x on the way to the product, and the RMS, summed up meanwhile,
divides the product. A quantised matrix is expanded in registers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.quantize import QuantizedMatmul
from nanoglimpse.kernels.reference import linear as reference
from nanoglimpse.kernels.triton_ops.dequantize import as_words, dequantize_group
from nanoglimpse.kernels.triton_ops.launch import counters, launch, supported

# The smallest side that `tl.dot` takes.
MAX_ROWS = 16
# Rows of the matrix in a block, and warps, for a dense matrix and one of 8 or 4 bits. A thread must
# copy 4 bytes of the norm's weight or more: fewer are copied synchronously, and every step would
# wait for them. A block of int4 has a group of 64 columns in its low and one in its high nibbles,
# which are multiplied in turn, hence a single warp.
BLOCKS = {0: (16, 2), 8: (32, 2), 4: (16, 1)}
BLOCK_K, STAGES = 128, 4
# Bytes of the matrix that a step of all programs should read: three blocks of 4 KiB for each of the
# 132 multiprocessors of a Hopper. Three stages of them are on the way, 36 KiB a multiprocessor,
# which is more than its share of bandwidth times latency.
STEP_BYTES, MAX_SPLITS = 3 * 132 * 4096, 8


@triton.jit(do_not_specialize=["B", "N"])
def _skinny_linear_kernel(
    x,  # [B, K]
    weight,  # [N, K], or [2N, K] if gated, the gate first; quantised as in `dequantize`
    scales,  # [N] in int8, words [N, groups] in int4, or None if dense; 2N if gated
    norm,  # [K], or None to skip the norm
    added,  # [B, N]: a residual, or a bias with a stride of 0; None to add nothing
    out,  # [B, N]
    partials,  # fp32 [tiles, SPLITS, PARTIALS, B]; None with one split
    counters,  # int32 [tiles], 0 before and after each launch
    eps,
    stride_x,  # elements from row to row
    stride_added,
    B,
    N,
    K: tl.constexpr,
    BITS: tl.constexpr,  # 4, 8, or 0 if dense
    GATED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    o_n, o_b = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    m_n, m_b = o_n < N, o_b < B
    m_out = m_n[:, None] & m_b[None, :]
    dtype = x.dtype.element_ty
    # A step takes the two groups of an int4 block one after the other, and all else at once.
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    COLUMNS: tl.constexpr = BLOCK_K // HALVES
    GROUPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K * HALVES
    WIDTH: tl.constexpr = GROUPS * COLUMNS // 2 if BITS == 4 else K
    SPAN: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    p_x = x + o_b.to(tl.int64)[None, :] * stride_x
    o_w = o_n.to(tl.int64)[:, None] * WIDTH
    o_up = N.to(tl.int64) * WIDTH
    o_s = o_n * GROUPS
    b_acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    b_up = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    b_square = tl.zeros([COLUMNS, BLOCK_B], tl.float32)
    for k in range(split * SPAN, tl.minimum((split + 1) * SPAN, K), BLOCK_K):
        for half in tl.static_range(HALVES):
            o_k = k + half * COLUMNS + tl.arange(0, COLUMNS)
            m_k = o_k < K
            b_x = tl.load(p_x + o_k[:, None], m_k[:, None] & m_b[None, :], 0.0)
            if norm is not None:
                b_norm = tl.load(norm + o_k, m_k, 0.0)
                b_wide = b_x.to(tl.float32)
                b_square += b_wide * b_wide
                b_x = b_wide * b_norm.to(tl.float32)[:, None]
                # fp16 could overflow before the division; TF32 has its precision and more range.
                if dtype != tl.float16:
                    b_x = b_x.to(dtype)
            if BITS == 4:
                o_q, m_q = k // 2 + tl.arange(0, COLUMNS), m_n[:, None]
            else:
                o_q, m_q = o_k, m_n[:, None] & m_k[None, :]
            p_w, p_s = weight + o_w + o_q[None, :], scales
            if BITS == 4:
                p_s = scales + o_s + k // COLUMNS + half
            b_acc = _multiply(p_w, p_s, m_q, m_n, b_x, b_acc, half, dtype, BITS)
            if GATED:
                if BITS == 4:
                    p_s += N * GROUPS
                b_up = _multiply(p_w + o_up, p_s, m_q, m_n, b_x, b_up, half, dtype, BITS)

    b_sum = tl.sum(b_square, 0)
    if SPLITS > 1:
        PARTIALS: tl.constexpr = (1 + GATED) * BLOCK_N + 1
        o_row = tl.arange(0, BLOCK_N)[:, None] * B + o_b[None, :]
        m_row = m_b[None, :] & (o_row < BLOCK_N * B)
        p_tile = partials + tile.to(tl.int64) * SPLITS * PARTIALS * B
        p_own = p_tile + split * PARTIALS * B
        tl.store(p_own + o_row, b_acc, m_row)
        if GATED:
            tl.store(p_own + BLOCK_N * B + o_row, b_up, m_row)
        if norm is not None:
            tl.store(p_own + (PARTIALS - 1) * B + o_b, b_sum, m_b)
        # All threads must have written before one of them increments the counter.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(counters + tile, 0)
        b_acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        b_up = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
        b_sum = tl.zeros([BLOCK_B], tl.float32)
        # Loads bypass the L1 cache because other programs wrote these values.
        for part in tl.static_range(SPLITS):
            p_part = p_tile + part * PARTIALS * B
            b_acc += tl.load(p_part + o_row, m_row, 0.0, cache_modifier=".cg")
            if GATED:
                p_up = p_part + BLOCK_N * B + o_row
                b_up += tl.load(p_up, m_row, 0.0, cache_modifier=".cg")
            if norm is not None:
                p_sum = p_part + (PARTIALS - 1) * B + o_b
                b_sum += tl.load(p_sum, m_b, 0.0, cache_modifier=".cg")

    if norm is not None:
        b_rms = tl.rsqrt(b_sum / K + eps)[None, :]
        b_acc, b_up = b_acc * b_rms, b_up * b_rms
    if BITS == 8:
        b_acc *= tl.load(scales + o_n, m_n, 0.0).to(tl.float32)[:, None]
        if GATED:
            b_up *= tl.load(scales + N + o_n, m_n, 0.0).to(tl.float32)[:, None]
    if GATED:
        b_acc = b_acc * tl.sigmoid(b_acc) * b_up
    row = o_b.to(tl.int64)[None, :]
    if added is not None:
        b_acc += tl.load(added + row * stride_added + o_n[:, None], m_out, 0.0).to(tl.float32)
    tl.store(out + row * N + o_n[:, None], b_acc.to(dtype), m_out)


@triton.jit
def _multiply(
    p_w, p_s, m_q, m_n, b_x, b_acc, half: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr
):
    """Adds the product of a block of the matrix with b_x."""
    b_w = tl.load(p_w, m_q, 0)
    if BITS == 4:
        b_w = dequantize_group(b_w, tl.load(p_s, m_n, 0), half, dtype)
    b_w = b_w.to(b_x.dtype)
    if dtype == tl.float16:
        return tl.dot(b_w, b_x, b_acc, input_precision="tf32")
    return tl.dot(b_w, b_x, b_acc, input_precision="ieee")


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    matmul: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    """As the reference, in one launch for up to 16 rows.

    A bias together with a gate or a residual, which no layer of the decoder has, is computed by the
    reference.
    """
    norm_weight, eps = norm or (None, 0.0)
    bits, scales = 0, None
    if isinstance(matmul, QuantizedMatmul) and matmul.dequantize is not None:
        bits, scales = matmul.bits, matmul.scales
    others = [y for y in (bias, norm_weight, residual, scales) if y is not None]
    others += [] if bits else [weight]
    fusible = bias is None or not (gated or residual is not None)
    few, known = len(x) <= MAX_ROWS, bits or matmul is F.linear
    if not (few and known and fusible and supported(x, *others)):
        return reference.skinny_linear(x, weight, bias, norm, gated, residual, matmul)
    (rows, inner), outer = x.shape, len(weight) // (1 + gated)
    assert x.stride(1) == 1
    for y, shape in (
        (weight, (outer * (1 + gated), weight.shape[1] if bits == 4 else inner)),
        (bias, weight.shape[:1]),
        (norm_weight, (inner,)),
        (residual, (rows, outer)),
    ):
        assert y is None or (y.shape == shape and y.is_contiguous())
    # fp32 has twice the bytes, hence half the elements per step.
    block_k = BLOCK_K if bits else BLOCK_K * 2 // x.element_size()
    block_n, warps = BLOCKS[bits]
    tiles = triton.cdiv(outer, block_n)
    splits = num_splits(tiles * block_n * BLOCK_K * (bits or 16) // 8, inner, block_k)
    out, added = x.new_empty(rows, outer), residual if bias is None else bias.expand(rows, -1)
    scratch, counted = None, None
    if splits > 1:
        size = tiles * splits * ((1 + gated) * block_n + 1) * rows
        scratch = x.new_empty(size, dtype=torch.float32)
        counted = counters(triton.next_power_of_2(tiles), x.device)
    strides = x.stride(0), 0 if added is None else added.stride(0)
    words = as_words(scales) if bits == 4 and scales is not None else scales
    tensors = (x, weight, words, norm_weight, added, out, scratch, counted)
    sizes = {"BLOCK_B": MAX_ROWS, "BLOCK_N": block_n, "BLOCK_K": block_k}
    sizes |= {"num_warps": warps, "num_stages": STAGES}
    constants = {"K": inner, "BITS": bits, "GATED": gated, "SPLITS": splits}
    grid = (tiles, splits) if rows else (0,)
    launch(_skinny_linear_kernel, grid, *tensors, eps, *strides, rows, outer, **constants, **sizes)
    return out


def num_splits(step_bytes: int, inner: int, block_k: int) -> int:
    """In how many parts a sum is computed.

    It does not depend on the number of rows, which would make more variants of the kernel.

    Args:
        step_bytes: what a step of programs that do not split sums reads of the matrix.
        inner: terms of a sum.
        block_k: terms of a step.
    """
    wanted = triton.next_power_of_2(triton.cdiv(STEP_BYTES, step_bytes))
    blocks = triton.cdiv(inner, block_k)
    # No part is empty.
    return triton.cdiv(blocks, triton.cdiv(blocks, min(wanted, MAX_SPLITS)))
