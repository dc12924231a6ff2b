"""A cache whose rows are counted on the device, so that a decode step can be captured."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglimpse.kernels.varlen import upload
from nanoglimpse.kvcache.cache import KVCache, Reserved, Storage


class DeviceKVCache(Storage):
    """The memory of a cache, with the verbs that a decode step uses; nothing waits for the host.

    A sequence that is not in use writes to the last row of the memory, and attends to the one
    before.

    Args:
        cache: the memory, whose last two rows are free for that.
        batch: number of sequences B; none is in use at first.

    Attributes:
        starts, lengths: int32 [B] on the device.
        grows: int32 [B], 1 for sequences in use and 0 for others.
    """

    starts: Tensor
    lengths: Tensor

    def __init__(self, cache: KVCache, batch: int):
        self.cache, self.layers = cache, cache.layers
        self.k_rows, self.v_rows = cache.k_rows, cache.v_rows
        self.k_heads, self.v_heads = cache.k_heads, cache.v_heads
        # Each begins at a multiple of 16 bytes, or Triton would compile a variant for some B.
        self.state = cache.k.new_empty(3, -(-batch // 4) * 4, dtype=torch.int32)
        self.starts, self.lengths, self.grows = self.state[:, :batch]
        cache.k[:, -2:], cache.v[:, -2:] = 0, 0
        self.count([], [])

    def count(self, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Takes sequences into use, and all others out of it."""
        unused = self.state.shape[1] - len(starts)
        spare = self.cache.k.shape[1] - 2
        state = (
            [*starts, *[spare] * unused],
            [*lengths, *[1] * unused],
            [*[1] * len(starts), *[0] * unused],
        )
        self.state.copy_(upload(torch.tensor(state, dtype=torch.int32), self.state.device))

    def reserve(self, counts: Sequence[int]) -> Reserved:
        """Takes the next row of each sequence into use, whatever `counts` says."""
        rows = (self.starts + self.lengths).long()
        self.lengths += self.grows
        return Reserved(self, rows, False)

    def load(self, source: KVCache) -> None:
        """Continues the sequences of another cache, whose rows it copies, or its own."""
        if source is self.cache:
            self.count(source.starts, source.lengths)
            return
        spans = zip(self.cache.starts, source.starts, source.lengths, strict=True)
        for own, start, length in spans:
            self.cache.k[:, own : own + length] = source.k[:, start : start + length]
            self.cache.v[:, own : own + length] = source.v[:, start : start + length]
        self.count(self.cache.starts, source.lengths)
