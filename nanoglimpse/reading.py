"""Reading prompts: the rows that are left, the caches they have written, and what each step does.

A method may stop a reading after some layers, look, and keep fewer rows; the reading then goes on
with those, at their original positions. What was dropped leaves the cache of all layers in one
gather ("all", as GlimpsePrune does), or stays in those that have run ("later"). A method that asks
for keys and queries alone stops inside the last of these layers: all rows have written their keys
and values there, and once it has chosen, only what survives attends to them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .batch import Batch, last_rows
from .cache import Cache, Rows, Stack
from .config import TextConfig
from .decoder import Block, Decoder
from .kernels.ops import Ops, Packing, Queries, Rope
from .rope import mrope

KV_DROPS = ("all", "later")


class Seen:
    """A layer that has run, for a method to read attention from.

    Attributes:
        k: [T, H, D], its keys of the prompts' rows.
    """

    def __init__(self, block: Block, hidden: Tensor, rope: Rope, k: Tensor, counts: Sequence[int]):
        self.block, self.hidden, self.rope, self.k, self.counts = block, hidden, rope, k, counts

    def logits(self, rows: Tensor) -> Tensor:
        """Raw logits [T, HQ] of one row a prompt, int64 [B] in `hidden`, to its prompt's rows."""
        q = self.block.query(self.hidden[rows], self.rope[rows])
        pairs = zip(q, self.k.split(self.counts), strict=True)
        return torch.cat([self.block.ops.row_logits(*pair) for pair in pairs])

    def attention(self, rows: Tensor, prompt: int) -> Iterator[Tensor]:
        """Causal softmax of rows of one prompt, int64 [R]: of one after the other, [seen, HQ]."""
        first = sum(self.counts[:prompt])
        for q, seen in zip(
            self.block.query(self.hidden[rows], self.rope[rows]),
            (rows - first + 1).tolist(),
            strict=True,
        ):
            yield self.block.ops.row_logits(q, self.k[first : first + seen]).float().softmax(0)


class Reading:
    """B prompts on their way through the decoder.

    Attributes:
        batch: the prompts' rows that are left.
        hidden: [T, C], their state; with a probe behind each prompt [T + B, C] until `keep`.
        kept: bool [N], the visual tokens that are left of those at the beginning.
        layers: how many have run.
        processed: visual tokens of each prompt that each of them has seen.
    """

    def __init__(
        self, decoder: Decoder, config: TextConfig, ops: Ops, batch: Batch, visual: Tensor
    ):
        self.decoder, self.config, self.ops, self.batch = decoder, config, ops, batch
        self.hidden = self.embed(visual)
        self.kept = torch.ones(len(visual), dtype=torch.bool, device=visual.device)
        self.layers, self.processed = 0, []
        self.cache: Cache | None = None
        self.base = 0  # the layer that the first one of the cache belongs to
        self.finished: list[Cache] = []
        self.own: slice | Tensor = slice(None)
        self._attend: Callable | None = None

    @property
    def inside(self) -> bool:
        """Whether the state is still the input of the last layer, which has only written."""
        return self._attend is not None

    def embed(self, visual: Tensor) -> Tensor:
        """[T, C], what the first layer sees; visual [N, C]."""
        hidden = self.decoder.embed_tokens(self.batch.token_ids)
        hidden[self.batch.visual_rows] = visual
        return hidden

    @property
    def prompts(self) -> Tensor:
        """[T, C], the state of the prompts' rows, without probes."""
        return self.hidden[self.own]

    def run(
        self, stop: int, probe: Tensor | None, reads: Sequence[int], inside: bool = False
    ) -> dict[int, Seen]:
        """The layers up to `stop`, a number of layers.

        Args:
            stop: at least the number that have run.
            probe: [L, C], added before each layer to a row behind every prompt, if there is one.
            reads: layers of whose attention something is wanted.
            inside: stop inside the last of them, where one runs; `attend` has to follow.

        Returns:
            The layers read. The rows that ask stand in `asking`: the probes, or else each prompt's
            last row.
        """
        counts, positions, device = self.batch.counts, self.batch.positions, self.hidden.device
        self.asking, first = last_rows(counts, device), self.layers
        if probe is not None:
            self.own, self.asking = self.batch.prompt_rows, self.batch.probe_rows
            counts = [n + 1 for n in counts]
            self.hidden = self.batch.with_probes(self.hidden, 0)
            next_position = self.batch.next_position[:, None]
            positions = self.batch.with_probes(positions.T, next_position).T
        rope = mrope(positions, self.config)
        if self.cache is None:
            self.cache, self.base = self._cache(stop - first, counts), first
        rows, packing = self.cache.used(), Packing(counts, device)
        read: dict[int, Seen] = {}
        for layer in range(first, stop):
            block = self.decoder.layers[layer]
            if probe is not None:
                self.hidden[self.asking] += probe[layer]
            before, place = self.hidden, (self.cache, layer - self.base, rows)
            if inside and layer == stop - 1:
                block.write(before, rope, *place)
                self._attend = partial(self._attend_some, block, rope, place, packing)
            else:
                self.hidden = block(before, rope, *place, packing)
            if layer in reads:
                k = self.cache.k[layer - self.base, rows][self.own]
                read[layer] = Seen(block, before, rope, k, self.batch.counts)
        self.processed += [self.batch.visual_counts] * (stop - first)
        self.layers = stop
        return read

    def attend(self, kept: Tensor) -> None:
        """The rest of a layer that was stopped inside, for the rows that stay.

        Args:
            kept: as `keep`, which has to follow: the state of all other rows lags behind.
        """
        rows, counts = self.batch.survivors(kept)
        stays = torch.arange(len(self.hidden), device=self.hidden.device)[self.own][rows]
        self.hidden[stays] = self._attend(stays, counts)
        self._attend = None

    def keep(self, kept: Tensor, values: Tensor | None, kv_drop: str, room: int) -> None:
        """Goes on with fewer rows; the probes are gone.

        Args:
            kept: bool, of the visual tokens that are left, those that stay.
            values: [those, C], what they are from here on; as they are if None.
            kv_drop: of KV_DROPS.
            room: cache rows to leave free behind each prompt.
        """
        rows, counts = self.batch.survivors(kept)
        everything = torch.arange(len(self.hidden), device=self.hidden.device)[self.own]
        if kv_drop == "all":
            depth, stays = len(self.decoder.layers), everything[rows]
            self.hidden, self.cache = self.cache.keep_with(self.hidden, stays, counts, depth, room)
            self.base = 0
        else:
            written = self.cache.keep(everything, self.batch.counts, len(self.cache.k), room)
            self.finished.append(written)
            self.hidden, self.cache = self.hidden[everything[rows]], None
        self.batch, self.own = self.batch.keep(rows, kept, counts), slice(None)
        self.kept = self.kept.masked_scatter(self.kept, kept)
        if values is not None:
            self.hidden[self.batch.visual_rows] = values

    def _attend_some(
        self,
        block: Block,
        rope: Rope,
        place: tuple[Cache, int, Rows],
        packing: Packing,
        stays: Tensor,
        counts: list[int],
    ) -> Tensor:
        starts = packing.cu_seqlens[:-1].repeat_interleave(
            torch.tensor(counts, device=stays.device)
        )
        queries = Queries(Packing(counts, stays.device), stays - starts)
        return block.attend_some(self.hidden[stays], rope[stays], *place, packing, queries)

    def finish(self, room: int) -> tuple[Tensor, Cache | Stack]:
        """The layers that are left: logits [B, vocab] of the last rows, and the cache of all."""
        depth, counts, device = len(self.decoder.layers), self.batch.counts, self.hidden.device
        if self.cache is None:
            own = self._cache(depth - self.layers, counts, room)
            self.cache = Stack([*self.finished, own]) if self.finished else own
        logits = self.decoder.prefill_tail(
            self.hidden,
            mrope(self.batch.positions, self.config),
            self.cache,
            self.cache.used(),
            Packing(counts, device),
            self.layers,
            last_rows(counts, device),
        )
        return logits, self.cache

    def budget(self) -> tuple[list[list[int]], list[list[int]]]:
        """[L][B], visual tokens that each layer has processed, and those that its cache holds."""
        left, depth = self.batch.visual_counts, len(self.decoder.layers)
        rest = [left] * (depth - self.layers)
        below = self.processed if self.finished else [left] * self.layers
        return self.processed + rest, below + rest

    def _cache(self, layers: int, counts: Sequence[int], room: int = 0) -> Cache:
        capacity = [n + room for n in counts]
        position = self.batch.next_position
        cache = Cache(self.config, layers, capacity, position, self.hidden, self.ops)
        cache.extend(counts)
        return cache
