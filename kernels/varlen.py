"""Sequences packed in one tensor, one after another, and delimited by cumulative lengths."""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on the device. The host does not wait for a GPU to copy it.

    A GPU copies from page-locked memory when its stream gets there; from any other memory, torch
    waits for the stream and for the copy.
    """
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class EqualLengthRun(NamedTuple):
    """Neighbouring segments of equal length, which a batched operation can process at once.

    Attributes:
        start: first row of the first segment.
        num_segments: number of segments.
        length: rows of each segment.
    """

    start: int
    num_segments: int
    length: int


class Segments:
    """Boundaries of the sequences that are packed along the rows of a tensor.

    A segment is whatever attends within itself: a prompt, an image, a video frame or a window.

    Attributes:
        lengths: rows of each segment; empty segments are dropped.
        cu_seqlens: int32 [B + 1] on `device`, the cumulative lengths, as a kernel reads them.
        runs: the segments in order, grouped into runs of equal length.
        rows: int64 [T], a permutation: segments are contiguous in `x[rows]` rather than in the
            tensor `x` itself. None if they are contiguous in `x`.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device | str = "cpu", rows: Tensor | None = None
    ):
        self.lengths = tuple(n for n in lengths if n)
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        self.cu_seqlens = upload(ends, device)
        self.rows = rows
        self.runs = _equal_length_runs(self.lengths)


def _equal_length_runs(lengths: tuple[int, ...]) -> list[EqualLengthRun]:
    runs, start = [], 0
    for length, group in groupby(lengths):
        num_segments = len(list(group))
        runs.append(EqualLengthRun(start, num_segments, length))
        start += num_segments * length
    return runs
