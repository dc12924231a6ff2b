"""Dense matrices from quantised ones in one launch, for products of many rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import dequantize as reference
from nanoglimpse.kernels.reference.dequantize import GROUP
from nanoglimpse.kernels.triton_ops.launch import launch, supported

BLOCK_N = 32


@triton.jit
def dequantize_group(b_q, b_word, half: tl.constexpr, dtype: tl.constexpr):
    """One of the two groups of a block of int4 pairs, [BLOCK_N, 64].

    Args:
        b_q: uint8 [BLOCK_N, 64].
        b_word: [BLOCK_N], as of `as_words`.
        half: 0 for the low nibbles, 1 for the high ones.
        dtype: of the result.
    """
    if dtype == tl.float32:
        b_scale = b_word.to(tl.int32).to(tl.float32, bitcast=True)
        b_zero = (b_word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        b_scale = b_word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        b_zero = (b_word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    b_q = (b_q >> 4) if half else (b_q & 15)
    return ((b_q.to(tl.float32) - 8.0) * b_scale[:, None] + b_zero[:, None]).to(dtype)


def as_words(scales: Tensor) -> Tensor:
    """Scale and zero point of a group as one integer, which is copied whole: [out, groups]."""
    return scales.view(torch.int64 if scales.element_size() == 4 else torch.int32)[..., 0]


@triton.jit(do_not_specialize=["N"])
def _dequantize_kernel(
    weight,
    scales,
    out,
    N,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    o_n, block = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    m_n, row = (o_n < N)[:, None], o_n.to(tl.int64)[:, None]
    dtype = out.dtype.element_ty
    BLOCKS: tl.constexpr = (K + 2 * GROUP - 1) // (2 * GROUP)
    if BITS == 4:
        o_q = block * GROUP + tl.arange(0, GROUP)
        b_q = tl.load(weight + row * BLOCKS * GROUP + o_q[None, :], m_n, 0)
    for half in tl.static_range(2):
        o_k = (2 * block + half) * GROUP + tl.arange(0, GROUP)
        mask = m_n & (o_k < K)[None, :]
        if BITS == 4:
            b_word = tl.load(scales + o_n * 2 * BLOCKS + 2 * block + half, o_n < N, 0)
            b_w = dequantize_group(b_q, b_word, half, dtype)
        else:
            b_scale = tl.load(scales + o_n, o_n < N, 0.0).to(tl.float32)
            b_w = tl.load(weight + row * K + o_k[None, :], mask, 0).to(tl.float32)
            b_w = (b_w * b_scale[:, None]).to(dtype)
        tl.store(out + row * K + o_k[None, :], b_w, mask)


def dequantize(weight: Tensor, scales: Tensor, columns: int) -> Tensor:
    """As the reference, in one launch."""
    if not supported(scales):
        return reference.dequantize(weight, scales, columns)
    assert weight.is_contiguous()
    assert scales.is_contiguous()
    is_int8 = weight.dtype == torch.int8
    out = scales.new_empty(len(weight), columns)
    grid = (triton.cdiv(len(weight), BLOCK_N), triton.cdiv(columns, 2 * GROUP))
    sizes = {"K": columns, "BITS": 8 if is_int8 else 4, "BLOCK_N": BLOCK_N, "GROUP": GROUP}
    scales = scales if is_int8 else as_words(scales)
    launch(_dequantize_kernel, grid, weight, scales, out, len(weight), **sizes)
    return out
