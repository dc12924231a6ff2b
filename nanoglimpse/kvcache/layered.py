"""Caches of consecutive layers as one, each with its own rows.

A method that drops rows from the caches of later layers only leaves fewer rows there.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nanoglimpse.kvcache.cache import KVCache, LayerKV, Reserved, Snapshot


class LayeredReserved(NamedTuple):
    """As `Reserved`, with rows for each group of layers."""

    groups: list[Reserved]

    def layer(self, layer: int) -> LayerKV:
        """The rows in one decoder layer."""
        return next(group for group in self.groups if layer in group.cache.layers).layer(layer)


class LayeredKVCache:
    """Caches of consecutive groups of layers; verbs as `KVCache`.

    Attributes:
        caches: from the lowest group of layers to the highest.
    """

    def __init__(self, caches: Sequence[KVCache]):
        self.caches = list(caches)

    @property
    def next_position(self) -> Tensor:
        """int64 [B], the same in all caches."""
        return self.caches[0].next_position

    @next_position.setter
    def next_position(self, position: Tensor) -> None:
        for cache in self.caches:
            cache.next_position = position

    @property
    def num_rows(self) -> int:
        """Rows in use, counted in every layer."""
        return sum(cache.num_rows for cache in self.caches)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return sum(cache.nbytes for cache in self.caches)

    def reserve(self, counts: Sequence[int]) -> LayeredReserved:
        """Takes the next `counts[b]` rows of each sequence into use in every cache."""
        return LayeredReserved([cache.reserve(counts) for cache in self.caches])

    def layer(self, layer: int, sequence: int = 0) -> tuple[Tensor, Tensor]:
        """Views k, v [length, H, D] of one decoder layer of one sequence."""
        cache = next(cache for cache in self.caches if layer in cache.layers)
        return cache.layer(layer, sequence)

    def snapshot(self) -> list[Snapshot]:
        """The state that `restored` returns to."""
        return [cache.snapshot() for cache in self.caches]

    def restored(self, snapshot: list[Snapshot], headroom: int) -> "LayeredKVCache":
        """These caches at a snapshot, each with `headroom` free rows in every sequence."""
        pairs = zip(self.caches, snapshot, strict=True)
        return LayeredKVCache([cache.restored(own, headroom) for cache, own in pairs])
