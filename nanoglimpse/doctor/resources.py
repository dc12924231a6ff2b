"""Compiles every kernel at the shapes of 3B and 7B, without a GPU, and prints its resources.

    python -m nanoglimpse.kernels.report

The launchers run on meta tensors, so that block sizes are those of a real run, and kernels are
compiled instead of launched.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from nanoglimpse.kernels.quantize import MODES, quantize
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.gather import SurvivorAttention
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.triton_ops.registry import TRITON
from nanoglimpse.kernels.varlen import Segments

# The targets, with the bytes of shared memory that each allows one program.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
# Hidden size, intermediate size, query heads, kv heads.
MODELS = {"3B": (2048, 11008, 16, 2), "7B": (3584, 18944, 28, 4)}
ROWS, LAYERS = 5000, 19
# A name, and a call of a launcher.
Case = tuple[str, Callable[[], object]]


class Resources(NamedTuple):
    """The resources of a compiled kernel.

    Attributes:
        target: a key of `TARGETS`.
        case: a name from `cases`, the first that needs this variant of the kernel.
        kernel: name of the kernel.
        warps: warps of a program.
        registers: registers per thread.
        spilled: bytes per thread (NVIDIA) or registers per lane (AMD) that spill.
        shared: bytes of shared memory of a program.
        ptx: its code, as tests read it; empty on AMD.
    """

    target: str
    case: str
    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int
    ptx: str


def compile_all(
    targets: Collection[str] = TARGETS.keys(), only: Collection[str] = ()
) -> Iterator[Resources]:
    """Compiles the kernels of all cases, or of `only` some; equal variants are listed once.

    Afterwards this process cannot launch kernels any more.
    """
    for name in targets:
        kernels = _compile_only(TARGETS[name][0])
        seen: set[str] = set()
        for case, call in cases():
            if only and case not in only:
                continue
            call()
            new = {kernel.hash: kernel for kernel in kernels if kernel.hash not in seen}
            kernels.clear()
            seen |= new.keys()
            for kernel in new.values():
                yield _resources(name, case, kernel)


def cases() -> Iterator[Case]:
    """Every launcher at the shapes of the models."""
    for name, shape in MODELS.items():
        for case, call in _decoder_cases(*shape):
            yield f"{name} {case}", call
    yield from _vision_cases()
    yield from _fp32_cases()


def _decoder_cases(size: int, inner: int, heads: int, kv_heads: int) -> Iterator[Case]:
    x, norm = _empty(ROWS, size), _empty(size)
    yield "norm", partial(TRITON.rms_norm, x, norm, 1e-6)
    yield "norm + sum", partial(TRITON.add_rms_norm, x, x, norm, 1e-6)
    yield "mlp", partial(TRITON.swiglu, _empty(ROWS, 2 * inner))
    rope, heads_to_rotate = _rope(128), _empty(ROWS, heads + kv_heads, 128)
    yield "rope", partial(TRITON.rotate, heads_to_rotate, rope)
    q, k = _empty(ROWS, heads, 128), _empty(ROWS, kv_heads, 128)
    qkv = _empty(ROWS, heads + 2 * kv_heads, 128)
    append = partial(TRITON.rope_append, qkv, rope, k, k)
    yield "append", partial(append, slice(0, ROWS))
    yield "append, ragged", partial(append, _row_ids(ROWS))
    prompt, queries = Segments([ROWS], "meta"), Queries(Segments([600], "meta"), _row_ids(600))
    only_kv = partial(TRITON.rope_append, qkv[:, heads:].contiguous(), rope, k, k)
    yield "append, scored", partial(only_kv, slice(0, ROWS), (q[:1], prompt))
    yield "row logits", partial(TRITON.row_logits, q[:1], k, prompt)
    attend = partial(TRITON.attention, k=k, v=k, segments=prompt, causal=True)
    yield "prefill", partial(attend, q)
    yield "survivors", partial(attend, q[:600], queries=queries)
    few = Queries(Segments([60], "meta"), _row_ids(60))
    yield "few survivors", partial(attend, q[:60], queries=few)
    for name, call in _step_cases(size, inner, heads, kv_heads):
        yield f"step, {name}", call
    row, step = _empty(1, size), partial(TRITON.skinny_linear, norm=(norm, 1e-6), gated=True)
    for mode in MODES:
        packed, matmul = quantize(_empty(2 * inner, size), mode, TRITON)
        yield f"step, mlp, {mode}", partial(step, row, packed, matmul=matmul)
        packed, matmul = quantize(_empty(size, size), mode, TRITON)
        down = partial(TRITON.skinny_linear, row, packed, residual=row)
        yield f"step, o, {mode}", partial(down, matmul=matmul)
        yield f"dense, {mode}", partial(matmul, x, packed, None)
    cache, target = (_empty(LAYERS, n, kv_heads, 128) for n in (ROWS, 700))
    gather = partial(TRITON.gather, cache, cache, x, _row_ids(600), target, target)
    yield "gather", partial(gather, slice(0, 600))
    yield "gather, ragged", partial(gather, _row_ids(600))
    attends = SurvivorAttention(q[:600], k, k, prompt, queries)
    yield "gather + survivors", partial(gather, slice(0, 600), attends)


def _step_cases(
    size: int,
    inner: int,
    heads: int,
    kv_heads: int,
    batch: int = 1,
    length: int = ROWS,
    device: str = "meta",
) -> Iterator[Case]:
    """A decode step of so many sequences with a cache of that length."""
    empty = partial(_empty, device=device)
    row, norm, columns = empty(batch, size), (empty(size), 1e-6), (heads + 2 * kv_heads) * 128
    product = TRITON.skinny_linear
    yield "qkv", partial(product, row, empty(columns, size), empty(columns), norm)
    yield "mlp", partial(product, row, empty(2 * inner, size), None, norm, True)
    yield "down", partial(product, empty(batch, inner), empty(size, inner), residual=row)
    yield "o", partial(product, row, empty(size, size), residual=row)
    cache, angles = empty(length * batch, kv_heads, 128), torch.empty(batch, 64, device=device)
    qkv = empty(batch, heads + 2 * kv_heads, 128)
    rows = torch.empty(batch, dtype=torch.int64, device=device)
    yield "append", partial(TRITON.rope_append, qkv, Rope.of(angles), cache, cache, rows)
    layer, starts = cache.transpose(0, 1)[None], range(0, length * batch, length)
    decode = partial(TRITON.decode_attention, empty(batch, heads, 128), layer, layer)
    yield "decode", partial(decode, starts, [length] * batch)


def decode_variants(
    model: str, batches: Iterable[int], lengths: Collection[int]
) -> dict[str, set[str]]:
    """Kernels of the decode steps of all batches and cache lengths, and the variants of each.

    Nothing is compiled. What a step needs beyond the first one would be, in mid-answer. Afterwards
    this process cannot launch kernels any more.
    """
    variants: dict[str, set[str]] = {}

    def note(**found: Any) -> bool:
        variants.setdefault(found["fn"].name.rpartition(".")[2], set()).add(found["key"])
        return True  # do not compile

    _compile_only(TARGETS["sm_90"][0])
    triton.knobs.runtime.jit_cache_hook = note
    for batch in batches:
        for length in lengths:
            # Not on the device meta, where every tensor has the address 0.
            for _, call in _step_cases(*MODELS[model], batch, length, "cpu"):
                call()
    return variants


def _vision_cases() -> Iterator[Case]:
    x = _empty(ROWS, 1280)
    yield "vision norm", partial(TRITON.rms_norm, x, _empty(1280), 1e-6)
    yield "vision norm + sum", partial(TRITON.add_rms_norm, x, x, _empty(1280), 1e-6)
    yield "vision mlp", partial(TRITON.swiglu, _empty(ROWS, 2 * 3420))
    qkv, qk = _empty(ROWS, 48, 80), _empty(ROWS, 32, 80)
    yield "vision rope", partial(TRITON.rotate, qkv[:, :32], _rope(80))
    q, k, v = qk[:, :16], qk[:, 16:], qkv[:, 32:]
    for name, lengths in (("full", [ROWS]), ("windows", [64] * 78 + [8])):
        segments = Segments(lengths, "meta")
        yield f"vision {name}", partial(TRITON.attention, q, k, v, segments, causal=False)
    yield "vision colsum", partial(TRITON.attention_colsum, q, k, segments)
    q, v, segments = _empty(ROWS, 4, 192), _empty(ROWS, 4, 64), Segments([ROWS], "meta")
    yield "predictor", partial(TRITON.attention, q, q, v, segments, causal=False)


def _fp32_cases() -> Iterator[Case]:
    q, k, qkv = (_empty(ROWS, n, 128).float() for n in (16, 2, 20))
    segments, layer = Segments([ROWS], "meta"), k.transpose(0, 1)[None]
    yield "fp32 prefill", partial(TRITON.attention, q, k, k, segments, causal=True)
    yield "fp32 decode", partial(TRITON.decode_attention, q[:1], layer, layer, [0], [ROWS])
    yield "fp32 append", partial(TRITON.rope_append, qkv, _rope(128), k, k, slice(0, ROWS))
    caches, new, rows = k[None], torch.empty_like(k[None, :600]), _row_ids(600)
    queries = Queries(Segments([600], "meta"), rows)
    attends = SurvivorAttention(q[:600], k, k, segments, queries)
    gather = partial(TRITON.gather, caches, caches, q.flatten(1), rows, new, new)
    yield "fp32 gather + survivors", partial(gather, slice(0, 600), attends)


def _empty(*shape: int, device: str = "meta") -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device)


def _row_ids(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device="meta")


def _rope(width: int) -> Rope:
    return Rope.of(torch.empty(ROWS, width // 2, device="meta"))


class _Driver:
    """A driver whose current device is of a given target."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile_only(target: GPUTarget) -> list[CompiledKernel]:
    """Makes every launch compile its kernel for a target instead; the list collects the kernels."""
    kernels: list[CompiledKernel] = []

    def launcher(function: triton.JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*args: object, **options: object) -> None:
            kernels.append(function.run(*args, grid=grid, warmup=True, **options))

        return compile_only

    triton.JITFunction.__getitem__ = launcher
    triton.runtime.driver.set_active(_Driver(target))
    return kernels


def _resources(target: str, case: str, kernel: CompiledKernel) -> Resources:
    measure = _cubin if "cubin" in kernel.asm else _amdgcn
    registers, spilled = measure(kernel)
    meta = kernel.metadata
    ptx = kernel.asm.get("ptx", "")
    return Resources(target, case, meta.name, meta.num_warps, registers, spilled, meta.shared, ptx)


def _cubin(kernel: CompiledKernel) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack, which holds the spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _amdgcn(kernel: CompiledKernel) -> tuple[int, int]:
    """Vector registers per lane, and how many of them spill."""
    text = kernel.asm["amdgcn"]
    return _number(r"\.vgpr_count:\s*(\d+)", text), _number(r"\.vgpr_spill_count:\s*(\d+)", text)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None
    return int(match[1])


def print_table() -> None:
    """Prints a table of the resources of all kernels."""
    print(
        f"{'target':8}{'case':25}{'kernel':26}{'warps':>6}{'registers':>11}{'spilled':>9}{'KiB':>7}"
    )
    for r in compile_all():
        print(
            f"{r.target:8}{r.case:25}{r.kernel:26}{r.warps:6}{r.registers:11}{r.spilled:9}"
            f"{r.shared / 1024:7.1f}",
            flush=True,
        )
