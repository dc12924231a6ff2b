"""The launchers of all Triton kernels as `Ops`; importing this imports Triton."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import torch
import triton

from .append_triton import rotate_append
from .attention_triton import attention, attention_reading
from .decode_triton import decode_attention
from .few_triton import few_rows
from .keep_triton import keep_rows
from .norm_triton import add_rms_norm, rms_norm
from .ops import TORCH
from .received_triton import received_attention
from .rope_triton import rotate
from .swiglu_triton import swiglu


def _there(launcher: Callable) -> Callable:
    """Makes the device of the first argument the current one: Triton launches there."""

    @wraps(launcher)
    def call(x, *args, **kwargs):
        with torch.cuda.device_of(x):
            return launcher(x, *args, **kwargs)

    return call


TRITON = replace(
    TORCH,
    attention=_there(attention),
    attention_reading=_there(attention_reading),
    decode_attention=_there(decode_attention),
    keep_rows=_there(keep_rows),
    rms_norm=_there(rms_norm),
    add_rms_norm=_there(add_rms_norm),
    rotate=_there(rotate),
    rotate_append=_there(rotate_append),
    received_attention=_there(received_attention),
    swiglu=_there(swiglu),
    few_rows=_there(few_rows),
    captured=True,
)


def runs_on(device: torch.device) -> bool:
    """Whether kernels run on this device: on a GPU, and anywhere in Triton's interpreter."""
    return device.type == "cuda" or triton.knobs.runtime.interpret
