"""The rows with which several prompts begin, run once through the layers that all of them share.

Attention is causal: rows do not depend on later ones, until a method drops rows because of a
question. A prefix therefore runs up to the first layer inside the decoder after which the method
prunes, or through all layers if there is none.

It is one sequence of P rows at the start of a cache with free rows behind it. The rows of a prompt
use the free rows until the survivors have been gathered into another cache, and the next prompt
overwrites them. Nothing has to be undone, whatever happens to the prompt.
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
    """The layers through which a prefix runs.

    Attributes:
        stop: the first pruning layer of the method inside the decoder; None without one.
        captured: layers whose inputs the method may read.
        depth: number of layers of the decoder.
    """

    stop: int | None
    captured: tuple[int, ...]
    depth: int

    @classmethod
    def of(cls, pruning: ResolvedPruning, depth: int) -> "SharedLayers":
        """The layers whose output does not depend on the question."""
        stop = next((layer for layer in pruning.layers if layer), None)
        needed = pruning.needs.attention
        captured = tuple(layer for layer in needed if stop and layer < stop)
        return cls(stop, captured, depth)

    @property
    def layers(self) -> range:
        """The layers. Without a stop, the last one only writes keys and values."""
        return range(self.depth if self.stop is None else self.stop)


@dataclass
class Prefix:
    """The first P rows of prompts, after the shared layers.

    Attributes:
        shared: the layers.
        batch: the rows, without those dropped before the decoder.
        kept: bool [N], the visual tokens that a decision before the decoder has kept.
        stage: number of decisions so far, 0 or 1.
        importance: [N], importance of that decision.
        cache: cache of the shared layers; P rows are the prefix, and later ones are scratch.
        hidden: [P, C], output of the shared layers; [0, C] without a stop.
        inputs: [P, C] for each captured layer.
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
        """Runs the rows `hidden` [P, C] of `batch` through the shared layers."""
        none, capacity = hidden[:0], [len(batch.token_ids) + HEADROOM]
        cache = KVCache(model.text, shared.layers, capacity, batch.next_position, hidden, model.ops)
        empty = replace(batch, token_ids=batch.token_ids[:0])
        inputs = dict.fromkeys(shared.captured, none)
        prefix = cls(shared, empty, kept, stage, importance, cache, none, inputs)
        return prefix.extended(model, batch, kept, hidden)

    @property
    def num_rows(self) -> int:
        """P, the number of rows."""
        return len(self.batch.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.cache.k, self.cache.v, self.hidden, *self.inputs.values())
        return sum(tensor.nbytes for tensor in tensors)

    def extended(self, model: Model, batch: PackedBatch, kept: Tensor, hidden: Tensor) -> "Prefix":
        """A longer prefix in the same cache; only one of the two can be used afterwards.

        Args:
            model: model that runs the new rows.
            batch: all rows, those of this prefix first.
            kept: bool, for all visual tokens of the batch.
            hidden: [S, C], the new rows.
        """
        cache, shared = self.writable(batch.next_position, len(hidden)), self.shared
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
        """The cache with P rows in use and at least `headroom` free ones.

        A cache with fewer free rows is copied, with some for the next prompts as well.
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
