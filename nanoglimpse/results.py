"""What a prefill and an answer carry: stages by name, budgets, and what it cost."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .cache import Cache, Stack
from .rope import Grid


@dataclass(frozen=True)
class Budgets:
    """What a method spends, as shares of the unpruned prompt's visual tokens N.

    Attributes:
        input_ratio: visual tokens that enter the decoder, over N.
        prefill_ratio: visual tokens that a layer processes in prefill, mean over layers, over N.
        decode_kv_ratio: visual rows that a layer's cache holds for decoding, likewise
            (the paper's retention rate, Sec. 5.1).
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
    """Time between named moments, on a GPU by events that do not stop it."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks = [("", self._now())]

    def lap(self, name: str) -> None:
        """Ends the stage `name`, which began with the last lap."""
        self.marks.append((name, self._now()))

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds of each stage, in order."""
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            return {name: before.elapsed_time(after) for (_, before), (name, after) in pairs}
        return {name: 1000 * (after - before) for (_, before), (name, after) in pairs}


@dataclass
class Prefill:
    """A prompt, or several packed, read and ready to be answered.

    T' rows survive of T, of which N were visual tokens; B prompts.

    Attributes:
        method: that ran.
        visual: [N, C], visual tokens as the vision encoder made them.
        taps: [M, N, Cv], features of the tapped blocks; M is 0 without glimpse weights.
        glimpse_logits: [N, HQ], raw attention of the glimpse row; None if dense.
        importance: [N], logits of the predictor, before the sigmoid; None if dense.
        kept: bool [N].
        positions: int64 [3, T'], M-RoPE ids of the surviving rows, unchanged.
        hidden: [T, C] after layer K, before the gather; None unless traced.
        logits: [vocab] of the last row; [B, vocab] for several prompts.
        cache: all layers, T' rows.
        budgets: of all prompts together.
        stages: (layer, visual tokens of each prompt that it and those behind it process).
        batch: the prompts as they were packed, before pruning.
    """

    method: str
    visual: Tensor
    taps: Tensor
    glimpse_logits: Tensor | None
    importance: Tensor | None
    kept: Tensor
    positions: Tensor
    hidden: Tensor | None
    logits: Tensor
    cache: Cache | Stack
    budgets: Budgets
    stages: list[tuple[int, list[int]]]
    batch: Batch = field(repr=False)
    clock: Clock = field(repr=False)
    _state: Any = field(init=False, repr=False)

    def __post_init__(self):
        self._state = self.cache.state()

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of each stage, in order."""
        return self.clock.milliseconds()

    def budgets_of(self, prompt: int, cached: Sequence[int]) -> Budgets:
        """The budgets of one prompt of several; `cached` are its visual rows in each layer."""
        ends = [layer for layer, _ in self.stages[1:]] + [len(cached)]
        processed = [
            counts[prompt]
            for (first, counts), end in zip(self.stages, ends, strict=True)
            for _ in range(first, end)
        ]
        return Budgets.of(processed, cached, self.batch.visual_counts[prompt])

    def rewind(self, room: int) -> Cache | Stack:
        """The cache as the prefill left it, with room for more rows in every sequence."""
        self.cache = self.cache.rewound(self._state, room)
        return self.cache


@dataclass(frozen=True)
class Stats:
    """What an answer cost.

    Attributes:
        method: that ran.
        prompt_tokens: T, before pruning.
        visual_tokens: N.
        kept_tokens: visual tokens left.
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
    """What the model said.

    Attributes:
        text: without control tokens.
        token_ids: as generated; the last one ends the answer if `finish_reason` is "eos".
        finish_reason: "eos", "length", or "stopped" if the caller stopped asking.
        kept: bool [N], the visual tokens that were left.
        importance: [N], the predictor's logits; None if dense.
        grids: (t, h, w) in patches of the pictures that the N tokens make up.
        stats: what it cost.
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
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
