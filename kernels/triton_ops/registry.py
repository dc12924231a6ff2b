"""The launchers of the Triton kernels as `Ops`. Importing this module imports Triton."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import triton

from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.triton_ops.attention import attention
from nanoglimpse.kernels.triton_ops.attention_colsum import attention_colsum
from nanoglimpse.kernels.triton_ops.decode_attention import decode_attention
from nanoglimpse.kernels.triton_ops.dequantize import dequantize
from nanoglimpse.kernels.triton_ops.gather import gather
from nanoglimpse.kernels.triton_ops.linear import skinny_linear
from nanoglimpse.kernels.triton_ops.norm import add_rms_norm, rms_norm
from nanoglimpse.kernels.triton_ops.rope import rope_append, rotate
from nanoglimpse.kernels.triton_ops.swiglu import swiglu

P = ParamSpec("P")
R = TypeVar("R")


def on_device_of(launcher: Callable[P, R]) -> Callable[P, R]:
    """Makes the device of the first argument current during a call: Triton launches on it."""

    @wraps(launcher)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return launcher(*args, **kwargs)

    return call


TRITON = replace(
    TORCH,
    attention=on_device_of(attention),
    decode_attention=on_device_of(decode_attention),
    gather=on_device_of(gather),
    rms_norm=on_device_of(rms_norm),
    add_rms_norm=on_device_of(add_rms_norm),
    rotate=on_device_of(rotate),
    rope_append=on_device_of(rope_append),
    attention_colsum=on_device_of(attention_colsum),
    swiglu=on_device_of(swiglu),
    dequantize=on_device_of(dequantize),
    skinny_linear=on_device_of(skinny_linear),
    graph_safe=True,
)


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on this device: on a GPU, or anywhere in Triton's interpreter."""
    return device.type == "cuda" or triton.knobs.runtime.interpret
