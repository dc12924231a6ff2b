"""Helpers shared by the launchers: which tensors have a kernel, tile sizes, and the launch itself.

Kernels list the numbers that change from call to call in `do_not_specialize`. Otherwise Triton
would compile another variant for the value 1 and for multiples of 16, in the middle of an answer.
"""

import math
from functools import lru_cache

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A wider head does not fit into registers.
MAX_HEAD_DIM = 256
# Elements of a tile that is read once and written once. With four warps a thread holds 32 of them:
# in fp32 a quarter of the registers that it may use without spilling, loaded 16 bytes at a time.
TILE = 4096


def supported(*tensors: Tensor) -> bool:
    """Whether kernels take these tensors; if not, a launcher calls the reference.

    The tensors must share one of `DTYPES`.
    """
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(x.dtype == dtype for x in tensors)


def supported_heads(*tensors: Tensor) -> bool:
    """As `supported`, for attention: the last axis of the tensors is a head."""
    return supported(*tensors) and all(x.shape[-1] <= MAX_HEAD_DIM for x in tensors)


def tile_shape(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile that spans all columns and has about `TILE` elements.

    It does not depend on the number of rows: few rows would need variants of their own.
    """
    width = triton.next_power_of_2(columns)
    return max(TILE // width, 1), width


def row_target(rows: slice | Tensor) -> tuple[Tensor | None, int]:
    """Target rows as a kernel takes them: (row indices, 0), or (None, first row) for a slice."""
    return (None, rows.start) if isinstance(rows, slice) else (rows, 0)


def reads_shared_operands() -> bool:
    """Whether this is an NVIDIA GPU whose tensor cores read operands from shared memory.

    Hopper and datacenter Blackwell do (sm_90 to sm_119). Consumer Blackwell, sm_120, has the newer
    number but the older tensor cores, which read operands from registers.
    """
    if triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and 90 <= target.arch < 120


def launch(
    kernel: triton.KernelInterface, grid: tuple[int, ...], *args: object, **options: object
) -> None:
    """Launches a kernel unless the grid is empty, which CUDA would reject."""
    if math.prod(grid):
        # Explicit because Triton 3.10 changes the default. torch's own kernels fuse as well.
        kernel[grid](*args, enable_fp_fusion=True, **options)


@lru_cache
def counters(count: int, device: torch.device) -> Tensor:
    """int32 [count] that are 0 between launches, for programs that combine their partial sums.

    They are shared by all calls, so calls must not overlap on two streams of a device.
    """
    return torch.zeros(count, dtype=torch.int32, device=device)
