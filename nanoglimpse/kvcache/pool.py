"""A cache for continuous batching: rows pass from sequences that have ended to waiting ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglimpse.kvcache.cache import KVCache


class KVPool(KVCache):
    """A cache of fixed size in which every sequence owns one contiguous span of rows.

    Spans are given first fit. A sequence that finds no gap waits until neighbouring spans are free;
    since sequences are admitted in order, the pool drains and every sequence is admitted. Two
    rows after all spans are for captured steps (`DeviceKVCache`).
    """

    def __init__(self, rows: int, like: KVCache):
        room, position = [rows + 2], like.next_position[:0]
        super().__init__(like.config, like.layers, room, position, like.k, like.ops)
        self.size, self.capacity, self.starts, self.lengths = rows, [], [], []

    def gap(self, rows: int) -> int | None:
        """The first row of the first gap of this size; None if there is none."""
        end = 0
        for start, capacity in sorted(zip(self.starts, self.capacity, strict=True)):
            if start - end >= rows:
                return end
            end = start + capacity
        return end if self.size - end >= rows else None

    def admit(self, source: KVCache, sequence: int, headroom: int) -> None:
        """Copies a sequence of another cache into a gap, with `headroom` free rows after it.

        Raises:
            ValueError: there is no gap of that size.
        """
        rows, old = source.lengths[sequence], source.starts[sequence]
        new = self.gap(rows + headroom)
        if new is None:
            raise ValueError(f"no gap of {rows + headroom} rows is free in a pool of {self.size}")
        self.k[:, new : new + rows] = source.k[:, old : old + rows]
        self.v[:, new : new + rows] = source.v[:, old : old + rows]
        self.starts.append(new)
        self.lengths.append(rows)
        self.capacity.append(rows + headroom)
        position = source.next_position[sequence : sequence + 1]
        self.next_position = torch.cat((self.next_position, position))

    def release(self, stay: Sequence[int], places: Tensor) -> None:
        """Frees the rows of all sequences but `stay`; `places` are these numbers on the device."""
        self.starts = [self.starts[i] for i in stay]
        self.lengths = [self.lengths[i] for i in stay]
        self.capacity = [self.capacity[i] for i in stay]
        self.next_position = self.next_position[places]
