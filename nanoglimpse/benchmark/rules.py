"""The rules by which a GPU takes one way or another, each timed against what it does not take.

Each rule was made without a GPU. Here both of its ways compute the same from the same inputs, and
the record says whether the rule should stay.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoglimpse.benchmark.figures import Ratio, spread
from nanoglimpse.benchmark.lengths import NewLengths
from nanoglimpse.benchmark.measuring import CLOSE, distance, now, run_rounds, take_turns
from nanoglimpse.benchmark.models import Workload, make_engine, shape_config, visual_sizes
from nanoglimpse.benchmark.output import Output
from nanoglimpse.config import TextConfig, parse_config
from nanoglimpse.errors import UsageError
from nanoglimpse.inference.cuda_graph import DecodeGraphPool, capture_cuda
from nanoglimpse.inference.decode import decode_many, lookahead
from nanoglimpse.kernels.backends import TORCH, select
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.gather import SurvivorAttention
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.model.device import find_device, find_dtype

# Two ways that are as fast as each other up to this share make no difference.
SAME = 0.03
EPS = 1e-6


class Choice(NamedTuple):
    """What a rule takes now, and the other way to the same results.

    Attributes:
        case: the sizes.
        names: of the way that is taken, and of the other one.
        ways: they return tensors.
        captured: whether the engine runs them in a captured step, where launches cost nothing.
    """

    case: str
    names: tuple[str, str]
    ways: tuple[Callable[[], Sequence[Tensor]], Callable[[], Sequence[Tensor]]]
    captured: bool = False


class Sizes:
    """Where the inputs of the rules come from.

    Attributes:
        text: the decoder of the shape.
        visual: visual tokens of a prompt, in several sizes.
        rows: of a prompt of the first size.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, find_device(args.device)
        config = parse_config(shape_config(args), args.shape)
        self.text: TextConfig = config.text_config
        self.dtype = find_dtype(args.dtype, self.device, config)
        self.visual = visual_sizes(args)
        self.rows = self.visual[0] + args.text
        self.kernels: Ops = select("triton", self.device)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers."""
        return (scale * torch.randn(shape, device=self.device)).to(self.dtype)

    def heads(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a prompt."""
        text = self.text
        q = self.random(rows, text.num_attention_heads, text.head_dim)
        k, v = self.random(2, rows, text.num_key_value_heads, text.head_dim)
        return q, k, v

    def rope(self, rows: int) -> Rope:
        """Tables of random angles."""
        return Rope.of(torch.randn(rows, self.text.head_dim // 2, device=self.device))


def long_attention(sizes: Sizes) -> Iterator[Choice]:
    """A long prompt in half precision: torch's flash attention, or the kernel."""
    rule, kernel = select("auto", sizes.device).attention, sizes.kernels.attention
    for visual in sizes.visual:
        rows = visual + sizes.args.text
        inputs = (*sizes.heads(rows), Segments([rows], sizes.device))
        ways = partial(_one, rule, *inputs), partial(_one, kernel, *inputs)
        yield Choice(f"{rows} rows", ("torch's, as the rule says", "the kernel"), ways)


def few_rows(sizes: Sizes) -> Iterator[Choice]:
    """The products of a layer for one token: fused, or torch's between Triton's elementwise."""
    text, ops, random = sizes.text, sizes.kernels, sizes.random
    width, inner = text.hidden_size, text.intermediate_size
    heads = text.num_attention_heads * text.head_dim
    both = heads + 2 * text.num_key_value_heads * text.head_dim
    x, attended, norm = random(1, width), random(1, heads), random(width)
    shapes = {"qkv": (both, width), "o": (width, heads)}
    shapes |= {"gate_up": (2 * inner, width), "down": (width, inner)}
    w = {name: random(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
    bias, weight = random(both), (norm, EPS)

    def fused() -> Sequence[Tensor]:
        product = ops.skinny_linear
        qkv, hidden = product(x, w["qkv"], bias, weight), product(attended, w["o"], residual=x)
        gated = product(hidden, w["gate_up"], norm=weight, gated=True)
        return qkv, product(gated, w["down"], residual=hidden)

    def separate() -> Sequence[Tensor]:
        qkv = TORCH.linear(ops.rms_norm(x, *weight), w["qkv"], bias)
        normed, hidden = ops.add_rms_norm(TORCH.linear(attended, w["o"], None), x, *weight)
        gated = ops.swiglu(TORCH.linear(normed, w["gate_up"], None))
        return qkv, TORCH.linear(gated, w["down"], None) + hidden

    case = f"1 row, {width} wide"
    yield Choice(case, ("skinny_linear", "torch's product"), (fused, separate), captured=True)


def pruning(sizes: Sizes) -> Iterator[Choice]:
    """Layer K of GlimpsePrune: keys scored as they are appended, survivors attending beside the
    gather; or a launch for each.
    """
    rows, text, ops, device = sizes.rows, sizes.text, sizes.kernels, sizes.device
    kv_heads, depth = text.num_key_value_heads, text.num_hidden_layers
    q, _, _ = sizes.heads(rows)
    keys_values, rope = sizes.random(rows, 2 * kv_heads, text.head_dim), sizes.rope(rows)
    caches = sizes.random(2, depth, rows, kv_heads, text.head_dim)
    hidden, segments = sizes.random(rows, text.hidden_size), Segments([rows], device)
    kept = torch.arange(0, rows, 9, device=device)
    new = torch.empty_like(caches[:, :, : len(kept)])
    k, v, every, target = caches[0, -1], caches[1, -1], slice(0, rows), slice(0, len(kept))
    queries = Queries(Segments([len(kept)], device), kept)
    attends = SurvivorAttention(q[kept], k, v, segments, queries)
    gathered = (*caches, hidden, kept, *new, target)

    def fused() -> Sequence[Tensor]:
        _, logits = ops.rope_append(keys_values, rope, k, v, every, (q[-1:], segments))
        survivors, attended = ops.gather(*gathered, attends)
        return _tensors(logits, survivors, attended)

    def separate() -> Sequence[Tensor]:
        ops.rope_append(keys_values, rope, k, v, every)
        logits = ops.row_logits(q[-1:], k, segments)
        attended = ops.attention(*attends[:4], causal=True, queries=queries)
        return _tensors(logits, ops.gather(*gathered)[0], attended)

    case = f"{rows} rows, {len(kept)} survive, {depth} layers"
    yield Choice(case, ("fused", "separate launches"), (fused, separate))


def elementwise(sizes: Sizes) -> Iterator[Choice]:
    """The norms, rotation and SwiGLU of a layer in prefill: Triton or torch."""
    text, rows, random = sizes.text, sizes.rows, sizes.random
    # The sum overwrites x, which has to stay as it is for the next call.
    x = random(rows, text.hidden_size)
    nothing = torch.zeros_like(x)
    weight, gate_up = random(text.hidden_size), random(rows, 2 * text.intermediate_size)
    q, k, _ = sizes.heads(rows)
    qk, rope = torch.cat((q, k), 1), sizes.rope(rows)

    def layer(ops: Ops) -> Sequence[Tensor]:
        norms = ops.rms_norm(x, weight, EPS), *ops.add_rms_norm(x, nothing, weight, EPS)
        return *norms, ops.rotate(qk, rope), ops.swiglu(gate_up)

    ways = partial(layer, sizes.kernels), partial(layer, TORCH)
    yield Choice(f"{rows} rows", ("Triton", "torch"), ways, captured=True)


RULES = {
    "long_attention": long_attention,
    "few_rows": few_rows,
    "pruning": pruning,
    "elementwise": elementwise,
}
# It is timed token by token, not as a kernel.
CAPTURED = "captured"
NAMES = (*RULES, CAPTURED)


def time_rule(args: argparse.Namespace, out: Output) -> list[dict[str, Any]]:
    """Writes the records of the rule that the options name, and returns them.

    Raises:
        UsageError: Triton or a captured step does not run here.
    """
    with torch.inference_mode():
        if args.rule == CAPTURED:
            records = [_captured(args)]
        else:
            sizes = Sizes(args)
            records = [_timed(args, sizes, choice) for choice in RULES[args.rule](sizes)]
    write(records, out)
    return records


def write(records: Sequence[dict[str, Any]], out: Output) -> None:
    """Writes a table that says which rule to keep."""
    columns = ("rule", "case", "taken", "ms", "ms_spread", "other", "other_ms", "other_ms_spread")
    rows = [[*(record[c] for c in columns), record["verdict"]] for record in records]
    head = ["rule", "case", "taken now", "ms", "±", "the other way", "ms", "±", "verdict"]
    out.table("which rules to keep", head, rows)


def verdict(taken: Sequence[float], other: Sequence[float]) -> str:
    """What the rounds say of a rule, by the quartiles of how many times as fast it is."""
    ratio = Ratio.of(other, taken)
    if ratio.low > 1 and ratio.median > 1 + SAME:
        return "keep"
    if ratio.high < 1 and ratio.median < 1 - SAME:
        return "change"
    return "no difference"


def _record(
    rule: str, case: str, names: Sequence[str], times: Sequence[Sequence[float]], fault: str = ""
) -> dict[str, Any]:
    """An entry of the JSON line, from milliseconds; or with a fault in their place."""
    entry: dict[str, Any] = {"rule": rule, "case": case, "taken": names[0], "other": names[1]}
    for prefix, values in zip(("", "other_"), times, strict=True):
        entry[f"{prefix}ms"] = statistics.median(values) if values else None
        entry[f"{prefix}ms_spread"] = spread(values)
    return entry | {"verdict": fault or verdict(*times)}


def _timed(args: argparse.Namespace, sizes: Sizes, choice: Choice) -> dict[str, Any]:
    """The record of a choice; what computes differently is not timed."""
    pairs = zip(*(way() for way in choice.ways), strict=True)
    error = max(distance(own.flatten(1), other.flatten(1)) for own, other in pairs)
    if error > CLOSE[sizes.dtype]:
        fault = f"not timed: they differ by {error:.1e}"
        return _record(args.rule, choice.case, choice.names, ([], []), fault)
    ways: dict[str, Callable[[], object]] = dict(zip(choice.names, choice.ways, strict=True))
    if choice.captured and sizes.device.type == "cuda":
        ways = {name: capture_cuda(partial(_drop, way), sizes.device) for name, way in ways.items()}
    seconds = take_turns(ways, args.rounds, sizes.device, args.until).values()
    return _record(args.rule, choice.case, choice.names, [[1e3 * s for s in x] for x in seconds])


def _captured(args: argparse.Namespace) -> dict[str, Any]:
    """The record of captured decoding against eager decoding, at lengths that change."""
    engine = make_engine(args)
    model, device, new = engine.model, engine.device, args.new
    graphs = engine.graphs
    if device.type != "cuda":
        graphs = DecodeGraphPool(model, capture=lambda step, _: step)  # The same step, eagerly.
    elif graphs is None:
        raise UsageError(f"decoding is not captured on {device} with backend {args.backend}")
    lengths = NewLengths(Workload(engine, args, visual_sizes(args)[0]))

    def prefilled() -> Any:
        return engine.prefill_many(lengths.next().prompts, "dense", max_new_tokens=new)

    def token(pool: DecodeGraphPool | None) -> dict[str, float]:
        prefill = prefilled()
        options = (new, True, None, lookahead(device))
        steps = decode_many(model, pool, prefill, *options)
        next(steps)
        start = now(device)
        count = sum(1 for _ in steps)
        return {"ms": 1000 * (now(device) - start) / count}

    def captured() -> dict[str, float]:
        lengths.visits += 1
        return token(graphs)

    contenders: dict[str, Callable[[], dict[str, float]]]
    contenders = {"captured": captured, "eager": partial(token, None)}
    figures = run_rounds("decoding", contenders, args.rounds, args.until)
    rows, times = len(lengths.workload.prompts[0]), [f["ms"] for f in figures.values()]
    case = f"a token after {rows} rows or more, {model.depth} layers"
    return _record(CAPTURED, case, list(contenders), times)


def _one(attention: Callable[..., Tensor], *args: Any) -> Sequence[Tensor]:
    return (attention(*args, causal=True),)


def _drop(way: Callable[[], object]) -> None:
    way()


def _tensors(*found: Tensor | None) -> Sequence[Tensor]:
    return [tensor for tensor in found if tensor is not None]
