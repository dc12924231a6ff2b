"""RMSNorm, optionally after a residual sum, one row per program.

With two rows of 2048 elements, Triton 3.6 spills.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import norm as reference
from nanoglimpse.kernels.triton_ops.launch import launch, supported


@triton.jit
def _rms_norm_kernel(
    x,
    residual,  # [T, C], or None to add nothing
    total,  # [T, C], receives the sum; None if nothing is added
    weight,
    out,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    offset = tl.program_id(0).to(tl.int64) * C + o_c
    b_x = tl.load(x + offset, m_c, 0.0).to(tl.float32)  # [BLOCK_C]
    if residual is not None:
        # Rounded before the norm, as in the reference: later layers read the rounded sum.
        b_sum = (b_x + tl.load(residual + offset, m_c, 0.0)).to(total.dtype.element_ty)
        tl.store(total + offset, b_sum, m_c)
        b_x = b_sum.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / C + eps)
    b_weight = tl.load(weight + o_c, m_c, 0.0)
    tl.store(out + offset, (b_x * b_scale).to(out.dtype.element_ty) * b_weight, m_c)


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
    assert weight.shape == (columns,)
    assert weight.is_contiguous()
    width = triton.next_power_of_2(columns)
    sizes = {"C": columns, "BLOCK_C": width, "num_warps": 8 if width > 4096 else 4}
    grid = (x.numel() // columns,)
    launch(_rms_norm_kernel, grid, x, residual, total, weight, out, eps, **sizes)
