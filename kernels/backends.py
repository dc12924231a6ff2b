"""The backends by name: plain torch, torch with matrices packed for a CPU, and Triton."""

from importlib.util import find_spec

import torch

from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.table import CPU, TORCH

BACKENDS = ("auto", "torch", "triton")
# The first compute capability with bfloat16 and asynchronous copies. For older ones the kernels
# compile, but they ask for more shared memory than there is, and spill.
MIN_CAPABILITY = (8, 0)


def is_old_gpu(device: torch.device) -> bool:
    """Whether this is a GPU without bfloat16, on which no kernel runs."""
    is_gpu = device.type == "cuda" and torch.cuda.is_available()
    return is_gpu and torch.cuda.get_device_capability(device) < MIN_CAPABILITY


def select(backend: str | Ops, device: torch.device) -> Ops:
    """Returns the operations of a backend.

    Args:
        backend: "torch" for the references, "triton" for the kernels, "auto" for the fastest
            operations that are known for the device, or an `Ops`, which is returned unchanged.
        device: where the model runs. "triton" needs a GPU of compute capability 8.0, or Triton's
            interpreter (TRITON_INTERPRET=1), which is slow and meant for tests.

    Raises:
        UsageError: the name is unknown, or the backend does not run here.
    """
    if isinstance(backend, Ops):
        return backend
    if backend not in BACKENDS:
        raise UsageError(f"backend must be one of {', '.join(BACKENDS)}, got '{backend}'")
    if backend == "auto" and device.type == "cpu":
        return CPU
    has_triton = find_spec("triton") is not None
    if backend == "torch" or (backend == "auto" and (not has_triton or is_old_gpu(device))):
        return TORCH
    if not has_triton:
        raise UsageError("backend triton needs triton, which is not installed; use backend torch")
    # Imported here because importing it imports Triton, which only a model that uses it needs.
    from nanoglimpse.kernels.triton_ops.registry import GPU, TRITON, runs_on

    if is_old_gpu(device):
        both = torch.cuda.get_device_capability(device), MIN_CAPABILITY
        own, least = (".".join(map(str, x)) for x in both)
        raise UsageError(
            f"backend triton needs compute capability {least}, but {device} has {own}; "
            "use backend torch"
        )
    if not runs_on(device):
        raise UsageError(f"backend triton does not run on {device.type}; use backend torch")
    return GPU if backend == "auto" else TRITON
