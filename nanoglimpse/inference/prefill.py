"""Prefill state: the surviving rows, their KV caches, and the steps that advance them.

A method may stop after some layers and drop rows; the others continue at their original positions.
Dropped rows leave the cache of all layers in one gather ("all", as in GlimpsePrune), or stay in the
layers that have run ("later"). A method that reads keys and queries only stops inside the last of
these layers: all rows have written their keys and values there, and once it has decided, only the
survivors attend to them.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanoglimpse.inference.outputs import Clock, Prefill
from nanoglimpse.inference.prefix import Prefix
from nanoglimpse.inputs.prompt import PackedBatch, interleave, last_rows
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.gather import SurvivorAttention
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import Segments, upload
from nanoglimpse.kvcache.cache import KVCache, LayerKV, Reserved
from nanoglimpse.kvcache.layered import LayeredKVCache
from nanoglimpse.methods.context import Decision, LayerAttention, PruningContext
from nanoglimpse.methods.options import ResolvedPruning
from nanoglimpse.model.decoder import Block, Probe, run_layers
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import mrope
from nanoglimpse.model.vision import VisionOutput


@dataclass(frozen=True)
class DeferredLayer:
    """A layer to which all rows have written, and in which only survivors will attend.

    Attributes:
        normed: [T, C], its rows after the first norm.
        scores: the query rows and their raw logits [T, HQ]; None if the method does not read them.
    """

    block: Block
    rope: Rope
    kv: LayerKV
    segments: Segments
    normed: Tensor
    scores: tuple[Tensor, Tensor] | None

    def attention(self, rows: Tensor, counts: list[int]) -> SurvivorAttention:
        """Attention of `rows`, int64 [S], `counts` in each sequence; the layer's `output` is next.

        It only reads what the layers have written, so it can run beside the gather of these rows.
        """
        starts = self.segments.cu_seqlens[:-1].repeat_interleave(
            upload(torch.tensor(counts), rows.device), output_size=len(rows)
        )
        queries = Queries(Segments(counts, rows.device), rows - starts)
        q = self.block.query_of_normed(self.normed[rows], self.rope[rows])
        return SurvivorAttention(q, *self.kv.in_use(), self.segments, queries)


class PrefillState:
    """B prompts on their way through the decoder.

    Args:
        model: runs them.
        batch: the prompts before any pruning.
        vision: output of the vision encoder for their pictures.
        pruning: which rows are dropped, and where.
        clock: measures the stages.
        headroom: free cache rows after each prompt, for its answer.
        prefix: the first rows of the one prompt, which have run up to the first pruning layer
            inside the decoder; None if no row has.
        trace: keep the hidden rows before each gather; pruning then waits for the end of a layer.

    Attributes:
        batch: the prompts' rows that survive.
        hidden: [T, C], the state of these rows, [T + B, C] with a probe row after each prompt; only
            rows after the prefix until it has been joined.
        rows: int64 [T], where the prompts' rows are in `hidden`.
        query_rows: int64 [B], the rows whose attention is scored: probes, or else the last rows.
        kept: bool [N], the visual tokens that survive, of those before any pruning.
        layer: how many layers have run.
        stage: how many decisions have been applied.
        processed: visual tokens of each prompt in each layer that has run.
        traced: hidden rows before the last gather; None without `trace`.
        importance, glimpse_logits: of the last decision.
    """

    def __init__(
        self,
        model: Model,
        batch: PackedBatch,
        vision: VisionOutput,
        pruning: ResolvedPruning,
        clock: Clock,
        headroom: int,
        prefix: Prefix | None = None,
        trace: bool = False,
    ):
        self.model, self.prompts, self.vision, self.pruning = model, batch, vision, pruning
        self.clock, self.headroom, self.trace = clock, headroom, trace
        self.batch, self.prefix = batch, prefix
        self.kept = torch.ones(len(vision.visual), dtype=torch.bool, device=model.device)
        self.stage = 0
        self.importance: Tensor | None = None
        self.glimpse_logits: Tensor | None = None
        if prefix is not None and prefix.stage:
            self.batch, _ = batch.keep(prefix.kept)
            self.kept, self.stage, self.importance = prefix.kept, prefix.stage, prefix.importance
        self.hidden = self._embed(vision.visual)
        self.rows = torch.arange(len(self.batch.token_ids), device=model.device)
        self.query_rows = last_rows(self.batch.counts, model.device)
        self.layer = 0
        self.processed: list[list[int]] = []
        self.traced: Tensor | None = None
        self.cache = self._new_cache(range(0), self.batch.counts, 0)
        self.finished: list[KVCache] = []
        self.deferred: DeferredLayer | None = None

    @property
    def cached(self) -> int:
        """Rows that a prefix has run and that `hidden` does not hold yet."""
        return 0 if self.prefix is None else self.prefix.num_rows

    def _embed(self, visual: Tensor) -> Tensor:
        """Input of the first layer: [T, C]; [T - P, C] after a prefix, which has all pictures."""
        batch, embed = self.batch, self.model.decoder.embed_tokens
        if self.prefix is not None:
            return embed(batch.token_ids[self.cached :])
        hidden = embed(batch.token_ids)
        hidden[batch.visual_rows] = visual
        return hidden

    def run_to(self, layer: int) -> dict[int, LayerAttention]:
        """Runs layers until `layer` of them have run; returns those that the method reads."""
        device, counts, positions = self.model.device, self.batch.counts, self.batch.positions
        probe, vectors, prefix, cached = None, self.pruning.probe, self.prefix, self.cached
        self.query_rows = last_rows(counts, device)
        if vectors is not None:
            new = [n - cached for n in counts]
            self.hidden, _ = interleave(self.hidden, vectors.new_zeros(1), new)
            next_position = self.batch.next_position[:, None]
            rows, self.rows = interleave(positions.T, next_position, counts)
            positions, counts = rows.T, [n + 1 for n in counts]
            self.query_rows = last_rows(counts, device)
            probe = Probe(vectors, self.query_rows - cached)
        rope, segments = mrope(positions, self.model.text), Segments(counts, device)
        layers = range(self.layer, layer)
        kv = self._reserve(layers, counts)
        # The rows of a prefix have run to the end of its last layer, and all others are text.
        defer = not (self.pruning.needs.hidden or self.trace or prefix is not None or not layers)
        reads = defer and layers[-1] in self.pruning.needs.attention
        hidden, inputs = run_layers(
            self.model.decoder,
            self.hidden,
            rope[cached:],
            kv,
            segments,
            layers,
            queries=self._queries(counts),
            probe=probe,
            capture=self.pruning.needs.attention,
            write_last=partial(self._defer, reads) if defer else None,
        )
        if prefix is not None and layers:
            hidden = torch.cat((prefix.hidden, hidden))
            inputs = {at: torch.cat((prefix.inputs[at], new)) for at, new in inputs.items()}
            self.prefix = None
        self.hidden, self.layer = hidden, layer
        self.processed += [self.batch.visual_counts] * len(layers)
        if layers:
            self.clock.lap(f"layers < {layer}")
        return {at: self._attention(at, x, rope, kv, segments) for at, x in inputs.items()}

    def _defer(
        self, reads: bool, block: Block, hidden: Tensor, rope: Rope, kv: LayerKV, segments: Segments
    ) -> None:
        """Runs a layer as far as the decision needs it, which reads its logits or does not."""
        rows = self.query_rows if reads else None
        normed, logits = block.write(hidden, rope, kv, segments, rows)
        scores = None if logits is None else (self.query_rows, logits)
        self.deferred = DeferredLayer(block, rope, kv, segments, normed, scores)

    def _attention(
        self, layer: int, hidden: Tensor, rope: Rope, kv: Reserved, segments: Segments
    ) -> LayerAttention:
        block, (k, _) = self.model.decoder.layers[layer], kv.layer(layer).in_use()
        deferred, scores = self.deferred, None
        if deferred is not None and deferred.block is block:
            scores = deferred.scores
        return LayerAttention(block, hidden, rope, k, segments, self.rows, scores)

    def _queries(self, counts: list[int]) -> Queries | None:
        """Which rows of the one prompt run, where a prefix holds the others; None if all run."""
        if not self.cached:
            return None
        device, (total,) = self.model.device, counts
        places = torch.arange(self.cached, total, device=device)
        return Queries(Segments([len(places)], device), places)

    def _reserve(self, layers: range, counts: list[int], final: bool = False) -> Reserved:
        """Rows of a cache for keys and values in these layers; `final`: for the answer as well."""
        headroom = self.headroom if final else 0
        if self.prefix is not None:
            new, position = sum(counts) - self.cached, self.batch.next_position
            find = self.prefix.copy if final else self.prefix.writable
            self.cache = find(position, new + headroom)
            return self.cache.reserve([new])
        if layers.stop > self.cache.layers.stop:
            self.cache = self._new_cache(layers, counts, headroom)
        return self.cache.rewrite()

    def _new_cache(self, layers: range, counts: list[int], headroom: int) -> KVCache:
        """A cache whose rows are in use, to be written."""
        capacity, position = [n + headroom for n in counts], self.batch.next_position
        cache = KVCache(self.model.text, layers, capacity, position, self.hidden, self.model.ops)
        cache.reserve(counts)
        return cache

    def context(self, layers: dict[int, LayerAttention]) -> PruningContext:
        """What the method reads at the present layer."""
        hidden = None
        if self.deferred is None:
            plain = len(self.rows) == len(self.hidden)
            hidden = self.hidden if plain else self.hidden[self.rows]
        return PruningContext(
            model=self.model,
            rule=self.pruning.rule,
            stage=self.stage,
            vision=self.vision,
            kept=self.kept,
            original_counts=self.prompts.visual_counts,
            layers=layers,
            packed=self.batch,
            scored_rows=self.query_rows,
            hidden_rows=hidden,
            has_question=self.layer > 0 or self.pruning.needs.question,
        )

    def keep(self, decision: Decision) -> None:
        """Drops the rows that a method does not keep, and its probes."""
        self.clock.lap("score")
        batch, depth = self.batch, self.model.depth
        self.batch, rows = batch.keep(decision.kept)
        survivors, counts = self.rows[rows], self.batch.counts
        deferred = self.deferred
        attends = None if deferred is None else deferred.attention(survivors, counts)
        if self.trace:
            self.traced = self.hidden[self.rows]
        if self.pruning.kv_drop == "all":
            place = (counts, range(depth), self.headroom, attends)
            self.cache, self.hidden, attended = self.cache.gather(self.hidden, survivors, *place)
        else:
            # Only the probes leave these layers.
            place = (batch.counts, self.cache.layers, self.headroom, attends)
            nothing = self.hidden[:, :0]
            finished, _, attended = self.cache.gather(nothing, self.rows, *place)
            self.finished.append(finished)
            self.hidden = self.hidden[survivors]
            self.cache = self._new_cache(range(self.layer, self.layer), counts, 0)
        if deferred is not None and attended is not None:
            self.hidden, self.deferred = deferred.block.output(self.hidden, attended), None
            self.clock.lap(f"layers < {self.layer}")
        self.rows = torch.arange(len(rows), device=self.model.device)
        self.kept = self.kept.masked_scatter(self.kept, decision.kept)
        if decision.values is not None:
            self.hidden[self.batch.visual_rows] = decision.values
        self.importance, self.glimpse_logits = decision.importance, decision.glimpse_logits
        self.stage += 1
        self.clock.lap("keep")

    def finish(self) -> Prefill:
        """Runs the remaining layers, up to the logits [B, vocab] of the last rows."""
        decoder, counts, device = self.model.decoder, self.batch.counts, self.model.device
        layers = range(self.layer, self.model.depth)
        last = last_rows([n - self.cached for n in counts], device)
        rope = mrope(self.batch.positions[:, self.cached :], self.model.text)
        kv = self._reserve(layers, counts, final=True)
        hidden, _ = run_layers(
            decoder,
            self.hidden,
            rope,
            kv,
            Segments(counts, device),
            layers,
            queries=self._queries(counts),
            write_last=Block.write,
        )
        hidden = hidden[last]
        if layers:
            block = decoder.layers[layers[-1]]
            hidden = block.attend_last(hidden, rope[last], kv.layer(layers[-1]))
        logits = decoder.logits(hidden)
        self.clock.lap(f"layers ≥ {self.layer}" if self.layer else "layers")
        caches = [*self.finished, self.cache]
        processed, cached = self._budget()
        return Prefill(
            pruning=self.pruning,
            visual=self.vision.visual,
            taps=self.vision.taps,
            glimpse_logits=self.glimpse_logits,
            importance=self.importance,
            kept=self.kept,
            positions=self.batch.positions,
            hidden=self.traced,
            logits=logits,
            cache=LayeredKVCache(caches) if self.finished else self.cache,
            processed=processed,
            cached=cached,
            batch=self.prompts,
            clock=self.clock,
        )

    def _budget(self) -> tuple[list[list[int]], list[list[int]]]:
        """[L][B], visual tokens in each layer's prefill, and those that its cache holds."""
        rest = [self.batch.visual_counts] * (self.model.depth - self.layer)
        below = self.processed if self.finished else [self.batch.visual_counts] * self.layer
        return self.processed + rest, below + rest
