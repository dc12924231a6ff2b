"""RMSNorm, optionally after a residual sum. Each program holds whole rows."""

import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import norm as reference
from nanoglimpse.kernels.triton_ops.launch import launch, supported, tile_shape


@triton.jit(do_not_specialize=["T"])
def _rms_norm_kernel(
    x,
    residual,  # [T, C], or None to add nothing
    total,  # [T, C], receives the sum; None if nothing is added
    weight,
    out,
    eps,
    T,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    mask = (o_t < T)[:, None] & m_c[None, :]
    offset = o_t.to(tl.int64)[:, None] * C + o_c[None, :]
    b_x = tl.load(x + offset, mask, 0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
    if residual is not None:
        # Rounded before the norm, as in the reference: later layers read the rounded sum.
        b_sum = (b_x + tl.load(residual + offset, mask, 0.0)).to(total.dtype.element_ty)
        tl.store(total + offset, b_sum, mask)
        b_x = b_sum.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)  # [BLOCK_T]
    b_weight = tl.load(weight + o_c, m_c, 0.0)
    b_out = (b_x * b_scale[:, None]).to(out.dtype.element_ty) * b_weight[None, :]
    tl.store(out + offset, b_out, mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference, in one launch."""
    if not supported(x, weight):
        return reference.rms_norm(x, weight, eps)
    assert x.is_contiguous()
    out = x.new_empty(x.shape)
    _launch(x, None, None, weight, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference, in one launch."""
    if not supported(x, residual, weight):
        return reference.add_rms_norm(x, residual, weight, eps)
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert residual.shape == x.shape
    out = x.new_empty(x.shape)
    _launch(x, residual, x, weight, out, eps)
    return out, x


def _launch(
    x: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    out: Tensor,
    eps: float,
) -> None:
    columns = x.shape[-1]
    rows = x.numel() // columns
    assert weight.shape == (columns,)
    assert weight.is_contiguous()
    block_t, block_c = tile_shape(rows, columns)
    launch(
        _rms_norm_kernel,
        (triton.cdiv(rows, block_t),),
        x,
        residual,
        total,
        weight,
        out,
        eps,
        rows,
        C=columns,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
        num_warps=8 if block_c > 4096 else 4,
    )
