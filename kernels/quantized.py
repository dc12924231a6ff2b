"""Matrices of 8 or 4 bits, for decoding: a token then reads a half or a quarter of them.

int8 has a scale for each row, w = q·s with q in -127…127. int4 has a scale and a zero for every 64
columns of a row, w = (q - 8)·s + z with q in 0…15. Rounding is to the nearest level, without
calibration; activations and sums stay as they are. The products are torch's own operations, which
are not public. Both are made for few rows: many go through a dense copy of an int8 matrix, while
int4 has no cheap way back from its layout.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError

KINDS = ("int8", "int4")
GROUP = 64
# Rows up to which the int8 product beats a dense copy and a dense product, on a Zen 4 core.
FEW_ROWS = 16
# Rows quantised at a time, so that the fp32 numbers on the way stay small.
CHUNK = 4096
# Of torch's layouts of int4 on a GPU the one whose rows are whole groups.
INNER_TILES = 4
_OPERATIONS = {
    ("int8", "cpu"): ("_weight_int8pack_mm",),
    ("int8", "cuda"): ("_weight_int8pack_mm",),
    ("int4", "cpu"): ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"),
    ("int4", "cuda"): ("_convert_weight_to_int4pack", "_weight_int4pack_mm"),
}


class Levels(NamedTuple):
    """A matrix as integers.

    Attributes:
        q: [out, in], int8 for int8, int32 for int4.
        scales: [out] for int8; [in / 64, out, 2] for int4, scale and zero side by side.
    """

    q: Tensor
    scales: Tensor


def check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UsageError where matrices of this kind cannot be used."""
    if kind not in KINDS:
        raise UsageError(f"unknown quantize '{kind}'; use {' or '.join(KINDS)}")
    names = _OPERATIONS.get((kind, device.type), ())
    if not names or not all(_exists(name, device.type.upper()) for name in names):
        raise UsageError(
            f"quantize {kind} needs an operation that torch {torch.__version__} "
            f"does not have on {device.type}; leave it out, or use another torch or device"
        )
    if kind == "int4" and device.type == "cuda" and dtype != torch.bfloat16:
        raise UsageError("quantize int4 computes in bfloat16 on cuda; use dtype bfloat16")


def _exists(name: str, key: str) -> bool:
    known = hasattr(torch.ops.aten, name)
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def fits(rows: int, columns: int) -> bool:
    """Whether the operations take a matrix of this size."""
    return rows % 16 == 0 and columns % GROUP == 0


def levels(weight: Tensor, kind: str) -> Levels:
    """The nearest integers to a matrix [out, in], with scales in its dtype."""
    wide, dtype = weight.float(), weight.dtype
    if kind == "int8":
        scales = (wide.abs().amax(1) / 127).clamp_min(1e-6).to(dtype)
        q = (wide / scales.float()[:, None]).round().clamp(-127, 127)
        return Levels(q.to(torch.int8), scales)
    groups = wide.unflatten(1, (-1, GROUP))  # [out, in / 64, 64]
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # Integers for the scale and the zero as they are stored, or their rounding would add to theirs.
    scale = ((high - low) / 15).clamp_min(1e-6).to(dtype)
    zero = (low + 8 * scale.float()).to(dtype)
    q = ((groups - zero.float()) / scale.float()).round().add(8).clamp(0, 15)
    return Levels(q.int().flatten(1), torch.cat((scale, zero), -1).transpose(0, 1).contiguous())


def dequantize(matrix: Levels) -> Tensor:
    """The matrix [out, in] that integers and scales stand for, fp32."""
    q, scales = matrix.q.float(), matrix.scales.float()
    if scales.ndim == 1:
        return q * scales[:, None]
    scale, zero = scales.transpose(0, 1).unsqueeze(-2).unbind(-1)  # [out, in / 64, 1] each
    return ((q.unflatten(1, (-1, GROUP)) - 8) * scale + zero).flatten(1)


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What `PRODUCTS[kind]` takes for a matrix.

    Args:
        weight: [out, in], out a multiple of 16 and in of 64.
        kind: of KINDS.

    Returns:
        The packed integers, int8 [out, in] or int4 in a layout of torch's own for the device, and
        the scales of `Levels`.
    """
    packed, scales = [], []
    for rows in weight.split(CHUNK):
        matrix = levels(rows, kind)
        packed.append(matrix.q if kind == "int8" else _pack4(matrix.q))
        scales.append(matrix.scales)
    return torch.cat(packed), torch.cat(scales, dim=int(kind == "int4"))


def _pack4(q: Tensor) -> Tensor:
    if q.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return torch.ops.aten._convert_weight_to_int4pack(pairs(q), INNER_TILES)


def pairs(q: Tensor) -> Tensor:
    """Two neighbours in a byte, the first one high: int32 [out, in] -> uint8 [out, in / 2]."""
    return (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)


def linear_int8(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """x Wᵀ + b, x [T, in] -> [T, out], for `quantize`'s int8."""
    if len(x) > FEW_ROWS:
        out = F.linear(x, weight.to(x.dtype)).mul_(scales)
    else:
        out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scales)
    return out if bias is None else out.add_(bias)


def linear_int4(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """x Wᵀ + b, x [T, in] -> [T, out], for `quantize`'s int4."""
    aten = torch.ops.aten
    on_cpu = x.device.type == "cpu"
    product = aten._weight_int4pack_mm_for_cpu if on_cpu else aten._weight_int4pack_mm
    out = product(x.contiguous(), weight, GROUP, scales)
    return out if bias is None else out.add_(bias)


PRODUCTS = {"int8": linear_int8, "int4": linear_int4}
