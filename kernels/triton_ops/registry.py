"""The launchers of the Triton kernels as `Ops`. Importing this module imports Triton."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.triton_ops.attention import attention
from nanoglimpse.kernels.triton_ops.attention_colsum import attention_colsum
from nanoglimpse.kernels.triton_ops.decode_attention import decode_attention
from nanoglimpse.kernels.triton_ops.dequantize import dequantize
from nanoglimpse.kernels.triton_ops.gather import gather
from nanoglimpse.kernels.triton_ops.linear import skinny_linear
from nanoglimpse.kernels.triton_ops.norm import add_rms_norm, rms_norm
from nanoglimpse.kernels.triton_ops.rope import rope_append, rotate, row_logits
from nanoglimpse.kernels.triton_ops.swiglu import swiglu
from nanoglimpse.kernels.varlen import Segments

FLASH_ROWS = 512
P = ParamSpec("P")
R = TypeVar("R")


def on_device_of(launcher: Callable[P, R]) -> Callable[P, R]:
    """Makes the device of the first argument current during a call: Triton launches on it."""

    @wraps(launcher)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return launcher(*args, **kwargs)

    return call


def long_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> Tensor:
    """As the reference: the rule by which a GPU takes torch's attention or the kernel.

    torch's flash kernel takes equally long segments of at least `FLASH_ROWS` rows in half
    precision, which it is written for; windows, ragged batches, survivors, rows behind a prefix and
    heads of two widths go to the kernel. No GPU has timed the two against each other yet.
    """
    flash = (
        queries is None
        and segments.rows is None
        and len(segments.runs) == 1
        and segments.lengths[0] >= FLASH_ROWS
        and q.element_size() == 2
        and q.shape[-1] == v.shape[-1]
    )
    chosen = TORCH.attention if flash else TRITON.attention
    return chosen(q, k, v, segments, causal=causal, queries=queries)


LAUNCHERS: tuple[Any, ...] = (
    *(attention, decode_attention, gather, rms_norm, add_rms_norm, rotate, rope_append),
    *(row_logits, attention_colsum, swiglu, dequantize, skinny_linear),
)
on_devices = {launcher.__name__: on_device_of(launcher) for launcher in LAUNCHERS}
TRITON = replace(TORCH, graph_safe=True, **on_devices)
# What "auto" is on a GPU.
GPU = replace(TRITON, attention=long_attention)


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on this device: on a GPU, or anywhere in Triton's interpreter."""
    return device.type == "cuda" or triton.knobs.runtime.interpret
