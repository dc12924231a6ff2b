"""A cache whose rows are counted on the device, so that a decode step can be captured."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglimpse.kernels.varlen import upload
from nanoglimpse.kvcache.cache import KVCache, Reserved, Storage


class DeviceKVCache(Storage):
    """The memory of a cache, with the verbs that a decode step uses; nothing waits for the host.

    Attributes:
        cache: the memory.
        starts, lengths: int32 [B] on the device.
    """

    starts: Tensor
    lengths: Tensor

    def __init__(self, cache: KVCache):
        self.cache, self.layers, device = cache, cache.layers, cache.k.device
        self.k_rows, self.v_rows = cache.k_rows, cache.v_rows
        self.k_heads, self.v_heads = cache.k_heads, cache.v_heads
        self.starts = upload(torch.tensor(cache.starts, dtype=torch.int32), device)
        self.lengths = torch.zeros_like(self.starts)

    def reserve(self, counts: Sequence[int]) -> Reserved:
        """Takes the next row of each sequence into use, whatever `counts` says."""
        rows = (self.starts + self.lengths).long()
        self.lengths += 1
        return Reserved(self, rows, False)

    def load(self, source: KVCache) -> None:
        """Copies the rows in use of another cache of as many sequences."""
        spans = zip(self.cache.starts, source.starts, source.lengths, strict=True)
        for own, start, length in spans:
            self.cache.k[:, own : own + length] = source.k[:, start : start + length]
            self.cache.v[:, own : own + length] = source.v[:, start : start + length]
        self.lengths.copy_(source.length)
