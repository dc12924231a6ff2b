"""The contiguous KV cache.

One allocation for keys and one for values hold all layers of all packed sequences. Physical rows
and logical positions are separate: after pruning, a sequence of 50 rows may continue at position
300, and neither number can be derived from the other. The caller of the layers reserves rows once,
before the first layer runs; a layer only writes them.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from nanoglimpse.config import TextConfig
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.gather import SurvivorAttention
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import upload

Rows = slice | Tensor
Counts = Sequence[int] | Tensor
Snapshot = tuple[list[int], Tensor]


class Storage:
    """Memory of keys and values whose rows are counted on the host or on the device.

    Attributes:
        layers: decoder layers whose keys and values it holds.
        k_rows, v_rows: of each layer, [R, H, D].
        k_heads, v_heads: of each layer, the same memory as [1, H, R, D].
        starts, lengths: first row, and number of rows in use, of each sequence.
    """

    layers: range
    k_rows: Sequence[Tensor]
    v_rows: Sequence[Tensor]
    k_heads: Sequence[Tensor]
    v_heads: Sequence[Tensor]
    starts: Counts
    lengths: Counts

    def used(self) -> Rows:
        """All rows in use, one sequence after another, where the host knows them."""
        raise NotImplementedError("the rows in use are counted on the device")


class LayerKV(NamedTuple):
    """One layer of a cache during one pass.

    Attributes:
        cache: the cache.
        slot: place of the layer in it.
        rows: cache rows that the pass writes.
        fresh: whether these are all rows in use, so that nothing written earlier is attended to.
    """

    cache: Storage
    slot: int
    rows: Rows
    fresh: bool

    def append(self, qkv: Tensor, rope: Rope, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        """Rotates and writes rows [T, HQ + 2H, D]; returns q, and the k and v it attends to."""
        q, _ = ops.rope_append(qkv, rope, *self.targets)
        return q, *self.in_use()

    def in_use(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows in use, one sequence after another."""
        used = self.rows if self.fresh else self.cache.used()
        return self.cache.k_rows[self.slot][used], self.cache.v_rows[self.slot][used]

    @property
    def targets(self) -> tuple[Tensor, Tensor, Rows]:
        """k, v [R, H, D] and the rows of them that the pass writes."""
        return self.cache.k_rows[self.slot], self.cache.v_rows[self.slot], self.rows

    @property
    def sequences(self) -> tuple[Tensor, Tensor, Counts, Counts]:
        """k, v [1, H, R, D], and the first row and the length of each sequence."""
        cache = self.cache
        return cache.k_heads[self.slot], cache.v_heads[self.slot], cache.starts, cache.lengths


class Reserved(NamedTuple):
    """The rows that one pass writes, the same in every layer of a cache; see `LayerKV`."""

    cache: Storage
    rows: Rows
    fresh: bool

    def layer(self, layer: int) -> LayerKV:
        """The rows in one decoder layer."""
        return LayerKV(self.cache, layer - self.cache.layers.start, self.rows, self.fresh)


class KVCache(Storage):
    """Keys and values [L, R, H, D] of B packed sequences with a fixed capacity each.

    Args:
        config: of the decoder.
        layers: decoder layers to hold.
        capacity: rows of each sequence.
        next_position: int64 [B].
        like: a tensor of the wanted device and dtype.
        ops: gathers rows.

    Attributes:
        k, v: [L, R, H, D]; sequence b owns `capacity[b]` rows from `starts[b]` on.
        lengths: rows in use of each sequence.
        next_position: int64 [B], the M-RoPE position (all axes) of the next token.
    """

    def __init__(
        self,
        config: TextConfig,
        layers: range,
        capacity: Sequence[int],
        next_position: Tensor,
        like: Tensor,
        ops: Ops,
    ):
        shape = (len(layers), sum(capacity), config.num_key_value_heads, config.head_dim)
        self.k = like.new_empty(shape)
        self.v = like.new_empty(shape)
        # The same memory layer by layer, as it is written [R, H, D] and as it is read [1, H, R, D].
        self.k_rows, self.v_rows = self.k.unbind(0), self.v.unbind(0)
        self.k_heads = self.k.transpose(1, 2).split(1)
        self.v_heads = self.v.transpose(1, 2).split(1)
        self.layers = layers
        self.capacity = list(capacity)
        self.starts: list[int] = [0, *accumulate(capacity)][:-1]
        self.lengths: list[int] = [0] * len(self.capacity)
        self.next_position = next_position
        self.config = config
        self.ops = ops

    @property
    def length(self) -> Tensor:
        """int64 [B], rows in use."""
        return upload(torch.tensor(self.lengths), self.k.device)

    @property
    def num_rows(self) -> int:
        """Rows in use, counted in every layer."""
        return len(self.layers) * sum(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use, keys and values, all layers."""
        heads, width = self.k.shape[2:]
        return 2 * self.num_rows * heads * width * self.k.element_size()

    def reserve(self, counts: Sequence[int]) -> Reserved:
        """Takes the next `counts[b]` rows of each sequence into use.

        Raises:
            ValueError: a sequence has too few free rows.
        """
        for b, count in enumerate(counts):
            if self.lengths[b] + count > self.capacity[b]:
                raise ValueError(
                    f"sequence {b} of the cache holds {self.lengths[b]} of {self.capacity[b]} "
                    f"rows; {count} more do not fit"
                )
        fresh = not any(self.lengths)
        first = [start + n for start, n in zip(self.starts, self.lengths, strict=True)]
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        return Reserved(self, self._rows(first, counts), fresh)

    def rewrite(self) -> Reserved:
        """All rows in use, for a pass over layers that have not written them yet."""
        return Reserved(self, self.used(), True)

    def used(self) -> Rows:
        """All rows in use, one sequence after another."""
        return self._rows(self.starts, self.lengths)

    def _numbers(self, first: Sequence[int], counts: Sequence[int]) -> Tensor:
        spans = [torch.arange(f, f + n) for f, n in zip(first, counts, strict=True)]
        return upload(torch.cat(spans), self.k.device)

    def _rows(self, first: Sequence[int], counts: Sequence[int]) -> Rows:
        stops = [start + n for start, n in zip(first, counts, strict=True)]
        if stops[:-1] == list(first[1:]):
            return slice(first[0], stops[-1])
        return self._numbers(first, counts)

    def layer(self, layer: int, sequence: int = 0) -> tuple[Tensor, Tensor]:
        """Views k, v [length, H, D] of one decoder layer of one sequence."""
        index, start = layer - self.layers.start, self.starts[sequence]
        rows = slice(start, start + self.lengths[sequence])
        return self.k[index, rows], self.v[index, rows]

    def keep(self, rows: Tensor, counts: Sequence[int], layers: range, headroom: int) -> "KVCache":
        """A compact cache of the surviving rows; arguments as `gather`."""
        nothing = self.k.new_empty(sum(self.lengths), 0)
        return self.gather(nothing, rows, counts, layers, headroom)[0]

    def gather(
        self,
        hidden: Tensor,
        rows: Tensor,
        counts: Sequence[int],
        layers: range,
        headroom: int,
        attends: SurvivorAttention | None = None,
    ) -> tuple["KVCache", Tensor, Tensor | None]:
        """Surviving hidden rows and a compact cache of them in one gather; this cache stays.

        Args:
            hidden: [T, C], one for each row in use.
            rows: int64 [S], the surviving ones among the rows in use, one sequence after another.
            counts: how many of them belong to each sequence.
            layers: of the new cache, from the first layer of this one on; layers that this one does
                not hold are left to be written.
            headroom: free rows after each sequence.
            attends: attention to compute in the same launch; or None.

        Returns:
            The new cache, whose S rows are in use, [S, C], and the attention [S, HQ · D] or None.
        """
        capacity = [count + headroom for count in counts]
        new = KVCache(self.config, layers, capacity, self.next_position, self.k, self.ops)
        none, own = hidden.new_empty(self.k.shape[1], 0), len(self.layers)
        apart = self.lengths != self.capacity and len(self.lengths) > 1
        # Headroom after a sequence shifts the next one, so hidden rows are numbered differently.
        source = self._numbers(self.starts, self.lengths)[rows] if apart else rows
        both = (self.k, self.v, none if apart else hidden, source, new.k[:own], new.v[:own])
        kept, attended = self.ops.gather(*both, new.reserve(counts).rows, attends)
        return new, hidden[rows] if apart else kept, attended

    def snapshot(self) -> Snapshot:
        """The state that `restored` returns to."""
        return list(self.lengths), self.next_position

    def restored(self, snapshot: Snapshot, headroom: int) -> "KVCache":
        """This cache at a snapshot, or a copy with more capacity where `headroom` does not fit."""
        self.truncate(*snapshot)
        free = min(c - n for c, n in zip(self.capacity, self.lengths, strict=True))
        if free >= headroom:
            return self
        rows = torch.arange(sum(self.lengths), device=self.k.device)
        return self.keep(rows, self.lengths, self.layers, headroom)

    def truncate(self, lengths: Sequence[int], next_position: Tensor) -> None:
        """Frees the rows after `lengths`."""
        if any(n > used for n, used in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate a cache of {self.lengths} rows to {list(lengths)}")
        self.lengths, self.next_position = list(lengths), next_position
