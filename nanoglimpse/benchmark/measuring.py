"""Clock, memory and roofs of the device, and what ran where."""

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

from nanoglimpse.benchmark import ROOT
from nanoglimpse.benchmark.work import Cost
from nanoglimpse.engine import Engine
from nanoglimpse.version import VERSION

# What the roofs are measured with: rows and columns of a product, bytes to read.
SIDE = {"cuda": 8192, "cpu": 2048}
READ = 2**28


def now() -> float:
    """Seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def best(call: Callable, rounds: int) -> float:
    """Seconds of the fastest of some runs behind one that warms up."""
    call()
    spent = []
    for _ in range(rounds):
        start = now()
        call()
        spent.append(now() - start)
    return min(spent)


class Memory:
    """The most memory since it was made: on a GPU beyond what there was, else of the process."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError):  # no Linux
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what there is now

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return resident("VmHWM")


def resident(line: str = "VmRSS") -> int:
    """Bytes of the process, at most if VmHWM; 0 where the system does not say."""
    with suppress(OSError):
        for found in Path("/proc/self/status").read_text().splitlines():
            if found.startswith(line):
                return 1024 * int(found.split()[1])
    return 0


class Roofs:
    """What the device reaches: FLOP/s of a large product, bytes/s of reading, in this dtype."""

    def __init__(self, engine: Engine):
        device, dtype, ops = engine.device, engine.dtype, engine.model.ops
        size = SIDE.get(device.type, 2048)
        with torch.inference_mode():
            a = torch.randn(size, size, device=device).to(dtype)
            packed = ops.pack(a)
            products = (lambda: a @ a, lambda: ops.linear(a, packed, None))
            self.rate = 2 * size**3 / min(best(call, 4) for call in products)
            big = torch.ones(READ // a.element_size(), device=device, dtype=dtype).view(-1, 8192)
            matrix, row = ops.pack(big), big[:1].clone()
            reads = (big.sum, lambda: ops.linear(row, matrix, None), lambda: F.linear(row, big))
            self.bandwidth = READ / min(best(call, 5) for call in reads)

    def floor(self, cost: Cost) -> float:
        """Milliseconds."""
        return 1000 * cost.seconds(self.rate, self.bandwidth)


def machine(args: argparse.Namespace, engine: Engine, roofs: Roofs) -> dict:
    """What ran where."""
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
        "matrix_gflops": round(roofs.rate / 1e9),
        "read_gb_per_s": round(roofs.bandwidth / 1e9, 1),
    }


def commit() -> str:
    """Of this checkout, marked if it has changes; empty elsewhere."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def say(line: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
