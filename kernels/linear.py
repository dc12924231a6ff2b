"""Products with a matrix; on x86 CPUs the matrix may be laid out for oneDNN beforehand.

torch's own product of dense fp32 tensors goes through a library that is a fifth to a half slower
for many rows on some CPUs, and in every dtype the layout is otherwise made anew in each call. For
one row and a small matrix it is the other way round: what decodes stays dense.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN reads a bf16 matrix a tenth faster for so many rows than for one, on a Zen 4 core.
SEVERAL = 5


def pack(weight: Tensor) -> Tensor:
    """The matrix in oneDNN's own layout, opaque to all but `linear`; dense where it has none.

    Args:
        weight: [out, in], on a CPU.
    """
    if not _packs(weight.dtype):
        return weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return nn.Parameter(packed, requires_grad=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b; with a packed matrix no gradient flows.

    Args:
        x: [T, in].
        weight: [out, in], dense or from `pack`.
        bias: [out] or None.

    Returns:
        [T, out]
    """
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    product = torch.ops.mkldnn._linear_pointwise
    if x.dtype == torch.bfloat16 and len(x) == 1:
        return product(x.expand(SEVERAL, -1), weight, bias, "none", [], "")[:1]
    return product(x, weight, bias, "none", [], "")


def _packs(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have what `linear` calls, which is not public."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported()
    return dtype == torch.float32
