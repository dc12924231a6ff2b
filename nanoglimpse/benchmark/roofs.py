"""The roofs of a device: what a large product and the reading of a large tensor reach there."""

import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F

from nanoglimpse.benchmark.measuring import best
from nanoglimpse.benchmark.work import Cost
from nanoglimpse.engine import Engine

# The roofs are measured with a product of matrices of this side and by reading this many bytes.
SIDE = {"cuda": 8192, "cpu": 2048}
READ = {"cuda": 2**32, "cpu": 2**28}
INVALID = "roof invalid"


class Roofs:
    """The best that was reached since `renew`: a machine drifts, and its roofs with it.

    Attributes:
        rate: FLOP/s of a large product.
        bandwidth: bytes/s of reading.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.renew()

    def renew(self) -> None:
        """Forgets what was reached, and measures."""
        self.rate = self.bandwidth = 0.0
        self.measure()

    @torch.inference_mode()
    def measure(self) -> None:
        """Measures once more; a roof rises if more is reached than before."""
        device, dtype, ops = self.engine.device, self.engine.dtype, self.engine.model.ops
        size, read = SIDE.get(device.type, SIDE["cpu"]), READ.get(device.type, READ["cpu"])
        a = torch.randn(size, size, device=device).to(dtype)
        packed = ops.pack(a)
        products = (lambda: a @ a, lambda: ops.linear(a, packed, None))
        rate = 2 * size**3 / min(best(call, 2, device) for call in products)
        big = torch.ones(read // a.element_size(), device=device, dtype=dtype).view(-1, 8192)
        matrix, row = ops.pack(big), big[:1].clone()
        reads = (big.sum, lambda: ops.linear(row, matrix, None), lambda: F.linear(row, big))
        bandwidth = read / min(best(call, 3, device) for call in reads)
        self.rate, self.bandwidth = max(self.rate, rate), max(self.bandwidth, bandwidth)

    def floor(self, cost: Cost) -> float:
        """The least milliseconds that a device with these roofs needs."""
        return 1000 * cost.seconds(self.rate, self.bandwidth)

    def settle(self, passed: Callable[[], bool]) -> None:
        """Measures again if a figure passes its roof, so that only a wrong roof is still passed."""
        if passed():
            self.measure()

    def record(self) -> dict[str, Any]:
        """Both roofs and the clocks at present, for the JSON line."""
        clocks = clocks_mhz(self.engine.device)
        return {
            "matrix_gflops": round(self.rate / 1e9, 1),
            "read_gb_per_s": round(self.bandwidth / 1e9, 1),
            **({"clocks_mhz": clocks} if clocks else {}),
        }


def clocks_mhz(device: torch.device) -> list[int]:
    """Present clocks of a GPU's processors and memory; empty if its driver does not tell."""
    if device.type != "cuda":
        return []
    with suppress(OSError, ValueError):
        which = str(torch.cuda.get_device_properties(device).uuid)
        ask = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
        done = subprocess.run([*ask, f"--id=GPU-{which}"], capture_output=True, text=True)
        return [int(number) for number in done.stdout.split(",")]
    return []
