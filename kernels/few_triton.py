"""Products of few rows in one launch each, bound by the bytes of the matrix.

A program makes a few columns of the result for all rows. Rows are padded to the least that tensor
cores take: their work hides behind the loads.
"""

from collections.abc import Callable

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import few as reference
from .launch import launch, served

# The least side of `tl.dot`; and few columns a program make many programs: 224 for a matrix of 7B
# with 3584 rows, on chips of about 130 multiprocessors.
ROWS = COLUMNS = 16
# In four stages such blocks take 24 KiB of shared memory, 36 with a gate: several programs share a
# multiprocessor, each with loads ahead.
BLOCK_K, STAGES = 128, 4


@triton.jit(do_not_specialize=["B", "N"])
def _few_rows_kernel(
    x,  # [B, K]
    weight,  # [N, K]; twice N if gated, the gate first
    norm,  # [K], or None: x is taken as it is
    added,  # [B, N], or None: a residual, or a bias whose stride is 0
    out,  # [B, N]
    eps,
    stride_x,
    stride_added,
    B,
    N,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW: tl.constexpr,  # K, rounded up to a power of two
):
    o_n, o_b = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_B)
    m_n, m_b = o_n < N, o_b < B
    dtype = x.dtype.element_ty
    b_scale = tl.full([BLOCK_B], 1.0, tl.float32)
    if norm is not None:
        o_row = tl.arange(0, ROW)
        for b in range(0, B):
            b_row = tl.load(x + b * stride_x + o_row, o_row < K, 0.0).to(tl.float32)
            b_scale = tl.where(o_b == b, tl.rsqrt(tl.sum(b_row * b_row, 0) / K + eps), b_scale)
    p_w = weight + o_n.to(tl.int64)[:, None] * K
    p_x = x + o_b.to(tl.int64)[None, :] * stride_x
    b_acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    b_up = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_w = m_n[:, None] & (o_k < K)[None, :]
        b_x = tl.load(p_x + o_k[:, None], (o_k < K)[:, None] & m_b[None, :], 0.0)
        if norm is not None:
            # Rounded in between, as the norm alone does.
            b_norm = tl.load(norm + o_k, o_k < K, 0.0)
            b_x = ((b_x.to(tl.float32) * b_scale[None, :]).to(dtype) * b_norm[:, None]).to(dtype)
        b_w = tl.load(p_w + o_k[None, :], m_w, 0.0)  # [BLOCK_N, BLOCK_K]
        b_acc = tl.dot(b_w, b_x, b_acc, input_precision="ieee")
        if GATED:
            b_w = tl.load(p_w + N.to(tl.int64) * K + o_k[None, :], m_w, 0.0)
            b_up = tl.dot(b_w, b_x, b_up, input_precision="ieee")
    if GATED:
        b_acc = b_acc * tl.sigmoid(b_acc) * b_up
    row, m_out = o_b.to(tl.int64)[None, :], m_n[:, None] & m_b[None, :]
    if added is not None:
        b_acc += tl.load(added + row * stride_added + o_n[:, None], m_out, 0.0).to(tl.float32)
    tl.store(out + row * N + o_n[:, None], b_acc.to(dtype), m_out)


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    product: Callable = F.linear,
) -> Tensor:
    """As the reference, in one launch for up to 16 rows.

    What no layer of the decoder asks for is left to the reference: a bias with a gate or a residual
    sum.
    """
    others = [y for y in (bias, norm and norm[0], residual) if y is not None]
    plain = bias is None or not (gated or residual is not None)
    if len(x) > ROWS or product is not F.linear or not plain or not served(x, weight, *others):
        return reference.few_rows(x, weight, bias, norm, gated, residual, product)
    (rows, inner), outer = x.shape, len(weight) // (1 + gated)
    assert weight.shape == (outer * (1 + gated), inner)
    assert x.stride(1) == 1
    for y, shape in (
        (weight, weight.shape),
        (bias, weight.shape[:1]),
        (norm and norm[0], (inner,)),
        (residual, (rows, outer)),
    ):
        assert y is None or (y.shape == shape and y.is_contiguous())
    out, added = x.new_empty(rows, outer), residual if bias is None else bias.expand(rows, -1)
    launch(
        _few_rows_kernel,
        (triton.cdiv(outer, COLUMNS),) if rows else (0,),
        x,
        weight,
        norm and norm[0],
        added,
        out,
        norm[1] if norm else 0.0,
        x.stride(0),
        0 if added is None else added.stride(0),
        rows,
        outer,
        K=inner,
        GATED=gated,
        BLOCK_B=ROWS,
        BLOCK_N=COLUMNS,
        # Twice the bytes, a half of the columns.
        BLOCK_K=BLOCK_K * 2 // x.element_size(),
        ROW=triton.next_power_of_2(inner),
        num_warps=4,
        num_stages=STAGES,
    )
    return out
