"""Device and dtype of a model, as a user names them."""

import torch

from nanoglimpse.config import Config
from nanoglimpse.errors import UsageError

# On a CPU low-precision products pay off on large matrices alone.
SMALL_HIDDEN_SIZE = 512


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name} was asked for, but torch finds no CUDA here; use cpu")
    return device


def find_dtype(name: str, device: torch.device, config: Config) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16, but float32 for a small model on a CPU.

    Raises:
        UsageError: the name is unknown.
    """
    if name == "auto":
        small = config.text_config.hidden_size <= SMALL_HIDDEN_SIZE
        return torch.float32 if small and device.type == "cpu" else torch.bfloat16
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise UsageError(f"unknown dtype '{name}'; use auto, {', '.join(kinds)}")
    return kinds[name]
