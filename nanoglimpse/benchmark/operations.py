"""Times each operation of the backend alone, beside the fastest of torch's own ways."""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglimpse.benchmark.figures import Ratios, spread
from nanoglimpse.benchmark.measuring import say, take_turns
from nanoglimpse.benchmark.models import SHAPE_VISUAL, visual_sizes
from nanoglimpse.benchmark.output import Output
from nanoglimpse.benchmark.roofs import INVALID, Roofs
from nanoglimpse.benchmark.work import Cost
from nanoglimpse.engine import Engine
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import Segments

# A name, what runs the operation on the backend, torch's own ways to compute the same, the FLOPs,
# and the number of elements that are read and written.
Operation = tuple[str, Callable[[], object], Sequence[Callable[[], object]], int, int]


def time_operations(
    engine: Engine, roofs: Roofs, args: argparse.Namespace, out: Output
) -> list[dict[str, Any]]:
    """Writes a table of all operations at the shapes of a model; returns the JSON entries."""
    ratios, entries = Ratios(), []
    count = (visual_sizes(args)[0] or SHAPE_VISUAL) + args.text
    for name, ours, others, flops, elements in operations(engine, count):
        say(name)
        ways = {str(number): way for number, way in enumerate((ours, *others))}
        roofs.renew()
        with torch.inference_mode():
            own, *rivals = take_turns(ways, args.rounds, engine.device, args.until).values()
        rival = min(rivals, key=statistics.median)
        entry = {"name": name} | _own(own, Cost(flops, elements * engine.dtype.itemsize), roofs)
        entry |= {"torch_ms": 1e3 * statistics.median(rival), "torch_ms_spread": _spread(rival)}
        entries.append(entry | {"ratio": ratios.tell(name, rival, own)})
    columns = ("name", "ms", "ms_spread", "torch_ms", "torch_ms_spread", "ratio", "rate", "unit")
    rows = [
        [*(e[c] for c in columns), INVALID if e["roof_invalid"] else 100 * e["of_roof"]]
        for e in entries
    ]
    head = ["operation", "ms", "±", "torch's best ms", "±", "times as fast", "rate", "unit"]
    out.table("operations, caches cold", [*head, "% of the roof"], rows)
    ratios.write(out)
    return entries


def _own(seconds: Sequence[float], cost: Cost, roofs: Roofs) -> dict[str, Any]:
    """The figures of an operation, beside the roof that bounds it."""
    middle = statistics.median(seconds)
    roofs.settle(lambda: roofs.floor(cost) > 1e3 * middle)
    compute = cost.flops / roofs.rate > cost.bytes / roofs.bandwidth
    unit, roof = ("GFLOP/s", roofs.rate) if compute else ("GB/s", roofs.bandwidth)
    rate = (cost.flops if compute else cost.bytes) / middle
    return {
        "ms": 1e3 * middle,
        "ms_spread": _spread(seconds),
        "rate": rate / 1e9,
        "unit": unit,
        "of_roof": rate / roof,
        "roof_invalid": rate > roof,
    }


def _spread(seconds: Sequence[float]) -> float | None:
    """± in milliseconds."""
    return spread([1e3 * value for value in seconds])


def operations(engine: Engine, rows: int) -> Iterator[Operation]:
    """All operations on a number of rows, from random inputs."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=engine.device).to(engine.dtype)

    text = engine.config.text_config
    x, q = make(rows, text.hidden_size), make(rows, text.num_attention_heads, text.head_dim)
    caches = make(2, text.num_hidden_layers, rows, text.num_key_value_heads, text.head_dim)
    gate_up = make(rows, 2 * text.intermediate_size)
    yield from _attention(engine, q, caches[0, 0], caches[1, 0])
    yield from _row_by_row(engine, x, q, gate_up)
    yield _gather(engine, x, caches)
    yield from _products(engine, x, make(2 * text.intermediate_size, text.hidden_size))


def _attention(engine: Engine, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Operation]:
    ops, sdpa, last = engine.model.ops, F.scaled_dot_product_attention, q[-1:]
    rows, segments = len(q), Segments([len(q)], engine.device)
    query, one, keys, values = (x.transpose(0, 1)[None] for x in (q, last, k, v))
    every_k, every_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
    ours = partial(ops.attention, q, k, v, segments, causal=True)
    theirs = [
        partial(sdpa, query, keys, values, is_causal=True, enable_gqa=True),
        partial(sdpa, query, every_k, every_v, is_causal=True),
    ]
    yield "prefill attention", ours, theirs, 2 * rows * q.numel(), 2 * (q.numel() + k.numel())
    ours = partial(ops.decode_attention, last, keys, values, [0], [rows])
    theirs = [partial(sdpa, one, keys, values, enable_gqa=True)]
    yield "decode attention", ours, theirs, 4 * q.numel(), 2 * k.numel()


def _row_by_row(engine: Engine, x: Tensor, q: Tensor, gate_up: Tensor) -> Iterator[Operation]:
    ops, weight, half = engine.model.ops, torch.randn_like(x[0]), q.shape[-1] // 2
    (gate, up), n = gate_up.chunk(2, -1), gate_up.numel() // 2
    rope = Rope.of(torch.randn(len(q), half, device=engine.device))

    def rotated() -> Tensor:
        return (q * rope.cos + q.roll(half, -1) * rope.sin).type_as(q)

    ours = partial(ops.rms_norm, x, weight, 1e-6)
    theirs = partial(F.rms_norm, x, x.shape[-1:], weight, 1e-6)
    yield "RMSNorm", ours, [theirs], 4 * x.numel(), 2 * x.numel()
    yield "SwiGLU", partial(ops.swiglu, gate_up), [lambda: F.silu(gate) * up], 4 * n, 3 * n
    yield "rotation", partial(ops.rotate, q, rope), [rotated], 3 * q.numel(), 2 * q.numel()


def _gather(engine: Engine, x: Tensor, caches: Tensor) -> Operation:
    kept = torch.arange(0, len(x), 9, device=engine.device)
    new, (keys, values) = slice(0, len(kept)), caches
    to_keys, to_values = torch.empty_like(caches[:, :, new])
    ours = partial(engine.model.ops.gather, keys, values, x, kept, to_keys, to_values, new)
    theirs = [lambda: ([cache.index_select(1, kept) for cache in (keys, values)], x[kept])]
    elements = to_keys.numel() + to_values.numel() + len(kept) * x.shape[-1]
    return "cache keep", ours, theirs, 0, 2 * elements


def _products(engine: Engine, x: Tensor, matrix: Tensor) -> Iterator[Operation]:
    ops, packed = engine.model.ops, engine.model.ops.pack(matrix)
    for name, some in (("product, all rows", x), ("product, one row", x[:1])):
        ours, theirs = partial(ops.linear, some, packed, None), partial(F.linear, some, matrix)
        yield name, ours, [theirs], 2 * len(some) * matrix.numel(), matrix.numel() + some.numel()
