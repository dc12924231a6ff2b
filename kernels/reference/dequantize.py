"""Dense matrices from quantised ones, in the layout that the Triton kernels read.

The layout of `quantize` on a CPU is torch's own, which this does not read.
"""

import torch
from torch import Tensor

# Columns of a row that share a scale and a zero point in int4.
GROUP = 64


def dequantize(weight: Tensor, scales: Tensor, columns: int) -> Tensor:
    """The matrix [out, in] that levels and scales represent, in the dtype of the scales.

    Args:
        weight: int8 [out, in]; or uint8 [out, ⌈in / 128⌉ · 64], where a run of 64 bytes holds the
            int4 of one group in its low nibbles, and those of the next group in its high nibbles.
        scales: [out] in int8; [out, ⌈in / 128⌉ · 2, 2] in int4, the scale and the zero point of
            each group, w = (q - 8)·s + z. Both are 0 in a group beyond the last column.
        columns: in.
    """
    wide = scales.to(torch.promote_types(scales.dtype, torch.float32))
    if weight.dtype == torch.int8:
        return (weight * wide[:, None]).to(scales.dtype)
    pairs = weight.unflatten(1, (-1, 1, GROUP))
    q = torch.cat((pairs & 15, pairs >> 4), 2).flatten(1, 2)  # [out, groups, 64]
    scale, zero = wide.unsqueeze(2).unbind(-1)  # [out, groups, 1] each
    return ((q.to(wide.dtype) - 8) * scale + zero).flatten(1)[:, :columns].to(scales.dtype)
