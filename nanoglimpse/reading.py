"""Reading prompts: the rows that are left, the caches they have written, and what each step does.

A method may stop a reading after some layers, look, and keep fewer rows; the reading then goes on
with those, at their original positions. What was dropped leaves the cache of all layers in one
gather ("all", as GlimpsePrune does), or stays in those that have run ("later").
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch import Batch, last_rows
from .cache import Cache, Stack
from .config import TextConfig
from .decoder import Decoder
from .kernels.ops import Ops, Packing
from .rope import mrope

KV_DROPS = ("all", "later")


class Reading:
    """B prompts on their way through the decoder.

    Attributes:
        batch: the prompts' rows that are left.
        hidden: [T, C], their state; with a probe behind each prompt [T + B, C] until `keep`.
        kept: bool [N], the visual tokens that are left of those at the beginning.
        layers: how many have run.
        processed: visual tokens that each of them has seen.
    """

    def __init__(
        self, decoder: Decoder, config: TextConfig, ops: Ops, batch: Batch, visual: Tensor
    ):
        self.decoder, self.config, self.ops, self.batch = decoder, config, ops, batch
        self.hidden = decoder.embed_tokens(batch.token_ids)
        self.hidden[batch.visual_rows] = visual
        self.kept = torch.ones(len(visual), dtype=torch.bool, device=visual.device)
        self.layers, self.processed = 0, []
        self.cache: Cache | None = None
        self.base = 0  # the layer that the first one of the cache belongs to
        self.finished: list[Cache] = []
        self.own: slice | Tensor = slice(None)

    @property
    def prompts(self) -> Tensor:
        """[T, C], the state of the prompts' rows, without probes."""
        return self.hidden[self.own]

    def run(self, stop: int, probe: Tensor | None, reads: Sequence[int]) -> dict[int, Tensor]:
        """The layers up to `stop`, a number of layers.

        Args:
            stop: at least the number that have run.
            probe: [L, C], added before each layer to a row behind every prompt, if there is one.
            reads: layers of whose attention something is wanted.

        Returns:
            For each layer read, the raw logits [T, HQ] of the asking row, which is the probe or
            else each prompt's last row, to the rows of its prompt.
        """
        counts, positions, device = self.batch.counts, self.batch.positions, self.hidden.device
        asking, first = last_rows(counts, device), self.layers
        if probe is not None:
            self.own, asking = self.batch.prompt_rows, self.batch.probe_rows
            counts = [n + 1 for n in counts]
            self.hidden = self.batch.with_probes(self.hidden, 0)
            next_position = self.batch.next_position[:, None]
            positions = self.batch.with_probes(positions.T, next_position).T
        rope = mrope(positions, self.config)
        if self.cache is None:
            self.cache, self.base = self._cache(stop - first, counts), first
        rows, packing, read = self.cache.used(), Packing(counts, device), {}
        for layer in range(first, stop):
            block = self.decoder.layers[layer]
            if probe is not None:
                self.hidden[asking] += probe[layer]
            asked = self.hidden[asking]
            self.hidden = block(self.hidden, rope, self.cache, layer - self.base, rows, packing)
            if layer in reads:
                q = block.query(asked, rope[asking])
                k = self.cache.k[layer - self.base, rows][self.own].split(self.batch.counts)
                pairs = zip(q, k, strict=True)
                read[layer] = torch.cat([self.ops.row_logits(*pair) for pair in pairs])
        self.processed += [sum(self.batch.visual_counts)] * (stop - first)
        self.layers = stop
        return read

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
            depth = len(self.decoder.layers)
            self.cache, self.base = self.cache.keep(everything[rows], counts, depth, room), 0
        else:
            written = self.cache.keep(everything, self.batch.counts, len(self.cache.k), room)
            self.finished.append(written)
            self.cache = None
        self.hidden = self.hidden[everything[rows]]
        self.batch, self.own = self.batch.keep(rows, kept, counts), slice(None)
        self.kept = self.kept.masked_scatter(self.kept, kept)
        if values is not None:
            self.hidden[self.batch.visual_rows] = values

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

    def budget(self) -> tuple[list[int], list[int]]:
        """Visual tokens that each layer has processed, and those that its cache holds."""
        left, depth = sum(self.batch.visual_counts), len(self.decoder.layers)
        rest = [left] * (depth - self.layers)
        below = self.processed if self.finished else [left] * self.layers
        return self.processed + rest, below + rest

    def _cache(self, layers: int, counts: Sequence[int], room: int = 0) -> Cache:
        capacity = [n + room for n in counts]
        position = self.batch.next_position
        cache = Cache(self.config, layers, capacity, position, self.hidden, self.ops)
        cache.extend(counts)
        return cache
