"""Device and dtype of a model, as a user names them."""

import torch

from nanoglimpse.config import Config
from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.backends import is_old_gpu

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
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        known = ", ".join(f"cuda:{index}" for index in range(count))
        raise UsageError(f"device {name} was asked for, but torch finds only {known} here")
    return device


def find_dtype(name: str, device: torch.device, config: Config) -> torch.dtype:
    """The dtype of that name; "auto" as for `load`.

    Raises:
        UsageError: the name is unknown.
    """
    if name == "auto":
        small = config.text_config.hidden_size <= SMALL_HIDDEN_SIZE
        if small and device.type == "cpu":
            return torch.float32
        return torch.float16 if is_old_gpu(device) else torch.bfloat16
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        raise UsageError(f"unknown dtype '{name}'; use auto, {', '.join(kinds)}")
    return kinds[name]
