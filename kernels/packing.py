"""Packed sequences: rows of several sequences one after the other, told apart by their lengths."""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """`count` neighbouring sequences of `length` rows each, from row `start` on."""

    start: int
    count: int
    length: int


class Packing:
    """Where sequences lie in the rows of a packed tensor.

    Attributes:
        lengths: rows of each sequence.
        cu_seqlens: int32 [B + 1] on `device`, the cumulative lengths; what a kernel reads.
        runs: neighbours of equal length, each one batch for a batched operation.
        rows: None, or int64 [T]: the packing holds for `x[rows]` instead of for `x`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        rows: Tensor | None = None,
    ):
        self.lengths = tuple(n for n in lengths if n)
        self.cu_seqlens = torch.tensor(
            [0, *accumulate(self.lengths)], dtype=torch.int32, device=device
        )
        self.rows = rows
        self.runs = _runs(self.lengths)


def _runs(lengths: tuple[int, ...]) -> list[Run]:
    runs, start = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        runs.append(Run(start, count, length))
        start += count * length
    return runs
