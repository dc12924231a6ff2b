"""The operations of the hot path, an op a file, chosen once when a model is loaded.

The engine calls them only through the `Ops` that `select` returns, so that a model never asks
which backend runs it. The references are plain torch and run on every device.

This folder is the package nanoglimpse.kernels and has no `__init__.py` on purpose: with one, a
program started in the checkout would find it when transformers looks for the published package of
the name `kernels`, and fail.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UsageError
from .attention import attention
from .decode import decode_attention, row_logits
from .keep import keep_rows
from .linear import linear, pack
from .norm import rms_norm
from .packing import Packing
from .received import received_attention
from .rope import Rope, rotate
from .swiglu import swiglu

__all__ = ["BACKENDS", "CPU", "TORCH", "Ops", "Packing", "Rope", "select"]


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; signatures and contracts stand at the references."""

    attention: Callable
    decode_attention: Callable
    row_logits: Callable
    keep_rows: Callable
    rms_norm: Callable
    rotate: Callable
    swiglu: Callable
    received_attention: Callable
    linear: Callable
    pack: Callable


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


TORCH = Ops(
    attention=attention,
    decode_attention=decode_attention,
    row_logits=row_logits,
    keep_rows=keep_rows,
    rms_norm=rms_norm,
    rotate=rotate,
    swiglu=swiglu,
    received_attention=received_attention,
    linear=linear,
    pack=_as_it_is,
)
CPU = replace(TORCH, pack=pack)
BACKENDS = ("auto", "torch")


def select(backend: str | Ops, device: torch.device) -> Ops:
    """The operations of a backend by name: "torch" is plain torch, "auto" the fastest on `device`.

    Operations of one's own are taken as they are.

    Raises:
        UsageError: the name is unknown.
    """
    if isinstance(backend, Ops):
        return backend
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'; choose one of {', '.join(BACKENDS)}")
    return CPU if backend == "auto" and device.type == "cpu" else TORCH
