"""Compiles every kernel at the shapes of 3B and 7B, without a GPU, and prints what it takes.

    python -m nanoglimpse.kernels.report

The launchers run over tensors without memory, so that the block sizes are those of a real run, and
stop short of the launch.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from .attention import Probe, Queries
from .launchers import TRITON
from .packing import Packing
from .rope import Rope

# Shared memory of one program, in bytes: what the chip lets it have.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
# Width, inner width, query heads, kv heads.
MODELS = {"3B": (2048, 11008, 16, 2), "7B": (3584, 18944, 28, 4)}
ROWS, LAYERS = 5000, 19


class Row(NamedTuple):
    """What a kernel takes on one chip; registers are of a thread, memory in bytes."""

    target: str
    shape: str
    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int


def rows() -> Iterator[Row]:
    """All kernels at all shapes on all chips, what is the same once.

    Nothing can be launched in this process any more.
    """
    for name, (target, _) in TARGETS.items():
        kernels, seen = _compile_only(target), set()
        for shape, call in cases():
            call()
            new = {kernel.hash: kernel for kernel in kernels if kernel.hash not in seen}
            kernels.clear()
            seen |= new.keys()
            for kernel in new.values():
                yield _row(name, shape, kernel)


def cases() -> Iterator[tuple[str, Callable]]:
    """Every launcher at the shapes of the models, with their names."""
    for name, (size, inner, heads, kv_heads) in MODELS.items():
        yield f"{name} norm", partial(TRITON.rms_norm, _x(ROWS, size), _x(size), 1e-6)
        both = _x(ROWS, size), _x(ROWS, size)
        yield f"{name} norm + sum", partial(TRITON.add_rms_norm, *both, _x(size), 1e-6)
        yield f"{name} mlp", partial(TRITON.swiglu, _x(ROWS, 2 * inner))
        q, k = _x(ROWS, heads, 128), _x(ROWS, kv_heads, 128)
        yield f"{name} rope", partial(TRITON.rotate, _x(ROWS, heads + kv_heads, 128), _rope(128))
        qkv, bias = _x(ROWS, heads + 2 * kv_heads, 128), _x((heads + 2 * kv_heads) * 128)
        append = partial(TRITON.rotate_append, qkv, bias, _rope(128), k, k)
        yield f"{name} append", partial(append, slice(0, ROWS))
        yield f"{name} append, ragged", partial(append, _ids(ROWS))
        prompt = Packing([ROWS], "meta")
        yield f"{name} prefill", partial(TRITON.attention, q, k, k, prompt, causal=True)
        some = Queries(Packing([600], "meta"), _ids(600))
        read = partial(TRITON.attention_reading, q[:600], k, k, prompt, Probe(*[_ids(1)] * 3))
        yield f"{name} prefill, read", partial(read, causal=True, queries=some)
        one, gate_up = _x(1, size), _x(2 * inner, size)
        step = partial(TRITON.few_rows, one, norm=(_x(size), 1e-6))
        yield f"{name} step, qkv", partial(step, _x(len(bias), size), bias)
        yield f"{name} step, mlp", partial(step, gate_up, gated=True)
        down = _x(1, inner), _x(size, inner)
        yield f"{name} step, down", partial(TRITON.few_rows, *down, residual=one)
        layer = k.transpose(0, 1)[None]
        yield (
            f"{name} decode",
            partial(TRITON.decode_attention, q[:1], layer, layer, [0], [ROWS]),
        )
        cache, target = (_x(LAYERS, n, kv_heads, 128) for n in (ROWS, 700))
        keep = partial(TRITON.keep_rows, cache, cache, _x(ROWS, size), _ids(600), target, target)
        yield f"{name} keep", partial(keep, slice(0, 600))
        yield f"{name} keep, ragged", partial(keep, _ids(600))
    x = _x(ROWS, 1280)
    yield "vision norm", partial(TRITON.rms_norm, x, _x(1280), 1e-6)
    yield "vision norm + sum", partial(TRITON.add_rms_norm, x, x, _x(1280), 1e-6)
    yield "vision mlp", partial(TRITON.swiglu, _x(ROWS, 2 * 3420))
    qkv = _x(ROWS, 48, 80)
    yield "vision rope", partial(TRITON.rotate, qkv[:, :32], _rope(80))
    q, k, v = _x(ROWS, 32, 80)[:, :16], _x(ROWS, 32, 80)[:, 16:], qkv[:, 32:]
    for name, lengths in (("full", [ROWS]), ("windows", [64] * 78 + [8])):
        packing = Packing(lengths, "meta")
        yield f"vision {name}", partial(TRITON.attention, q, k, v, packing, causal=False)
    yield "vision received", partial(TRITON.received_attention, q, k, packing)
    q, v = _x(ROWS, 4, 192), _x(ROWS, 4, 64)
    packing = Packing([ROWS], "meta")
    yield "predictor", partial(TRITON.attention, q, q, v, packing, causal=False)
    q, k = (_x(ROWS, n, 128).float() for n in (16, 2))
    yield "fp32 prefill", partial(TRITON.attention, q, k, k, packing, causal=True)
    layer = k.transpose(0, 1)[None]
    yield "fp32 decode", partial(TRITON.decode_attention, q[:1], layer, layer, [0], [ROWS])
    qkv = _x(ROWS, 20, 128).float()
    yield (
        "fp32 append",
        partial(TRITON.rotate_append, qkv, None, _rope(128), k, k, slice(0, ROWS)),
    )


def _x(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _ids(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device="meta")


def _rope(width: int) -> Rope:
    return Rope.of(torch.empty(ROWS, width // 2, device="meta"))


class _Driver:
    """Says that the current device is of this target."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def _compile_only(target: GPUTarget) -> list:
    """From now on kernels are compiled for this target, not launched; the list takes them."""
    kernels = []

    def launcher(function, grid):
        def compile_only(*args, **options):
            kernels.append(function.run(*args, grid=grid, warmup=True, **options))

        return compile_only

    triton.JITFunction.__getitem__ = launcher
    triton.runtime.driver.set_active(_Driver(target))
    return kernels


def _row(target: str, shape: str, kernel) -> Row:
    measure = _cubin if "cubin" in kernel.asm else _amdgcn
    registers, spilled = measure(kernel)
    meta = kernel.metadata
    return Row(target, shape, meta.name, meta.num_warps, registers, spilled, meta.shared)


def _cubin(kernel) -> tuple[int, int]:
    """Registers of a thread and its bytes of stack, where spills go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def _amdgcn(kernel) -> tuple[int, int]:
    """Vector registers of a lane and how many of them spill."""
    text = kernel.asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spilled


def main() -> None:
    """Prints the table."""
    print(
        f"{'chip':8}{'shape':20}{'kernel':24}{'warps':>6}{'registers':>11}{'spilled':>9}{'KiB':>7}"
    )
    for row in rows():
        print(
            f"{row.target:8}{row.shape:20}{row.kernel:24}{row.warps:6}{row.registers:11}"
            f"{row.spilled:9}{row.shared / 1024:7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
