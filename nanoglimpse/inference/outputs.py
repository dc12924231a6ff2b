"""What a prefill and an answer hold: stages by name, budgets, and costs."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
    """What a method spends, as shares of the unpruned prompt's visual tokens N.

    Attributes:
        input_ratio: visual tokens that enter the decoder, over N.
        prefill_ratio: visual tokens in a layer's prefill, mean over layers, over N.
        decode_kv_ratio: visual rows that a layer's cache holds for decoding, mean over layers, over
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
    """Time between named moments, on a GPU by events that do not wait for it."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.marks = [("", self._now())]

    def lap(self, name: str) -> None:
        """Ends the stage `name`, which began with the last lap."""
        self.marks.append((name, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds of each stage, in order; laps of one name are added up."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        spent: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            took = before.elapsed_time(after) if self.cuda else 1000 * (after - before)
            spent[name] = spent.get(name, 0.0) + took
        return spent


@dataclass
class Prefill:
    """A prompt, or several packed, ready to be answered.

    T' rows survive of T, of which N were visual tokens; B prompts.

    Attributes:
        pruning: method and rule.
        visual: [N, C], visual tokens as the vision encoder made them.
        taps: [M, N, Cv], features of the tapped blocks; M is 0 without glimpse weights.
        glimpse_logits: [N, HQ], raw attention of the glimpse row; None if dense.
        importance: [N], logits of the predictor, before the sigmoid; None if dense.
        kept: bool [N].
        positions: int64 [3, T'], M-RoPE ids of the surviving rows, unchanged.
        hidden: [T, C] after layer K, before the gather; None unless traced.
        logits: [vocab] of the last row; [B, vocab] for several prompts.
        cache: all layers, T' rows.
        processed: [L][B], visual tokens of each prompt in each layer's prefill.
        cached: [L][B], those that its cache holds.
        batch: the prompts as they were packed, before pruning.
        clock: of the stages.
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
        """Of all prompts together."""
        processed, cached = ([sum(layer) for layer in p] for p in (self.processed, self.cached))
        return Budgets.of(processed, cached, len(self.visual))

    def budgets_of(self, prompt: int) -> Budgets:
        """Of one of the prompts."""
        processed, cached = ([row[prompt] for row in p] for p in (self.processed, self.cached))
        return Budgets.of(processed, cached, self.batch.visual_counts[prompt])

    def rewind(self, headroom: int) -> KVCache | LayeredKVCache:
        """The cache as the prefill left it, with `headroom` free rows in every sequence."""
        self.cache = self.cache.restored(self._snapshot, headroom)
        return self.cache


@dataclass(frozen=True)
class Stats:
    """What an answer cost.

    Attributes:
        method: its name.
        prompt_tokens: T, before pruning.
        visual_tokens: N.
        kept_tokens: visual tokens that survive.
        budgets: see there.
        kv_rows, kv_bytes: of all layers, as (without pruning, with).
        timings: milliseconds of each stage up to the first token, in order.
        first_token: milliseconds to the first token, all of them.
        decode: milliseconds a token, mean over the tokens after the first.
        peak_bytes: largest memory in use so far; of the device on a GPU, else of the process.
    """

    method: str
    prompt_tokens: int
    visual_tokens: int
    kept_tokens: int
    budgets: Budgets
    kv_rows: tuple[int, int]
    kv_bytes: tuple[int, int]
    timings: dict[str, float]
    first_token: float
    decode: float
    peak_bytes: int


@dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        text: without control tokens.
        token_ids: as generated; the last one ends the answer if `finish_reason` is "eos".
        finish_reason: "eos", "length", or "stopped" if the caller stopped iterating.
        kept: bool [N], the visual tokens that survive.
        importance: [N], the predictor's logits; None if dense.
        grids: (t, h, w) in patches of the pictures that the N tokens make up.
        stats: costs.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    kept: Tensor
    importance: Tensor | None
    grids: tuple[Grid, ...]
    stats: Stats


def peak_bytes(device: torch.device) -> int:
    """Largest memory in use so far: of the GPU's allocator, else of the process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
