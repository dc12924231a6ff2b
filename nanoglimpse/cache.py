"""The contiguous KV cache.

One allocation for keys and one for values hold all layers of all packed sequences. Physical rows
and logical positions are separate: after pruning a sequence of 50 rows may go on at position 300,
and neither number can be derived from the other. Whoever runs the layers takes rows into use, once,
before the first of them; a layer only writes.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .config import TextConfig
from .kernels.ops import Ops

Rows = slice | Tensor


class Cache:
    """Keys and values [L, R, H, D] of B packed sequences with a fixed capacity each.

    Attributes:
        k, v: [L, R, H, D]; sequence b owns `capacity[b]` rows from `starts[b]` on.
        lengths: rows in use of each sequence.
        next_position: int64 [B], the M-RoPE position (all axes) of the next token.
    """

    def __init__(
        self,
        config: TextConfig,
        layers: int,
        capacity: Sequence[int],
        next_position: Tensor,
        like: Tensor,
        ops: Ops,
    ):
        shape = (layers, sum(capacity), config.num_key_value_heads, config.head_dim)
        self.k = like.new_empty(shape)
        self.v = like.new_empty(shape)
        # The same memory layer by layer, as it is written [R, H, D] and as it is read [1, H, R, D].
        self.k_rows, self.v_rows = self.k.unbind(0), self.v.unbind(0)
        self.k_heads = self.k.transpose(1, 2).split(1)
        self.v_heads = self.v.transpose(1, 2).split(1)
        self.capacity = list(capacity)
        self.starts = [0, *accumulate(capacity)][:-1]
        self.lengths = [0] * len(self.capacity)
        self.next_position = next_position
        self.config = config
        self.ops = ops

    @property
    def length(self) -> Tensor:
        """int64 [B], rows in use."""
        return torch.tensor(self.lengths, device=self.k.device)

    @property
    def rows(self) -> int:
        """Rows in use, counted in every layer."""
        return len(self.k) * sum(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use, keys and values, all layers."""
        layers, _, heads, width = self.k.shape
        return 2 * layers * sum(self.lengths) * heads * width * self.k.element_size()

    def extend(self, counts: Sequence[int]) -> Rows:
        """Takes the next `counts[b]` rows of each sequence into use and says which they are.

        Raises:
            ValueError: a sequence has no room for them.
        """
        for b, count in enumerate(counts):
            if self.lengths[b] + count > self.capacity[b]:
                raise ValueError(
                    f"sequence {b} of the cache holds {self.lengths[b]} of {self.capacity[b]} "
                    f"rows; {count} more do not fit"
                )
        first = [start + n for start, n in zip(self.starts, self.lengths, strict=True)]
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        return self._rows(first, counts)

    def used(self) -> Rows:
        """All rows in use, sequence after sequence."""
        return self._rows(self.starts, self.lengths)

    def _rows(self, first: Sequence[int], counts: Sequence[int]) -> Rows:
        if len(first) == 1:
            return slice(first[0], first[0] + counts[0])
        spans = [torch.arange(f, f + n) for f, n in zip(first, counts, strict=True)]
        return torch.cat(spans).to(self.k.device)

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        """Writes k, v [T, H, D] of one layer to the rows that `extend` named."""
        self.k_rows[layer][rows] = k
        self.v_rows[layer][rows] = v

    def layer(self, layer: int, sequence: int = 0) -> tuple[Tensor, Tensor]:
        """Views k, v [length, H, D] of one layer of one sequence."""
        start = self.starts[sequence]
        rows = slice(start, start + self.lengths[sequence])
        return self.k[layer, rows], self.v[layer, rows]

    def keep(self, rows: Tensor, counts: Sequence[int], layers: int, room: int) -> "Cache":
        """A compact cache of the rows that survive; arguments as `keep_with`."""
        nothing = self.k.new_empty(sum(self.lengths), 0)
        return self.keep_with(nothing, rows, counts, layers, room)[1]

    def keep_with(
        self, hidden: Tensor, rows: Tensor, counts: Sequence[int], layers: int, room: int
    ) -> tuple[Tensor, "Cache"]:
        """Hidden rows and a compact cache of what survives, in one gather; this one stays as it is.

        Args:
            hidden: [T, C], of the rows in use.
            rows: int64 [S], which of the rows in use survive, counted sequence after sequence.
            counts: how many of them belong to each sequence.
            layers: layers of the new cache; those beyond this one's are left to be written.
            room: rows to leave free behind each sequence.

        Returns:
            [S, C] and the cache.
        """
        capacity = [count + room for count in counts]
        new = Cache(self.config, layers, capacity, self.next_position, self.k, self.ops)
        none, own = hidden.new_empty(self.k.shape[1], 0), len(self.k)
        apart = self.lengths != self.capacity and len(self.lengths) > 1
        # Room behind a sequence shifts the next one: then the hidden rows are numbered otherwise.
        source = self.used()[rows] if apart else rows
        both = (self.k, self.v, none if apart else hidden, source, new.k[:own], new.v[:own])
        kept = self.ops.keep_rows(*both, new.extend(counts))
        return (hidden[rows] if apart else kept), new

    def target(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor, Rows]:
        """k, v [R, H, D] of one layer, and the rows there that `extend` named."""
        return self.k_rows[layer], self.v_rows[layer], rows

    def view(self, layer: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """k, v [1, H, R, D] of one layer, and where each sequence starts and how long it is."""
        return self.k_heads[layer], self.v_heads[layer], self.starts, self.lengths

    def state(self) -> tuple[list[int], Tensor]:
        """What `rewound` goes back to."""
        return list(self.lengths), self.next_position

    def rewound(self, state: tuple[list[int], Tensor], room: int) -> "Cache":
        """This cache as it was, or a copy where it has no room for so many more rows."""
        self.truncate(*state)
        free = min(c - n for c, n in zip(self.capacity, self.lengths, strict=True))
        if free >= room:
            return self
        rows = torch.arange(sum(self.lengths), device=self.k.device)
        return self.keep(rows, self.lengths, len(self.k), room)

    def truncate(self, lengths: Sequence[int], next_position: Tensor) -> None:
        """Forgets the rows behind `lengths`."""
        if any(n > used for n, used in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate a cache of {self.lengths} rows to {list(lengths)}")
        self.lengths, self.next_position = list(lengths), next_position


class Stack:
    """Caches of neighbouring layers as one: each has the rows that its layers were left with.

    A method that drops rows from later layers alone leaves such a cache. Verbs as `Cache`; rows are
    a list, an entry for each cache.
    """

    def __init__(self, caches: Sequence[Cache]):
        self.caches = list(caches)
        self.place = [(b, i) for b, cache in enumerate(caches) for i in range(len(cache.k))]

    @property
    def next_position(self) -> Tensor:
        """int64 [B], the same in all."""
        return self.caches[0].next_position

    @next_position.setter
    def next_position(self, position: Tensor) -> None:
        for cache in self.caches:
            cache.next_position = position

    @property
    def rows(self) -> int:
        """Rows in use, counted in every layer."""
        return sum(cache.rows for cache in self.caches)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return sum(cache.nbytes for cache in self.caches)

    def extend(self, counts: Sequence[int]) -> list[Rows]:
        """Takes rows into use in every cache."""
        return [cache.extend(counts) for cache in self.caches]

    def used(self) -> list[Rows]:
        """All rows in use."""
        return [cache.used() for cache in self.caches]

    def append(self, layer: int, rows: list[Rows], k: Tensor, v: Tensor) -> None:
        """Writes k, v of one layer."""
        cache, own = self.place[layer]
        self.caches[cache].append(own, rows[cache], k, v)

    def target(self, layer: int, rows: list[Rows]) -> tuple[Tensor, Tensor, Rows]:
        """One layer as decoding writes it."""
        cache, own = self.place[layer]
        return self.caches[cache].target(own, rows[cache])

    def view(self, layer: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """One layer as decoding reads it."""
        cache, own = self.place[layer]
        return self.caches[cache].view(own)

    def layer(self, layer: int, sequence: int = 0) -> tuple[Tensor, Tensor]:
        """Views k, v [length, H, D] of one layer of one sequence."""
        cache, own = self.place[layer]
        return self.caches[cache].layer(own, sequence)

    def state(self) -> list:
        """What `rewound` goes back to."""
        return [cache.state() for cache in self.caches]

    def rewound(self, state: list, room: int) -> "Stack":
        """This stack as it was, with room for so many more rows."""
        pairs = zip(self.caches, state, strict=True)
        return Stack([cache.rewound(own, room) for cache, own in pairs])
