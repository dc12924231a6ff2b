"""The processes that torchrun started for one evaluation or one training run."""

import os
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanoglimpse.errors import UsageError


def num_processes() -> int:
    """How many processes share the work, as torchrun sets it; 1 without torchrun.

    Raises:
        UsageError: WORLD_SIZE is no such number.
    """
    return _variable("WORLD_SIZE", 1, 1)


def local_device(name: str) -> str:
    """Resolves "auto" to the GPU of this process, or to the CPU where there is no GPU.

    Raises:
        UsageError: LOCAL_RANK is no number.
    """
    if name != "auto":
        return name
    return f"cuda:{_variable('LOCAL_RANK', 0, 0)}" if torch.cuda.is_available() else "cpu"


def is_first() -> bool:
    """Whether this process speaks for all; one that does not know its rank does, too."""
    return not re.fullmatch("0*[1-9][0-9]*", os.environ.get("RANK", "0"))


def _variable(name: str, default: int, low: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < low:
        raise UsageError(
            f"the environment variable {name} must be a whole number of at least {low}, got "
            f"{text!r}; torchrun sets it"
        )
    return int(text)


class ProcessGroup:
    """This process and its peers; without torchrun it is the only one and nothing is sent.

    Args:
        device: where the exchanged tensors live: CUDA tensors travel over nccl, CPU tensors and
            Python objects over gloo.

    Attributes:
        count: the number of processes.
        rank: the index of this process.

    Raises:
        UsageError: the variables that torchrun sets are missing or make no sense.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.count = num_processes()
        self.rank = _variable("RANK", 0, 0)
        if self.count > 1:
            try:
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            except ValueError as error:
                raise UsageError(f"WORLD_SIZE is {self.count}, but {error}; use torchrun") from None

    def share(self, value: Any) -> Any:
        """Returns the value of process 0 in every process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def gather(self, values: list) -> list:
        """Concatenates the lists of all processes, by rank, in process 0; returns [] elsewhere."""
        if self.count == 1:
            return values
        parts: list[Any] | None = [None] * self.count if self.rank == 0 else None
        dist.gather_object(values, parts)
        return [value for part in parts or () for value in part]

    def sum(self, tensors: list[Tensor]) -> None:
        """Adds up the tensors of all processes, in place."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        total = torch.tensor([float(flag)], device=self.device)
        self.sum([total])
        return bool(total.item())

    def close(self, *, wait: bool = True) -> None:
        """Ends the group.

        Args:
            wait: for the other processes first; after an error they may never arrive.
        """
        if self.count == 1 or not dist.is_initialized():
            return
        if wait:
            # gloo's threads release the tensors of the last sum shortly after it has returned; a
            # release while Python shuts down aborts the process.
            dist.barrier()
        dist.destroy_process_group()
