"""Rounds of contenders; clock, memory and roofs of the device; and a record of what ran where."""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglimpse.benchmark import ROOT
from nanoglimpse.benchmark.work import Cost
from nanoglimpse.cli.console import rewrite
from nanoglimpse.engine import Engine
from nanoglimpse.version import VERSION

# The values of all rounds, by contender and by what is measured.
Figures = dict[str, dict[str, list[Any]]]
# The roofs are measured with a product of matrices of this side and by reading this many bytes.
SIDE = {"cuda": 8192, "cpu": 2048}
READ = {"cuda": 2**32, "cpu": 2**28}
# How far logits may be from those of the same weights elsewhere, relative to their norm.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def now(device: torch.device) -> float:
    """Seconds, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def best(call: Callable, rounds: int, device: torch.device) -> float:
    """Seconds of the fastest of some runs, after one that warms up.

    On a GPU these are seconds of the device between events, with a cold L2 cache and without the
    launch and the wait of the host, which take longer than a small kernel.
    """
    if device.type == "cuda" and find_spec("triton"):
        from triton.testing import do_bench

        with torch.cuda.device(device):
            return do_bench(call, return_mode="min") / 1000
    call()
    spent = []
    for _ in range(rounds):
        start = now(device)
        call()
        spent.append(now(device) - start)
    return min(spent)


def run_rounds(
    title: str, contenders: Mapping[str, Callable[[], Mapping[str, Any]]], rounds: int
) -> Figures:
    """What the contenders measure in rounds that alternate between them; the first one warms up."""
    figures: Figures = {name: defaultdict(list) for name in contenders}
    for number in range(rounds + 1):
        say(f"{title}: round {number} of {rounds}")
        for name, contender in contenders.items():
            for key, value in contender().items():
                if number:
                    figures[name][key].append(value)
    return figures


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median over rounds of how many times as fast the second contender is."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def differences(what: str, engine: Engine, logits: Tensor, expected: Tensor) -> list[str]:
    """A line if logits are further apart than the precision of the engine explains."""
    error, limit = distance(logits, expected), CLOSE[engine.dtype]
    return [] if error <= limit else [f"{what} differ by {error:.1e}, more than {limit:g}"]


def distance(logits: Tensor, expected: Tensor) -> float:
    """The largest distance of a row of logits from the expected one, relative to its norm."""
    error = (logits.float() - expected.float()).norm(dim=-1)
    return float((error / expected.float().norm(dim=-1)).max())


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    values = sorted(values)
    fifth = len(values) // 5
    return values[fifth], values[-1 - fifth]


class Memory:
    """The peak of memory since it was made: on a GPU without what was in use before."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError):  # Only Linux has this file; it sets the peak to the present.
                Path("/proc/self/clear_refs").write_text("5")

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


class Roofs:
    """What the device reaches in a dtype: FLOP/s of a large product, and bytes/s of reading."""

    def __init__(self, engine: Engine):
        device, dtype, ops = engine.device, engine.dtype, engine.model.ops
        size = SIDE.get(device.type, 2048)
        with torch.inference_mode():
            a = torch.randn(size, size, device=device).to(dtype)
            packed = ops.pack(a)
            products = (lambda: a @ a, lambda: ops.linear(a, packed, None))
            self.rate = 2 * size**3 / min(best(call, 4, device) for call in products)
            read = READ.get(device.type, 2**28)
            big = torch.ones(read // a.element_size(), device=device, dtype=dtype).view(-1, 8192)
            matrix, row = ops.pack(big), big[:1].clone()
            reads = (big.sum, lambda: ops.linear(row, matrix, None), lambda: F.linear(row, big))
            self.bandwidth = read / min(best(call, 5, device) for call in reads)

    def floor(self, cost: Cost) -> float:
        """The least milliseconds that a device with these roofs needs."""
        return 1000 * cost.seconds(self.rate, self.bandwidth)


def machine(args: argparse.Namespace, engine: Engine, roofs: Roofs) -> dict:
    """A record of the device, the software and the model."""
    cuda = engine.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(engine.device) if cuda else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(engine.dtype)[6:],
        "quantize": engine.model.quantized,
        "backend": args.backend,
        "model": args.shape or args.model,
        "layers": engine.config.text_config.num_hidden_layers,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nanoglimpse": VERSION,
        "commit": commit(),
        **({"clocks_mhz": clocks(engine.device)} if cuda else {}),
        "matrix_gflops": round(roofs.rate / 1e9),
        "read_gb_per_s": round(roofs.bandwidth / 1e9, 1),
    }


def clocks(device: torch.device) -> list[int]:
    """Present clocks of a GPU's processors and memory in MHz; empty if its driver does not tell."""
    with suppress(OSError, ValueError):
        which = str(torch.cuda.get_device_properties(device).uuid)
        ask = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
        done = subprocess.run([*ask, f"--id=GPU-{which}"], capture_output=True, text=True)
        return [int(number) for number in done.stdout.split(",")]
    return []


def commit() -> str:
    """The commit of this checkout, marked if there are changes; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def say(line: str) -> None:
    """Shows progress, on a terminal only."""
    if sys.stderr.isatty():
        rewrite(line)
