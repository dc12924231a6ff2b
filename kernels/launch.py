"""What the launchers share: which tensors Triton serves, the sizes of tiles, and the launch.

Kernels name the numbers that change from call to call `do_not_specialize`: for a number that is 1
or divides by 16 Triton would compile anew, in the middle of an answer.
"""

import math

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTH = 256
# Elements of a tile that is read once and written once. With four warps that is 32 a thread, in
# fp32 a quarter of the registers that a thread may have without spilling, and 16 bytes a load.
TILE = 4096


def served(*tensors: Tensor) -> bool:
    """Whether there is a kernel for these; otherwise a launcher hands over to the reference.

    That they share one of `DTYPES` is the one condition, and of attention `served_heads` besides.
    """
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(x.dtype == dtype for x in tensors)


def served_heads(*tensors: Tensor) -> bool:
    """As `served`, for tensors whose last axis is a head: registers hold at most `WIDTH` of it."""
    return served(*tensors) and all(x.shape[-1] <= WIDTH for x in tensors)


def tile(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile of about `TILE` elements, as wide as it needs to be."""
    width = triton.next_power_of_2(columns)
    height = min(TILE // width, triton.next_power_of_2(rows))
    return max(height, 1), width


def hopper() -> bool:
    """Whether this is a GPU of NVIDIA's whose tensor cores read shared memory themselves."""
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launches, unless there is nothing to do: CUDA refuses an empty grid."""
    if math.prod(grid):
        # Said aloud because Triton 3.10 changes the default; torch's own kernels fuse as well.
        kernel[grid](*args, enable_fp_fusion=True, **options)
