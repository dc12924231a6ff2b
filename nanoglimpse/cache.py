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
        return self.keep_with(self.k.new_empty(self.k.shape[1], 0), rows, counts, layers, room)[1]

    def keep_with(
        self, hidden: Tensor, rows: Tensor, counts: Sequence[int], layers: int, room: int
    ) -> tuple[Tensor, "Cache"]:
        """Hidden rows and a compact cache of what survives, in one gather; this one stays as it is.

        Args:
            hidden: [R, C], numbered as the rows of this cache.
            rows: int64 [S], surviving rows of this cache, sequence after sequence, in order.
            counts: how many of them belong to each sequence.
            layers: layers of the new cache; those beyond this one's are left to be written.
            room: rows to leave free behind each sequence.

        Returns:
            [S, C] and the cache.
        """
        capacity = [count + room for count in counts]
        new = Cache(self.config, layers, capacity, self.next_position, self.k, self.ops)
        targets, own = new.extend(counts), len(self.k)
        kept = self.ops.keep_rows(self.k, self.v, hidden, rows, new.k[:own], new.v[:own], targets)
        return kept, new

    def truncate(self, lengths: Sequence[int], next_position: Tensor) -> None:
        """Forgets the rows behind `lengths`."""
        if any(n > used for n, used in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate a cache of {self.lengths} rows to {list(lengths)}")
        self.lengths, self.next_position = list(lengths), next_position
