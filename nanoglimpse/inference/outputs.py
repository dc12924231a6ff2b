"""Results of a prefill and of an answer, with their budgets and costs."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanoglimpse.config import GREEDY, Sampling
from nanoglimpse.inputs.prompt import PackedBatch
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.kvcache.layered import LayeredKVCache
from nanoglimpse.methods.options import ResolvedPruning
from nanoglimpse.model.rope import Grid

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Budgets:
    """The budgets of a method, as shares of the N visual tokens of the unpruned prompt.

    Attributes:
        input_ratio: visual tokens that enter the decoder, over N.
        prefill_ratio: visual tokens in the prefill of a layer, mean over layers, over N.
        decode_kv_ratio: visual rows in the cache of a layer while decoding, mean over layers, over
            N (the paper's retention rate, Sec. 5.1).
    """

    input_ratio: float
    prefill_ratio: float
    decode_kv_ratio: float

    @classmethod
    def of(cls, processed: Sequence[int], cached: Sequence[int], total: int) -> "Budgets":
        """From visual tokens processed and cached in each layer, and N; all 1 without pictures."""
        if not total:
            return cls(1.0, 1.0, 1.0)
        layers = total * len(processed)
        return cls(processed[0] / total, sum(processed) / layers, sum(cached) / layers)


class Clock:
    """Measures named stages, on a GPU by events that do not synchronise."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.marks = [("", self._now())]

    def lap(self, name: str) -> None:
        """Ends the stage `name`, which began at the previous lap."""
        self.marks.append((name, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds of each stage, in order; laps of the same name are added up."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        spent: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            took = before.elapsed_time(after) if self.cuda else 1000 * (after - before)
            spent[name] = spent.get(name, 0.0) + took
        return spent


@dataclass
class Prefill:
    """A prompt, or several packed prompts, ready to be answered.

    T rows, of which N are visual tokens, belong to B prompts; T' of them survive.

    Attributes:
        pruning: method and rule.
        visual: [N, C], output of the vision encoder.
        taps: [M, N, Cv], features of the tapped blocks; M is 0 without glimpse weights.
        glimpse_logits: [N, HQ], raw attention of the glimpse row; None if dense.
        importance: [N], logits of the predictor, before the sigmoid; None if dense.
        kept: bool [N], the visual tokens that survive.
        positions: int64 [3, T'], M-RoPE ids of the surviving rows, unchanged.
        hidden: [T, C] after layer K, before the gather; None unless traced.
        logits: [vocab] of the last row; [B, vocab] for several prompts.
        cache: keys and values of the T' rows in all layers.
        processed: [L][B], visual tokens of each prompt in the prefill of each layer.
        cached: [L][B], visual tokens of each prompt in the cache of each layer.
        batch: the packed prompts, before pruning.
        clock: measures the stages.
    """

    pruning: ResolvedPruning
    visual: Tensor
    taps: Tensor
    glimpse_logits: Tensor | None
    importance: Tensor | None
    kept: Tensor
    positions: Tensor
    hidden: Tensor | None
    logits: Tensor
    cache: KVCache | LayeredKVCache
    processed: list[list[int]] = field(repr=False)
    cached: list[list[int]] = field(repr=False)
    batch: PackedBatch = field(repr=False)
    clock: Clock = field(repr=False)
    _snapshot: Any = field(init=False, repr=False)

    def __post_init__(self):
        self._snapshot = self.cache.snapshot()

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.pruning.method.name

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of each stage, in order."""
        return self.clock.milliseconds()

    @property
    def budgets(self) -> Budgets:
        """Budgets of all prompts together."""
        processed, cached = ([sum(layer) for layer in p] for p in (self.processed, self.cached))
        return Budgets.of(processed, cached, len(self.visual))

    def budgets_of(self, prompt: int) -> Budgets:
        """Budgets of one prompt."""
        processed, cached = ([row[prompt] for row in p] for p in (self.processed, self.cached))
        return Budgets.of(processed, cached, self.batch.visual_counts[prompt])

    def rewind(self, headroom: int) -> KVCache | LayeredKVCache:
        """The cache as the prefill left it, with `headroom` free rows in every sequence."""
        self.cache = self.cache.restored(self._snapshot, headroom)
        return self.cache

    def answer(self, prompt: int, rows: int, preprocess: float) -> "Answer":
        """The answer to one prompt before its first token, independent of the other prompts.

        Args:
            prompt: number of the prompt.
            rows: rows of the prompt in the cache after the prefill, summed over layers.
            preprocess: milliseconds spent on building the prompt.
        """
        batch, importance = self.batch, self.importance
        kept = self.kept.split(batch.visual_counts)[prompt].clone()
        if importance is not None and len(batch.counts) > 1:
            importance = importance.split(batch.visual_counts)[prompt].clone()
        unpruned = len(self.processed) * batch.counts[prompt]
        row_bytes = self.cache.nbytes // self.cache.num_rows
        stats = Stats(
            method=self.method,
            prompt_tokens=batch.counts[prompt],
            visual_tokens=batch.visual_counts[prompt],
            kept_tokens=int(kept.sum()),
            budgets=self.budgets_of(prompt),
            kv_rows=(unpruned, rows),
            kv_bytes=(unpruned * row_bytes, rows * row_bytes),
            timings={"preprocess": preprocess} | self.timings,
        )
        return Answer("", [], "stopped", kept, importance, batch.grids[prompt], stats)


@dataclass(frozen=True)
class Stats:
    """The cost of an answer.

    Attributes:
        method: name of the method.
        prompt_tokens: T, before pruning.
        visual_tokens: N.
        kept_tokens: visual tokens that survive.
        budgets: budgets of the method.
        kv_rows, kv_bytes: size of the cache over all layers, as (without pruning, with pruning).
        timings: milliseconds of each stage up to the first token, in order.
        first_token: milliseconds up to the first token.
        decode: milliseconds per token, mean over the tokens after the first.
        sampling: how tokens were chosen.
        sampling_defaults: the fields of it that generation_config.json has set.
        peak_bytes: peak memory so far, of the device on a GPU and of the process elsewhere.
    """

    method: str
    prompt_tokens: int
    visual_tokens: int
    kept_tokens: int
    budgets: Budgets
    kv_rows: tuple[int, int]
    kv_bytes: tuple[int, int]
    timings: dict[str, float]
    first_token: float = 0.0
    decode: float = 0.0
    peak_bytes: int = 0
    sampling: Sampling = GREEDY
    sampling_defaults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        text: the text, without control tokens.
        token_ids: the generated tokens; the last one ends the answer if `finish_reason` is "eos".
        finish_reason: "eos", "length", or "stopped" if the caller stopped iterating.
        kept: bool [N], the visual tokens that survive.
        importance: [N], logits of the predictor; None if dense.
        grids: (t, h, w) in patches of the pictures with the N visual tokens.
        stats: costs.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    kept: Tensor
    importance: Tensor | None
    grids: tuple[Grid, ...]
    stats: Stats

    def finished(
        self,
        text: str,
        token_ids: list[int],
        reason: str,
        *,
        first_token: float,
        decode: float,
        sampling: Sampling,
        checkpoint: Sampling,
    ) -> "Answer":
        """This answer with its tokens, and with the costs that are known at its end."""
        stats = replace(
            self.stats,
            first_token=first_token,
            decode=decode,
            peak_bytes=peak_bytes(self.kept.device),
            sampling=sampling,
            sampling_defaults=sampling.shared(checkpoint),
        )
        return replace(self, text=text, token_ids=token_ids, finish_reason=reason, stats=stats)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far, of the GPU's allocator or else of the process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
