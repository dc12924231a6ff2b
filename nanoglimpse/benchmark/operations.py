"""Every operation of the backend alone, beside the best of torch's own ways."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglimpse.benchmark.measuring import Roofs, best, say
from nanoglimpse.benchmark.report import table
from nanoglimpse.benchmark.work import Cost
from nanoglimpse.engine import Engine
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import Segments


def time_operations(engine: Engine, roofs: Roofs, args: argparse.Namespace) -> list[dict]:
    """Every operation of the backend beside the best of torch's own ways."""
    rows, entries = [], []
    for name, ours, others, cost in operations(engine, args.visual_tokens[0] + args.text):
        say(name)
        with torch.inference_mode():
            own, rival = best(ours, args.rounds), min(best(c, args.rounds) for c in others)
        compute = cost.flops / roofs.rate > cost.bytes / roofs.bandwidth
        amount = cost.flops / own / 1e9 if compute else cost.bytes / own / 1e9
        roof = 1e-9 * (roofs.rate if compute else roofs.bandwidth)
        unit = "GFLOP/s" if compute else "GB/s"
        rate, of_roof = f"{amount:.1f} {unit}", f"{amount / roof:.0%}"
        rows.append(
            [name, *(f"{1e3 * t:.3f}" for t in (own, rival)), f"{rival / own:.2f}", rate, of_roof]
        )
        entries.append({"name": name, "ms": 1e3 * own, "torch_ms": 1e3 * rival, unit: amount})
        entries[-1]["of_roof"] = amount / roof
    table(["operation", "ms", "torch's best ms", "×", "rate", "of the roof"], rows)
    return entries


Operation = tuple[str, Callable, list[Callable], Cost]


def operations(engine: Engine, rows: int) -> Iterator[Operation]:
    """(name, ours, torch's ways, cost) at the shapes of the model."""
    for part in (_attention, _elementwise, _gather, _products):
        yield from part(engine, rows)


def _draw(engine: Engine, *shape: int) -> Tensor:
    return torch.randn(shape, device=engine.device).to(engine.dtype)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


def _attention(engine: Engine, rows: int) -> Iterator[Operation]:
    ops, text, make = engine.model.ops, engine.config.text_config, partial(_draw, engine)
    heads, kv, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    one, segments = engine.dtype.itemsize, Segments([rows], engine.device)
    q, k, v = make(rows, heads, width), make(rows, kv, width), make(rows, kv, width)
    sdpa = partial(F.scaled_dot_product_attention, *map(_heads_first, (q, k, v)), enable_gqa=True)
    wide = partial(F.scaled_dot_product_attention, _heads_first(q))
    repeated = [_heads_first(x.repeat_interleave(heads // kv, 1)) for x in (k, v)]
    moved = (2 * q.numel() + 2 * k.numel()) * one
    yield (
        "prefill attention",
        lambda: ops.attention(q, k, v, segments, causal=True),
        [partial(sdpa, is_causal=True), lambda: wide(*repeated, is_causal=True)],
        Cost(2 * rows * rows * heads * width, moved),
    )
    yield (
        "decode attention",
        lambda: ops.decode_attention(q[:1], _heads_first(k), _heads_first(v), [0], [rows]),
        [
            lambda: F.scaled_dot_product_attention(
                _heads_first(q[:1]), _heads_first(k), _heads_first(v), enable_gqa=True
            )
        ],
        Cost(4 * rows * heads * width, 2 * k.numel() * one),
    )


def _elementwise(engine: Engine, rows: int) -> Iterator[Operation]:
    ops, text, make = engine.model.ops, engine.config.text_config, partial(_draw, engine)
    size, width, one = text.hidden_size, text.head_dim, engine.dtype.itemsize
    x, weight = make(rows, size), make(size)
    yield (
        "RMSNorm",
        lambda: ops.rms_norm(x, weight, 1e-6),
        [lambda: F.rms_norm(x, (size,), weight, 1e-6)],
        Cost(4 * x.numel(), 2 * x.numel() * one),
    )
    gate_up = make(rows, 2 * text.intermediate_size)
    gate, up = gate_up.chunk(2, -1)
    yield (
        "SwiGLU",
        lambda: ops.swiglu(gate_up),
        [lambda: F.silu(gate) * up],
        Cost(4 * gate.numel(), 3 * gate.numel() * one),
    )
    q = make(rows, text.num_attention_heads, width)
    rope = Rope.of(torch.randn(rows, width // 2, device=engine.device))
    yield (
        "rotation",
        lambda: ops.rotate(q, rope),
        [lambda: (q * rope.cos + q.roll(width // 2, -1) * rope.sin).type_as(q)],
        Cost(3 * q.numel(), 2 * q.numel() * one),
    )


def _gather(engine: Engine, rows: int) -> Iterator[Operation]:
    ops, text, make = engine.model.ops, engine.config.text_config, partial(_draw, engine)
    shape = (text.num_hidden_layers, rows, text.num_key_value_heads, text.head_dim)
    size, one = text.hidden_size, engine.dtype.itemsize
    cache = make(*shape), make(*shape)
    kept = torch.arange(0, rows, 9, device=engine.device)
    hidden, room = make(rows, size), [torch.empty_like(c[:, : len(kept)]) for c in cache]
    moved = 2 * len(kept) * (2 * text.num_hidden_layers * shape[2] * shape[3] + size) * one
    yield (
        "cache keep",
        lambda: ops.gather(*cache, hidden, kept, *room, slice(0, len(kept))),
        [lambda: ([c.index_select(1, kept) for c in cache], hidden[kept])],
        Cost(0, moved),
    )


def _products(engine: Engine, rows: int) -> Iterator[Operation]:
    ops, text, make = engine.model.ops, engine.config.text_config, partial(_draw, engine)
    size, inner, one = text.hidden_size, text.intermediate_size, engine.dtype.itemsize
    x = make(rows, size)
    matrix = make(2 * inner, size)
    packed = ops.pack(matrix)
    for name, some in (("product, all rows", x), ("product, one row", x[:1])):
        yield (
            name,
            partial(ops.linear, some, packed, None),
            [partial(F.linear, some, matrix)],
            Cost(2 * len(some) * matrix.numel(), (matrix.numel() + some.numel()) * one),
        )
