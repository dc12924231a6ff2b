"""What prompts that begin with the same rows share: those rows, through the first layers, once.

Attention is causal, so that rows do not depend on what follows them. They begin to where a method
looks and drops some of them for the question's sake. A prefix therefore goes as far as the method's
first stop inside the decoder, or through all layers if there is none.

One sequence, P rows. They lie at the beginning of a cache with room behind them. A prompt's own
rows use this room until its survivors are gathered into a cache of its own; the next prompt writes
over them. Nothing has to be undone, whatever has become of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch import Batch, last_rows
from .cache import Cache, Rows
from .config import TextConfig
from .decoder import Decoder
from .kernels.ops import Ops, Packing, Queries, Rope
from .methods import Choice
from .reading import Reading, Seen
from .rope import mrope

# Rows that a cache takes behind a prefix before it has to be copied.
ROOM = 256


@dataclass(frozen=True)
class Stretch:
    """The layers that a prefix goes through.

    Attributes:
        stop: the method's first stop inside the decoder; None without one.
        reads: layers whose input the method may want.
        depth: layers of the decoder.
    """

    stop: int | None
    reads: tuple[int, ...]
    depth: int

    @property
    def layers(self) -> int:
        """How many run for all rows. In the last of all only the last row of a prompt attends."""
        return self.depth - 1 if self.stop is None else self.stop

    @property
    def cached(self) -> int:
        """How many leave keys and values."""
        return self.depth if self.stop is None else self.stop


@dataclass
class Prefix:
    """The first P rows of prompts, read.

    Attributes:
        stretch: the layers.
        batch: the rows, without those that a choice before the decoder has dropped.
        kept: bool [N], what such a choice has left of the visual tokens.
        choice: it, or None.
        cache: of the stretch; P rows are the prefix, those behind them scratch.
        hidden: [P, C], behind the stretch; [0, C] if it has no stop, where nobody would ask.
        inputs: by layer read, [P, C], what has gone into it.
    """

    stretch: Stretch
    batch: Batch
    kept: Tensor
    choice: Choice | None
    cache: Cache
    hidden: Tensor
    inputs: dict[int, Tensor]

    @classmethod
    def of(cls, reading: Reading, stretch: Stretch, choice: Choice | None) -> "Prefix":
        """Reads the rows of a reading that has run no layer; `choice` has been made for it."""
        batch, none = reading.batch, reading.hidden[:0]
        size = (stretch.cached, [len(batch.token_ids) + ROOM])
        cache = Cache(reading.config, *size, batch.next_position, none, reading.ops)
        nothing = replace(batch, token_ids=batch.token_ids[:0])
        inputs = dict.fromkeys(stretch.reads, none)
        prefix = cls(stretch, nothing, reading.kept, choice, cache, none, inputs)
        return prefix.followed(reading.decoder, batch, reading.kept, reading.hidden)

    @property
    def rows(self) -> int:
        """P."""
        return len(self.batch.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        tensors = (self.cache.k, self.cache.v, self.hidden, *self.inputs.values())
        return sum(tensor.nbytes for tensor in tensors)

    def followed(self, decoder: Decoder, batch: Batch, kept: Tensor, hidden: Tensor) -> "Prefix":
        """A longer prefix in the same cache: only one of the two can be used from here on.

        Args:
            decoder: reads the new rows.
            batch: all rows, these first.
            kept: bool, of all their visual tokens.
            hidden: [S, C], the new rows.
        """
        cache = self.opened(batch.next_position, len(hidden))
        rope = mrope(batch.positions[:, self.rows :], cache.config)
        rows, stretch = cache.extend([len(hidden)]), self.stretch
        hidden, inputs = append(decoder, hidden, rope, cache, rows, stretch)
        if stretch.stop is None:
            decoder.layers[stretch.layers].write(hidden, rope, cache, stretch.layers, rows)
            hidden = hidden[:0]
        return replace(
            self,
            batch=batch,
            kept=kept,
            hidden=torch.cat((self.hidden, hidden)),
            inputs={layer: torch.cat((self.inputs[layer], x)) for layer, x in inputs.items()},
        )

    def opened(self, next_position: Tensor, room: int) -> Cache:
        """The cache with P rows in use and room for so many more, to be written over.

        Where there is less it is copied, with room for the next ones, too.
        """
        free = self.cache.capacity[0] - self.rows
        state = ([self.rows], next_position)
        self.cache = self.cache.rewound(state, room if room <= free else 2 * room)
        return self.cache

    def copied(self, next_position: Tensor, room: int) -> Cache:
        """A cache of one's own with the P rows and room for so many more."""
        self.cache.truncate([self.rows], next_position)
        rows = torch.arange(self.rows, device=self.cache.k.device)
        return self.cache.keep(rows, [self.rows], len(self.cache.k), room)


class Resumed(Reading):
    """One prompt whose first rows have been read: the others run behind them.

    Up to the end of the stretch `hidden` are the others alone; a method then sees all of them.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: TextConfig,
        ops: Ops,
        batch: Batch,
        visual: Tensor,
        prefix: Prefix,
    ):
        self.prefix = prefix
        super().__init__(decoder, config, ops, batch, visual)
        self.kept = prefix.kept

    def embed(self, visual: Tensor) -> Tensor:
        """[S, C], the rows behind the prefix; no visual tokens are among them."""
        return self.decoder.embed_tokens(self.batch.token_ids[self.prefix.rows :])

    def run(
        self, stop: int, probe: Tensor | None, reads: Sequence[int], inside: bool = False
    ) -> dict[int, Seen]:
        """As `Reading.run`; its first call ends the stretch, whose last layer is whole."""
        if self.layers:
            return super().run(stop, probe, reads, inside)
        prefix, batch, positions = self.prefix, self.batch, self.batch.positions
        self.own, self.asking = (
            slice(len(batch.token_ids)),
            last_rows(batch.counts, self.hidden.device),
        )
        if probe is not None:
            self.asking = batch.probe_rows
            self.hidden = torch.cat((self.hidden, self.hidden.new_zeros(1, probe.shape[1])))
            positions = torch.cat((positions, batch.next_position.expand(3, 1)), dim=1)
        rope = mrope(positions, self.config)
        self.cache = prefix.opened(batch.next_position, len(self.hidden))
        rows = self.cache.extend([len(self.hidden)])
        place = (rope[prefix.rows :], self.cache, rows, prefix.stretch, probe)
        behind, inputs = append(self.decoder, self.hidden, *place)
        self.hidden = torch.cat((prefix.hidden, behind))
        self.processed += [batch.visual_counts] * stop
        self.layers = stop
        return {layer: self._seen(layer, x, rope) for layer, x in inputs.items()}

    def _seen(self, layer: int, behind: Tensor, rope: Rope) -> Seen:
        hidden = torch.cat((self.prefix.inputs[layer], behind))
        k = self.cache.k_rows[layer][self.own]
        return Seen(self.decoder.layers[layer], hidden, rope, k, self.batch.counts)

    def finish(self, room: int) -> tuple[Tensor, Cache]:
        """As `Reading.finish`, in a cache of its own."""
        if self.layers:
            return super().finish(room)
        prefix, count = self.prefix, len(self.hidden)
        rope = mrope(self.batch.positions[:, prefix.rows :], self.config)
        self.cache = prefix.copied(self.batch.next_position, count + room)
        rows, layers = self.cache.extend([count]), prefix.stretch.layers
        hidden, _ = append(self.decoder, self.hidden, rope, self.cache, rows, prefix.stretch)
        own, last = Packing([count], hidden.device), last_rows([count], hidden.device)
        tail = (rope, self.cache, rows, own, layers, last)
        return self.decoder.prefill_tail(hidden, *tail), self.cache


def append(
    decoder: Decoder,
    hidden: Tensor,
    rope: Rope,
    cache: Cache,
    rows: Rows,
    stretch: Stretch,
    probe: Tensor | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Runs rows through a stretch behind those that its cache holds.

    Args:
        decoder: whose layers run.
        hidden: [S, C], the input of the first layer.
        rope: tables of these rows.
        cache: of one sequence, the S rows last.
        rows: which they are.
        stretch: the layers.
        probe: [L, C], added before each layer to the last row, if there is one.

    Returns:
        [S, C], and the input of the layers read.
    """
    count, total = len(hidden), cache.lengths[0]
    packing, queries, inputs = Packing(cache.lengths, hidden.device), None, {}
    if count < total:
        places = torch.arange(total - count, total, device=hidden.device)
        queries = Queries(Packing([count], hidden.device), places)
    for layer in range(stretch.layers):
        if probe is not None:
            hidden[-1] += probe[layer]
        if layer in stretch.reads:
            inputs[layer] = hidden
        block = decoder.layers[layer]
        hidden = block.append(hidden, rope, cache, layer, rows, packing, queries)
    return hidden, inputs
