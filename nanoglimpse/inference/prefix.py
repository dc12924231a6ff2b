"""The rows that several prompts begin with, run once through the layers that no question changes.

Attention is causal, so rows do not depend on what follows them, until a method drops some of them
for the sake of a question. A prefix therefore runs up to the method's first pruning layer inside
the decoder, or through all layers without one.

It is one sequence of P rows at the beginning of a cache with free rows after it. A prompt's own
rows use these until its survivors have been gathered into another cache; the next prompt overwrites
them. Nothing has to be undone, whatever becomes of the prompt.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoglimpse.inputs.prompt import PackedBatch
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.methods.options import ResolvedPruning
from nanoglimpse.model.decoder import Block, run_layers
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import mrope

# Free rows after a prefix before its cache has to be copied.
HEADROOM = 256


@dataclass(frozen=True)
class SharedLayers:
    """The layers that a prefix runs through.

    Attributes:
        stop: the method's first pruning layer inside the decoder; None without one.
        captured: layers whose input the method may read.
        depth: layers of the decoder.
    """

    stop: int | None
    captured: tuple[int, ...]
    depth: int

    @classmethod
    def of(cls, pruning: ResolvedPruning, depth: int) -> "SharedLayers":
        """Those that no question changes."""
        stop = next((layer for layer in pruning.layers if layer), None)
        needed = pruning.needs.attention
        captured = tuple(layer for layer in needed if stop and layer < stop)
        return cls(stop, captured, depth)

    @property
    def layers(self) -> range:
        """The layers. Without a stop, the last one only writes, since only prompts end there."""
        return range(self.depth if self.stop is None else self.stop)


@dataclass
class Prefix:
    """The first P rows of prompts, after the shared layers.

    Attributes:
        shared: the layers.
        batch: the rows, without those dropped before the decoder.
        kept: bool [N], the visual tokens that a decision before the decoder has kept.
        stage: decisions that have been made, 0 or 1.
        importance: [N], of that decision.
        cache: of the shared layers; P rows are the prefix, those after them are scratch.
        hidden: [P, C], output of the shared layers; [0, C] without a stop.
        inputs: of each captured layer, [P, C].
    """

    shared: SharedLayers
    batch: PackedBatch
    kept: Tensor
    stage: int
    importance: Tensor | None
    cache: KVCache
    hidden: Tensor
    inputs: dict[int, Tensor]

    @classmethod
    def begin(
        cls,
        model: Model,
        shared: SharedLayers,
        batch: PackedBatch,
        kept: Tensor,
        hidden: Tensor,
        stage: int,
        importance: Tensor | None,
    ) -> "Prefix":
        """Runs rows [P, C] of `batch`, which have run through no layer."""
        none, capacity = hidden[:0], [len(batch.token_ids) + HEADROOM]
        cache = KVCache(model.text, shared.layers, capacity, batch.next_position, hidden, model.ops)
        empty = replace(batch, token_ids=batch.token_ids[:0])
        inputs = dict.fromkeys(shared.captured, none)
        prefix = cls(shared, empty, kept, stage, importance, cache, none, inputs)
        return prefix.extended(model, batch, kept, hidden)

    @property
    def num_rows(self) -> int:
        """P."""
        return len(self.batch.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.cache.k, self.cache.v, self.hidden, *self.inputs.values())
        return sum(tensor.nbytes for tensor in tensors)

    def extended(self, model: Model, batch: PackedBatch, kept: Tensor, hidden: Tensor) -> "Prefix":
        """A longer prefix in the same cache; only one of the two can be used afterwards.

        Args:
            model: runs the new rows.
            batch: all rows, these first.
            kept: bool, of all their visual tokens.
            hidden: [S, C], the new rows.
        """
        cache, shared, cached = self.writable(batch.next_position, len(hidden)), self.shared, 0
        cached, device = self.num_rows, hidden.device
        kv, queries = cache.reserve([len(hidden)]), None
        if cached:
            places = torch.arange(cached, cached + len(hidden), device=device)
            queries = Queries(Segments([len(hidden)], device), places)
        hidden, inputs = run_layers(
            model.decoder,
            hidden,
            mrope(batch.positions[:, cached:], model.text),
            kv,
            Segments(cache.lengths, device),
            shared.layers,
            queries=queries,
            capture=shared.captured,
            write_last=Block.write if shared.stop is None else None,
        )
        return replace(
            self,
            batch=batch,
            kept=kept,
            hidden=self.hidden if shared.stop is None else torch.cat((self.hidden, hidden)),
            inputs={layer: torch.cat((self.inputs[layer], x)) for layer, x in inputs.items()},
        )

    def writable(self, next_position: Tensor, headroom: int) -> KVCache:
        """The cache with P rows in use and at least `headroom` free ones, to be overwritten.

        Where there are fewer it is copied, with free rows for the next prompts as well.
        """
        free = self.cache.capacity[0] - self.num_rows
        snapshot = ([self.num_rows], next_position)
        self.cache = self.cache.restored(snapshot, headroom if headroom <= free else 2 * headroom)
        return self.cache

    def copy(self, next_position: Tensor, headroom: int) -> KVCache:
        """Another cache with the P rows and `headroom` free ones."""
        self.cache.truncate([self.num_rows], next_position)
        rows = torch.arange(self.num_rows, device=self.cache.k.device)
        return self.cache.keep(rows, [self.num_rows], self.cache.layers, headroom)
