"""The operations of the hot path, chosen once when a model is loaded.

The engine calls them only through the `Ops` that `select` returns, so that a model never asks
which backend runs it. The references are plain torch and run on every device.

This folder is the package nanoglimpse.kernels and has no `__init__.py` on purpose: with one, a
program started in the checkout would find it when transformers looks for the published package of
the name `kernels`, and fail.
"""

# Triton must not be imported until a model is loaded for it, and its decorator has to see
# `triton.language` where a kernel is defined. Hence two files an op: `<op>.py` holds the reference,
# the contract and nothing but torch, `<op>_triton.py` the kernel and its launcher.

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import UsageError
from .append import rotate_append
from .attention import Probe, Queries, attention, attention_reading, row_logits
from .decode import decode_attention
from .few import few_rows
from .keep import keep_rows
from .linear import linear, pack
from .norm import add_rms_norm, rms_norm
from .packing import Packing
from .received import received_attention
from .rope import Rope, rotate
from .swiglu import swiglu

__all__ = ["BACKENDS", "CPU", "TORCH", "Ops", "Packing", "Probe", "Queries", "Rope", "select"]


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; signatures and contracts stand at the references.

    `captured`: on a GPU nothing in a decode step waits for the host, so that it can be replayed.
    """

    attention: Callable
    attention_reading: Callable
    decode_attention: Callable
    row_logits: Callable
    keep_rows: Callable
    rms_norm: Callable
    add_rms_norm: Callable
    rotate: Callable
    rotate_append: Callable
    received_attention: Callable
    swiglu: Callable
    few_rows: Callable
    linear: Callable
    pack: Callable
    captured: bool = False


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


TORCH = Ops(
    attention=attention,
    attention_reading=attention_reading,
    decode_attention=decode_attention,
    row_logits=row_logits,
    keep_rows=keep_rows,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rotate=rotate,
    rotate_append=rotate_append,
    received_attention=received_attention,
    swiglu=swiglu,
    few_rows=few_rows,
    linear=linear,
    pack=_as_it_is,
)
CPU = replace(TORCH, pack=pack)
BACKENDS = ("auto", "torch", "triton")


def select(backend: str | Ops, device: torch.device) -> Ops:
    """The operations of a backend by name: "torch" is plain torch, "auto" the fastest on `device`.

    "triton" needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1), which is slow and made for
    tests. Operations of one's own are taken as they are.

    Raises:
        UsageError: the name is unknown, or the backend does not run here.
    """
    if isinstance(backend, Ops):
        return backend
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        # The Triton kernels have been checked and compiled, but not timed on a GPU yet.
        return CPU if device.type == "cpu" else TORCH
    if backend == "torch":
        return TORCH
    installed = find_spec("triton") is not None
    if not installed:
        raise UsageError("backend triton was asked for, but triton is not installed; use torch")
    from .launchers import TRITON, runs_on

    if not runs_on(device):
        raise UsageError(f"backend triton does not run on {device.type}; use auto or torch")
    return TRITON
