"""Weight-only quantisation to int8 or int4, so that decoding reads 1/2 or 1/4 of the bytes.

int8 has one scale per row: w = q·s with q in -127…127. int4 has a scale and a zero point per group
of 64 columns of a row: w = (q - 8)·s + z with q in 0…15. Weights are rounded to the nearest level
without calibration; activations and accumulation keep their dtype.

On a CPU the products are torch operations that are not public and that are fast for few rows only.
For many rows, int8 goes through a dense copy of the matrix; int4 cannot, because its packed layout
has no cheap inverse. Kernels read the layout of `reference.dequantize`: the op `skinny_linear`
expands it in registers, and a product of many rows goes through a dense copy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.dequantize import GROUP
from nanoglimpse.kernels.reference.dequantize import dequantize as plain_dequantize

MODES = ("int8", "int4")
# The number of rows up to which the int8 product beats a dense copy and a dense product (Zen 4).
MAX_INT8_ROWS = 16
# Rows of a matrix that are quantised at a time, to bound the memory of fp32 intermediates.
CHUNK_ROWS = 4096
# What torch needs on a CPU.
_OPERATIONS = {
    "int8": ("_weight_int8pack_mm",),
    "int4": ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"),
}


class Levels(NamedTuple):
    """A quantised matrix before it is packed.

    Attributes:
        q: [out, in], int8 in mode int8, int32 in mode int4.
        scales: [out] in mode int8; [in / 64, out, 2] in mode int4, the scale and the zero point.
    """

    q: Tensor
    scales: Tensor


def check_supported(mode: str, device: torch.device, ops: Ops) -> None:
    """Checks that matrices of a mode can be used on a device.

    Raises:
        UsageError: the mode is unknown, torch lacks an operation for it on this CPU, or the device
            is a GPU and `ops` would expand every matrix in every step.
    """
    if mode not in MODES:
        raise UsageError(f"quantize must be one of {', '.join(MODES)}, got '{mode}'")
    if has_kernels(ops):
        return
    if device.type != "cpu":
        raise UsageError(f"quantize {mode} on {device.type} needs backend triton")
    if not all(_is_registered(name) for name in _OPERATIONS[mode]):
        raise UsageError(
            f"quantize {mode} needs an operation that torch {torch.__version__} does not have "
            f"on {device.type}; leave quantize out, or use another torch"
        )


def has_kernels(ops: Ops) -> bool:
    """Whether the products of few rows read quantised matrices in the layout of `dequantize`."""
    return ops.dequantize is not plain_dequantize


def _is_registered(name: str) -> bool:
    known = hasattr(torch.ops.aten, name)
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU")


def fits(rows: int, columns: int) -> bool:
    """Whether a matrix has a size that the quantised products support."""
    return rows % 16 == 0 and columns % GROUP == 0


def quantize_levels(weight: Tensor, mode: str) -> Levels:
    """Rounds a matrix [out, in] to integers, with scales in the dtype of the matrix."""
    wide, dtype = weight.float(), weight.dtype
    if mode == "int8":
        scales = (wide.abs().amax(1) / 127).clamp_min(1e-6).to(dtype)
        q = (wide / scales.float()[:, None]).round().clamp(-127, 127)
        return Levels(q.to(torch.int8), scales)
    groups = wide.unflatten(1, (-1, GROUP))  # [out, in / 64, 64]
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # Levels are computed from the scale and the zero point as they are stored. With the unrounded
    # ones, the rounding of the scales would add to the rounding of the weights.
    scale = ((high - low) / 15).clamp_min(1e-6).to(dtype)
    zero = (low + 8 * scale.float()).to(dtype)
    q = ((groups - zero.float()) / scale.float()).round().add(8).clamp(0, 15)
    return Levels(q.int().flatten(1), torch.cat((scale, zero), -1).transpose(0, 1).contiguous())


def quantize(weight: Tensor, mode: str, ops: Ops) -> tuple[Tensor, "QuantizedMatmul"]:
    """Quantises and packs a matrix.

    Args:
        weight: [out, in], out a multiple of 16 and in a multiple of 64.
        mode: one of `MODES`.
        ops: what will multiply by it.

    Returns:
        The packed integers, and the product of rows with them.
    """
    ours = has_kernels(ops)
    packed, scales = [], []
    for rows in weight.split(CHUNK_ROWS):
        levels = quantize_levels(rows, mode)
        if mode == "int4":
            levels = pack_pairs(levels) if ours else _pack_int4(levels)
        packed.append(levels.q)
        scales.append(levels.scales)
    together = torch.cat(scales, dim=int(mode == "int4" and not ours))
    return torch.cat(packed), QuantizedMatmul(mode, together, ops.dequantize if ours else None)


def _pack_int4(levels: Levels) -> Levels:
    return Levels(torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.q, 1), levels.scales)


def pack_pairs(levels: Levels) -> Levels:
    """int4 levels in the layout of `reference.dequantize`."""
    pad = -levels.q.shape[1] % (2 * GROUP)
    low, high = F.pad(levels.q, (0, pad)).unflatten(1, (-1, 2, GROUP)).unbind(2)
    scales = F.pad(levels.scales.transpose(0, 1), (0, 0, 0, pad // GROUP))
    return Levels((high << 4 | low).to(torch.uint8).flatten(1), scales.contiguous())


@dataclass(frozen=True)
class QuantizedMatmul:
    """x Wᵀ + b for a matrix that `quantize` packed.

    Attributes:
        mode: one of `MODES`.
        scales: as in `Levels`, or in the layout of `reference.dequantize`.
        dequantize: the op of that name; None if the matrix is in torch's layout for a CPU.
    """

    mode: str
    scales: Tensor
    dequantize: Callable[[Tensor, Tensor, int], Tensor] | None

    @property
    def bits(self) -> int:
        """Bits of a level."""
        return 8 if self.mode == "int8" else 4

    def with_ops(self, ops: Ops) -> "QuantizedMatmul":
        """The same product with the operation of another table, where it uses one."""
        return self if self.dequantize is None else replace(self, dequantize=ops.dequantize)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[T, in] -> [T, out]"""
        if self.dequantize is not None:
            return F.linear(x, self.dequantize(weight, self.scales, x.shape[1]), bias)
        if self.mode == "int4":
            mm = torch.ops.aten._weight_int4pack_mm_for_cpu
            out = mm(x.contiguous(), weight, GROUP, self.scales)
        elif len(x) > MAX_INT8_ROWS:
            out = F.linear(x, weight.to(x.dtype)).mul_(self.scales)
        else:
            out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, self.scales)
        return out if bias is None else out.add_(bias)
