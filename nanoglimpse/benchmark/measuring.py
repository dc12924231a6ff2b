"""Rounds of contenders, and clock and memory of the device."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoglimpse.cli.console import rewrite
from nanoglimpse.engine import Engine
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.files import is_stream, write_whole

# The values of all rounds, by contender and by what is measured.
Figures = dict[str, dict[str, list[Any]]]
# Bytes that are written between two calls, so that no cache of the processor holds their inputs.
COLD = 2**27
# How far logits may be from those of the same weights elsewhere, relative to their norm.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def now(device: torch.device) -> float:
    """Seconds, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def best(call: Callable, rounds: int, device: torch.device) -> float:
    """Seconds of the fastest of some runs, after one that warms up; on a GPU as `take_turns`."""
    if on_events(device):
        return events_ms(call, device, warmup=10, rep=40, return_mode="min") / 1000
    call()
    return min(wall(call, device) for _ in range(rounds))


def take_turns(
    ways: Mapping[str, Callable], rounds: int, device: torch.device, until: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each way in rounds that alternate between them, with cold caches.

    On a GPU these are seconds of the device between events, medians of some calls, without the
    launch and the wait of the host, which take longer than a small kernel.

    Args:
        ways: by name.
        rounds: how many; each way runs once before, to warm up.
        device: where they run.
        until: no round but the first begins after this moment of `time.monotonic`.
    """
    events = on_events(device)
    cache = torch.empty(0 if events else COLD, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name, call in ways.items():
            if events:
                took = events_ms(call, device, warmup=1, rep=5, return_mode="median") / 1000
            else:
                cache.zero_()
                took = wall(call, device)
            seconds[name].append(took)
    return seconds


def on_events(device: torch.device) -> bool:
    """Whether calls are timed by events of a GPU; `triton.testing` flushes its L2 cache."""
    return device.type == "cuda" and find_spec("triton") is not None


def events_ms(call: Callable, device: torch.device, **options: Any) -> float:
    """Milliseconds, from `triton.testing.do_bench`."""
    from triton.testing import do_bench

    with torch.cuda.device(device):
        return do_bench(call, **options)


def wall(call: Callable, device: torch.device) -> float:
    """Seconds of one call by the clock of the host."""
    start = now(device)
    call()
    return now(device) - start


def run_rounds(
    title: str,
    contenders: Mapping[str, Callable[[], Mapping[str, Any]]],
    rounds: int,
    until: float = math.inf,
) -> Figures:
    """What contenders measure in rounds that alternate between them; the first one warms up.

    No round but the first that counts begins after `until`, a moment of `time.monotonic`.
    """
    figures: Figures = {name: defaultdict(list) for name in contenders}
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() > until:
            break
        say(f"{title}: round {number} of {rounds}")
        for name, contender in contenders.items():
            for key, value in contender().items():
                if number:
                    figures[name][key].append(value)
    return figures


def differences(what: str, engine: Engine, logits: Tensor, expected: Tensor) -> list[str]:
    """A line if logits are further apart than the precision of the engine explains."""
    error, limit = distance(logits, expected), CLOSE[engine.dtype]
    return [] if error <= limit else [f"{what} differ by {error:.1e}, more than {limit:g}"]


def distance(logits: Tensor, expected: Tensor) -> float:
    """The largest distance of a row of logits from the expected one, relative to its norm."""
    error = (logits.float() - expected.float()).norm(dim=-1)
    return float((error / expected.float().norm(dim=-1)).max())


class Memory:
    """The peak of memory since it was made: on a GPU without what was in use before."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            peak = Path("/proc/self/clear_refs")
            if is_stream(peak):  # Only Linux has this file; it sets the peak to the present.
                with suppress(NanoglimpseError):
                    write_whole(peak, b"5")

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return resident("VmHWM")


def resident(line: str = "VmRSS") -> int:
    """Bytes of the process, or their peak for VmHWM; 0 where the system does not tell."""
    with suppress(OSError):
        for found in Path("/proc/self/status").read_text().splitlines():
            if found.startswith(line):
                return 1024 * int(found.split()[1])
    return 0


def say(line: str) -> None:
    """Shows progress, on a terminal only."""
    if sys.stderr.isatty():
        rewrite(line)
