"""The processes that share an evaluation; torchrun says how many there are."""

import os
from typing import Any

import torch
import torch.distributed as dist


class Shards:
    """This process among those that answer together; alone without torchrun.

    Only results travel, so that the group is a CPU one on any device. Process 0 alone touches the
    file of results.

    Attributes:
        count: of processes.
        rank: of this one.
    """

    def __init__(self):
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1:
            dist.init_process_group("gloo")

    def share(self, value: Any) -> Any:
        """Process 0's value, in all of them."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, values: list) -> list:
        """The lists of all processes as one, in their order, in process 0; empty elsewhere."""
        if self.count == 1:
            return values
        parts = [None] * self.count if self.rank == 0 else None
        dist.gather_object(values, parts)
        return [value for part in parts or () for value in part]

    def close(self) -> None:
        """Ends the group."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


def device(name: str) -> str:
    """ "auto" as this process' own GPU, where several processes share the GPUs of a machine."""
    if name == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name
