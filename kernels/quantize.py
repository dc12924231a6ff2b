"""Weight-only quantisation to int8 or int4, so that decoding reads 1/2 or 1/4 of the bytes.

int8 has one scale per row: w = q·s with q in -127…127. int4 has a scale and a zero point per group
of 64 columns of a row: w = (q - 8)·s + z with q in 0…15. Weights are rounded to the nearest level
without calibration; activations and accumulation keep their dtype.

The products are torch operations that are not public and that are fast for few rows only. For many
rows, int8 goes through a dense copy of the matrix; int4 cannot, because its packed layout has no
cheap inverse.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglimpse.errors import UsageError

MODES = ("int8", "int4")
GROUP = 64
# The number of rows up to which the int8 product beats a dense copy and a dense product (Zen 4).
MAX_INT8_ROWS = 16
# Rows of a matrix that are quantised at a time, to bound the memory of fp32 intermediates.
CHUNK_ROWS = 4096
# torch's int4 layout for a GPU has tiles of 16 × INNER_K_TILES columns; 4 make a tile one group.
INNER_K_TILES = 4
_OPERATIONS = {
    ("int8", "cpu"): ("_weight_int8pack_mm",),
    ("int8", "cuda"): ("_weight_int8pack_mm",),
    ("int4", "cpu"): ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"),
    ("int4", "cuda"): ("_convert_weight_to_int4pack", "_weight_int4pack_mm"),
}


class Levels(NamedTuple):
    """A quantised matrix before it is packed.

    Attributes:
        q: [out, in], int8 in mode int8, int32 in mode int4.
        scales: [out] in mode int8; [in / 64, out, 2] in mode int4, the scale and the zero point.
    """

    q: Tensor
    scales: Tensor


def check_supported(mode: str, device: torch.device, dtype: torch.dtype) -> None:
    """Checks that matrices of a mode can be used on a device.

    Raises:
        UsageError: the mode is unknown, torch lacks an operation for it on this device, or the
            operation does not take this dtype.
    """
    if mode not in MODES:
        raise UsageError(f"quantize must be one of {', '.join(MODES)}, got '{mode}'")
    names = _OPERATIONS.get((mode, device.type), ())
    if not names or not all(_is_registered(name, device.type.upper()) for name in names):
        raise UsageError(
            f"quantize {mode} needs an operation that torch {torch.__version__} does not have "
            f"on {device.type}; leave quantize out, or use another torch or device"
        )
    if mode == "int4" and device.type == "cuda" and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(f"quantize int4 needs dtype bfloat16 on cuda, got {name}")


def _is_registered(name: str, key: str) -> bool:
    known = hasattr(torch.ops.aten, name)
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


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


def quantize(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Quantises and packs a matrix for `QUANTIZED_LINEAR[mode]`.

    Args:
        weight: [out, in], out a multiple of 16 and in a multiple of 64.
        mode: one of `MODES`.

    Returns:
        The packed integers, int8 [out, in] or int4 in torch's layout for the device, and the
        scales as in `Levels`.
    """
    packed, scales = [], []
    for rows in weight.split(CHUNK_ROWS):
        levels = quantize_levels(rows, mode)
        packed.append(levels.q if mode == "int8" else _pack_int4(levels.q))
        scales.append(levels.scales)
    return torch.cat(packed), torch.cat(scales, dim=int(mode == "int4"))


def _pack_int4(q: Tensor) -> Tensor:
    if q.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return torch.ops.aten._convert_weight_to_int4pack(pack_nibbles(q), INNER_K_TILES)


def pack_nibbles(q: Tensor) -> Tensor:
    """Packs neighbouring columns into bytes, int32 [out, in] -> uint8 [out, in / 2].

    The even column is the high nibble, as torch's int4 layout for a GPU requires.
    """
    return (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)


def linear_int8(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """x Wᵀ + b for a matrix that `quantize` packed in mode int8, [T, in] -> [T, out]."""
    if len(x) > MAX_INT8_ROWS:
        out = F.linear(x, weight.to(x.dtype)).mul_(scales)
    else:
        out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight, scales)
    return out if bias is None else out.add_(bias)


def linear_int4(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """x Wᵀ + b for a matrix that `quantize` packed in mode int4, [T, in] -> [T, out]."""
    aten = torch.ops.aten
    on_cpu = x.device.type == "cpu"
    matmul = aten._weight_int4pack_mm_for_cpu if on_cpu else aten._weight_int4pack_mm
    out = matmul(x.contiguous(), weight, GROUP, scales)
    return out if bias is None else out.add_(bias)


QUANTIZED_LINEAR: dict[str, Callable[..., Tensor]] = {"int8": linear_int8, "int4": linear_int4}
