"""Linear layers on x86 CPUs, optionally with the matrix packed into oneDNN's own layout.

For many rows, torch multiplies dense fp32 matrices through a library that is a fifth to a half
slower than oneDNN on some CPUs, and in every dtype it repacks a dense matrix in each call. For a
single row and a small matrix the packed product is the slower one, so the decoder packs only its
large matrices.

`skinny_linear` is a product of few rows, fused with the operations around it in a decode step, of
which `swiglu` is one.
"""

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoglimpse.kernels.reference.norm import rms_norm

# On a Zen 4 core oneDNN reads a bf16 matrix a tenth faster for five rows than for one.
MIN_BF16_ROWS = 5


def pack(weight: Tensor) -> Tensor:
    """Converts a matrix to oneDNN's layout, which only `linear` can read.

    Args:
        weight: [out, in], on a CPU.

    Returns:
        The packed matrix, or `weight` itself if this CPU or this torch has no such layout.
    """
    if not _can_pack(weight.dtype):
        return weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return nn.Parameter(packed, requires_grad=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. No gradient flows through a packed matrix.

    Args:
        x: [T, in].
        weight: [out, in], dense or from `pack`.
        bias: [out] or None.

    Returns:
        [T, out]
    """
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    matmul = torch.ops.mkldnn._linear_pointwise
    if x.dtype == torch.bfloat16 and len(x) == 1:
        return matmul(x.expand(MIN_BF16_ROWS, -1), weight, bias, "none", [], "")[:1]
    return matmul(x, weight, bias, "none", [], "")


def _can_pack(dtype: torch.dtype) -> bool:
    # The operations that `pack` and `linear` call are not public and may be missing.
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    matmul: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    """RMSNorm, x Wᵀ + b, SwiGLU and residual sum, in this order; all but the product are optional.

    Args:
        x: [B, in].
        weight: [out, in], or a packed or quantised matrix that `matmul` reads.
        bias: [out] or None.
        norm: weight [in] and eps of an RMSNorm that is applied to x first.
        gated: whether to apply SwiGLU to the product, whose first half is the gate.
        residual: [B, out], or [B, out / 2] if gated; added to the result.
        matmul: computes the product from x, weight and bias. A kernel replaces `F.linear` only.

    Returns:
        [B, out], or [B, out / 2] if gated.
    """
    if norm is not None:
        x = rms_norm(x, *norm)
    x = matmul(x, weight, bias)
    if gated:
        x = swiglu(x)
    return x if residual is None else x.add_(residual)


def swiglu(x: Tensor) -> Tensor:
    """SwiGLU (arXiv 2002.05202): silu(gate) · up for x = [gate | up] along the last axis.

    Args:
        x: [..., 2I].

    Returns:
        [..., I]
    """
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)
