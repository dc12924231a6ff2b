"""A fused linear layer for few rows in one launch, bound by reading the matrix.

Each program computes a few columns of the result for all rows. Rows are padded to the smallest tile
of the tensor cores, whose work is hidden by the loads.
"""

from collections.abc import Callable

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import linear as reference
from nanoglimpse.kernels.triton_ops.launch import launch, supported

# The smallest side that `tl.dot` takes. Few columns per program make many programs: 224 for the
# matrices of 7B with 3584 output columns, on GPUs with about 130 multiprocessors.
MAX_ROWS = BLOCK_N = 16
# In four stages these blocks take 24 KiB of shared memory, or 36 with a gate, so that several
# programs share a multiprocessor and overlap loads.
BLOCK_K, STAGES = 128, 4


@triton.jit(do_not_specialize=["B", "N"])
def _skinny_linear_kernel(
    x,  # [B, K]
    weight,  # [N, K], or [2N, K] if gated, the gate first
    norm,  # [K], or None to skip the norm
    added,  # [B, N]: a residual, or a bias with a stride of 0; None to add nothing
    out,  # [B, N]
    eps,
    stride_x,  # elements from row to row
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
            # Rounded before the weight, as in `rms_norm`.
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
    others = [y for y in (bias, norm_weight, residual) if y is not None]
    fusible = bias is None or not (gated or residual is not None)
    few, dense = len(x) <= MAX_ROWS, matmul is F.linear
    if not (few and dense and fusible and supported(x, weight, *others)):
        return reference.skinny_linear(x, weight, bias, norm, gated, residual, matmul)
    (rows, inner), outer = x.shape, len(weight) // (1 + gated)
    assert weight.shape == (outer * (1 + gated), inner)
    assert x.stride(1) == 1
    for y, shape in (
        (weight, weight.shape),
        (bias, weight.shape[:1]),
        (norm_weight, (inner,)),
        (residual, (rows, outer)),
    ):
        assert y is None or (y.shape == shape and y.is_contiguous())
    out, added = x.new_empty(rows, outer), residual if bias is None else bias.expand(rows, -1)
    launch(
        _skinny_linear_kernel,
        (triton.cdiv(outer, BLOCK_N),) if rows else (0,),
        x,
        weight,
        norm_weight,
        added,
        out,
        eps,
        x.stride(0),
        0 if added is None else added.stride(0),
        rows,
        outer,
        K=inner,
        GATED=gated,
        BLOCK_B=MAX_ROWS,
        BLOCK_N=BLOCK_N,
        # fp32 has twice the bytes, hence half the elements per step.
        BLOCK_K=BLOCK_K * 2 // x.element_size(),
        ROW=triton.next_power_of_2(inner),
        num_warps=4,
        num_stages=STAGES,
    )
    return out
