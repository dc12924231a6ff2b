"""The Triton kernels; without a GPU they run in Triton's interpreter.

Results are compared with the definition in fp64 in two norms: the RMS error and the error of the
worst row may be at most twice the error of torch in the same dtype. Which rows a result depends on
is checked exactly. Allocated memory holds NaN until it is written.
"""

import pytest
import torch

from nanoglimpse import Prompt, load
from nanoglimpse.kernels.backends import select
from nanoglimpse.kernels.quantize import MODES, quantize
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.gather import SurvivorAttention
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.varlen import Segments
from tests.helpers.tiny import chat_ids, patches_of

pytest.importorskip("triton")
from nanoglimpse.kernels.triton_ops import linear  # imports Triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = select("triton", DEVICE)
# bf16 needs a GPU: in the interpreter, tl.dot multiplies its bit patterns.
DTYPES = [torch.float32, torch.float16]
if DEVICE.type == "cuda":
    DTYPES.append(torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def check(ours, low, exact):
    """Checks the error in two norms; rows are the first axis."""
    assert ours.shape == low.shape == exact.shape
    assert ours.dtype == low.dtype
    errors = [(x.double() - exact).flatten(1) for x in (ours, low)]
    for norm in (lambda e: e.norm(), lambda e: e.norm(dim=1).max()):
        mine, theirs = (float(norm(error)) for error in errors)
        assert mine <= 2 * theirs


def changed(function, x, *indices):
    """For each index, the rows of the result that change at all when x[index] changes."""
    before, rows = function(x).clone(), []
    for index in indices:
        other = x.clone()
        other[index] = torch.where(other[index].isnan(), 1000, 1000 - other[index])
        differs = (before != function(other)).flatten(1).any(1)
        rows.append(differs.nonzero().flatten().tolist())
    return rows


def exact_norm(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@dtypes
@pytest.mark.parametrize("shape", [(67, 100), (3, 5, 64), (1, 5000)], ids=str)
def test_rms_norm(dtype, shape):
    x, weight = 3 * randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    for eps in (1e-6, 0.5):
        ours, low = (ops.rms_norm(x, weight, eps) for ops in (TRITON, TORCH))
        check(ours, low, exact_norm(x, weight, eps))


@dtypes
def test_add_rms_norm(dtype):
    x, y, weight = *randn(2, 67, 100, dtype=dtype), randn(100, dtype=dtype)
    total = x.double() + y.double()
    (ours, sums), (low, low_sums) = (
        ops.add_rms_norm(x.clone(), y, weight, 1e-6) for ops in (TRITON, TORCH)
    )
    assert torch.equal(sums, low_sums)
    check(ours, low, exact_norm(total, weight, 1e-6))


def test_no_rows():
    x = randn(0, 48)
    assert TRITON.rms_norm(x, randn(48), 1e-6).shape == (0, 48)
    assert TRITON.swiglu(x).shape == (0, 24)
    assert TRITON.skinny_linear(x, randn(7, 48)).shape == (0, 7)
    assert TRITON.rotate(x.view(0, 4, 12), Rope.of(randn(0, 6))).shape == (0, 4, 12)


@pytest.mark.slow
def test_a_norm_reads_its_row():
    weight, x, y = randn(100), *randn(2, 67, 100)
    alone = (0, 31, 32, 66)
    assert changed(lambda x: TRITON.rms_norm(x, weight, 1e-6), x, *alone) == [[0], [31], [32], [66]]

    def add(x):
        return torch.cat(TRITON.add_rms_norm(x.clone(), y, weight, 1e-6), 1)

    assert changed(add, x, *alone) == [[0], [31], [32], [66]]


@dtypes
@pytest.mark.parametrize("shape", [(67, 200), (2, 3, 34), (1, 2 * 2300)], ids=str)
def test_swiglu(dtype, shape):
    x = 3 * randn(*shape, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    check(TRITON.swiglu(x), TORCH.swiglu(x), gate * gate.sigmoid() * up)


def test_swiglu_pairs_columns():
    x = randn(7, 2 * 1500)
    columns = (0, 1023, 1024, 1499, 1500, 2999)
    pairs = changed(lambda x: TRITON.swiglu(x.T.contiguous()).T, x.T, *columns)
    assert pairs == [[column % 1500] for column in columns]


def exact_skinny_linear(x, weight, bias, norm, gated, residual):
    x = exact_norm(x, *norm) if norm else x.double()
    out = x @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    if gated:
        gate, up = out.chunk(2, -1)
        out = gate * gate.sigmoid() * up
    return out if residual is None else out + residual.double()


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize(
    ("rows", "columns", "width", "biased", "normed", "gated", "added"),
    [
        (1, 67, 300, True, True, False, False),
        (6, 40, 200, True, False, False, False),
        (5, 33, 500, False, False, False, True),
        (16, 48, 140, False, True, True, False),
        (3, 70, 300, False, False, True, True),
        (16, 16, 1100, False, True, True, True),
    ],
)
def test_skinny_linear(dtype, rows, columns, width, biased, normed, gated, added):
    x = 3 * randn(rows, width, dtype=dtype)
    weight = randn(columns * (1 + gated), width, dtype=dtype) / width**0.5
    bias = randn(len(weight), dtype=dtype) if biased else None
    norm = (randn(width, dtype=dtype), 0.5) if normed else None
    residual = randn(rows, columns, dtype=dtype) if added else None
    args = (x, weight, bias, norm, gated, residual)
    ours, low = (ops.skinny_linear(*args) for ops in (TRITON, TORCH))
    check(ours, low, exact_skinny_linear(*args))


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rows", "columns", "width", "biased", "normed", "gated", "added"),
    [
        (1, 80, 320, True, True, False, False),
        (16, 32, 448, False, True, True, True),
        (3, 48, 1152, False, False, False, True),
        (40, 48, 320, True, False, False, False),
    ],
)
def test_quantised_skinny_linear(dtype, mode, rows, columns, width, biased, normed, gated, added):
    """As with the dense matrix that the levels represent; many rows go through a dense copy."""
    x = 3 * randn(rows, width, dtype=dtype)
    weight = randn(columns * (1 + gated), width, dtype=dtype) / width**0.5
    packed, matmul = quantize(weight, mode, TRITON)
    plain = TORCH.dequantize(packed, matmul.scales, width)
    bias = randn(len(weight), dtype=dtype) if biased else None
    norm = (randn(width, dtype=dtype), 0.5) if normed else None
    residual = randn(rows, columns, dtype=dtype) if added else None
    rest = (bias, norm, gated, residual)
    ours = TRITON.skinny_linear(x, packed, *rest, matmul)
    low = TORCH.skinny_linear(x, plain, *rest)
    exact = TORCH.dequantize(packed, matmul.scales.double(), width)
    check(ours, low, exact_skinny_linear(x, exact, *rest))


@dtypes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(80, 192), (33, 64), (16, 256)], ids=str)
def test_dequantize(dtype, mode, shape):
    packed, matmul = quantize(randn(*shape, dtype=dtype), mode, TRITON)
    args = (packed, matmul.scales, shape[1])
    ours, low = (ops.dequantize(*args) for ops in (TRITON, TORCH))
    check(ours, low, TORCH.dequantize(packed, matmul.scales.double(), shape[1]))


def test_no_split_of_a_sum_is_empty_or_too_many():
    """At released sizes as planned, and for any number of steps."""
    dense = {2048: 4, 2560: 4, 3584: 2, 4608: 2, 2 * 11008: 1, 2 * 18944: 1}
    for columns, splits in dense.items():
        assert linear.num_splits(columns * 256, 2048, 128) == splits
    for steps in range(1, 40):
        splits = linear.num_splits(16 * 256, 128 * steps, 128)
        assert 1 <= splits <= min(linear.MAX_SPLITS, steps)
        assert -(-steps // splits) * (splits - 1) < steps


def test_large_activations_do_not_overflow_before_the_norm():
    """fp16 as in the residual stream of a real model, times a large weight of the norm."""
    x, norm = torch.ones(1, 64).half(), torch.full((64,), 30.0).half()
    x[0, 3] = 3e4
    args = (x.to(DEVICE), torch.eye(64).half().to(DEVICE), None, (norm.to(DEVICE), 1e-6))
    ours, low = (ops.skinny_linear(*args) for ops in (TRITON, TORCH))
    torch.testing.assert_close(ours, low, rtol=2e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_skinny_linear_reads_its_row_and_weights(gated):
    columns = 40
    x, weight = randn(5, 300), randn(columns * (1 + gated), 300)
    # Small, so that weights of 1000 leave the gate finite.
    norm, residual = (randn(300) / 1e4, 1e-6), randn(5, columns)

    def rows(x):
        return TRITON.skinny_linear(x, weight, None, norm, gated, residual)

    def by_column(weight):
        return TRITON.skinny_linear(x, weight, None, norm, gated, residual).T

    assert changed(rows, x, 0, (3, 299), 4) == [[0], [3], [4]]
    last = len(weight) - 1
    places = (0, (15, 299), (16, 0), last)
    assert changed(by_column, weight, *places) == [[0], [15], [16], [last % columns]]


def exact_rotation(x, angles):
    low, high = x.double().chunk(2, -1)
    cos, sin = (f(angles.double())[:, None] for f in (torch.cos, torch.sin))
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


@dtypes
@pytest.mark.parametrize(("rows", "heads", "width"), [(67, 3, 80), (5, 18, 128), (1, 6, 8)])
def test_rotate(dtype, rows, heads, width):
    # Some of the heads of a wider row, as in the vision encoder.
    x = randn(rows, heads + 2, width, dtype=dtype)[:, :heads]
    angles = 10 * randn(rows, width // 2)
    ours, low = (ops.rotate(x, Rope.of(angles)) for ops in (TRITON, TORCH))
    check(ours, low, exact_rotation(x, angles))


def test_a_rotation_reads_its_head():
    rope, x = Rope.of(randn(67, 20)), randn(67, 3, 40)

    def by_head(x):
        return TRITON.rotate(x.transpose(0, 1).contiguous(), rope).transpose(0, 1)

    assert changed(by_head, x.transpose(0, 1), 0, 1, 2) == [[0], [1], [2]]
    assert changed(lambda x: TRITON.rotate(x, rope), x, 0, 40, 66) == [[0], [40], [66]]


def decode_inputs(lengths, heads, group, width, dtype=torch.float32):
    """One layer of a cache with unused rows after each sequence, which hold NaN."""
    starts = [sum(lengths[:b]) + 3 * b for b in range(len(lengths))]
    cache = torch.full((2, sum(lengths) + 3 * len(lengths), heads, width), torch.nan)
    for start, length in zip(starts, lengths, strict=True):
        # Scores rise along the sequence, so that every block changes the maximum.
        rise = torch.linspace(0.5, 3, length)[:, None, None]
        cache[:, start : start + length] = torch.randn(2, length, heads, width) * rise
    k, v = (x.to(DEVICE, dtype).transpose(0, 1)[None] for x in cache)
    return randn(len(lengths), heads * group, width, dtype=dtype), k, v, starts, lengths


def exact_decode(q, k, v, starts, lengths):
    out = torch.empty(q.shape, dtype=torch.float64, device=DEVICE)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for head in range(q.shape[1]):
            own = head * k.shape[1] // q.shape[1]
            keys, values = (x[0, own, start : start + length].double() for x in (k, v))
            weights = (keys @ q[b, head].double() / q.shape[-1] ** 0.5).softmax(0)
            out[b, head] = weights @ values
    return out.flatten(1)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize(
    ("lengths", "heads", "group", "width"),
    [((333,), 2, 7, 32), ((1, 200, 64), 1, 3, 80), ((17, 129), 3, 1, 24)],
)
def test_decode_attention(dtype, lengths, heads, group, width):
    inputs = decode_inputs(lengths, heads, group, width, dtype)
    ours, low = (ops.decode_attention(*inputs) for ops in (TRITON, TORCH))
    check(ours, low, exact_decode(*inputs))
    # A second call finds the counters at 0, and lengths on the device give the same result.
    spans = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in inputs[3:])
    assert torch.equal(TRITON.decode_attention(*inputs[:3], *spans), ours)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(100,), (1, 65)])
def test_decode_attention_reads_exactly_its_keys(lengths):
    q, k, v, starts, _ = decode_inputs(lengths, 2, 3, 16)
    q = q / 10  # so that no key has a negligible weight
    indices, expected = [], []
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        stop = start + length
        for row in sorted({start, start + length // 2, stop - 1, stop, stop + 2}):
            head = row % 2
            indices.append((slice(None), 0, head, row))
            expected.append([6 * b + 3 * head + g for g in range(3)] if row < stop else [])

    def attend(kv):
        return TRITON.decode_attention(q, *kv, starts, lengths).view(-1, 16)

    assert changed(attend, torch.stack((k, v)), *indices) == expected


@dtypes
@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize(("survivors", "size"), [(150, 50), (5, 7), (0, 50)])
def test_gather(dtype, sliced, survivors, size):
    """Rows are copied bit by bit, and rows that are not a target keep their NaN."""
    k, v = randn(2, 3, 201, 2, 10, dtype=dtype)
    hidden, rows = randn(201, size, dtype=dtype), torch.randperm(201)[:survivors]
    targets = slice(11, 11 + survivors) if sliced else torch.randperm(170)[:survivors].to(DEVICE)
    new, expected = torch.full((2, 2, 5, 170, 2, 10), torch.nan).to(DEVICE, dtype)
    args = (k, v, hidden, rows.to(DEVICE))
    kept, _ = TRITON.gather(*args, new[0, :3], new[1, :3], targets)
    truth = TORCH.gather(*args, expected[0, :3], expected[1, :3], targets)
    assert torch.equal(kept, truth[0])
    assert torch.equal(new.nan_to_num(7), expected.nan_to_num(7))


def exact_attention(q, k, v, seen):
    """Attention in fp64 to the keys that each query row may read; also the logits."""
    scores = torch.einsum(
        "qhd,khd->hqk", q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    )
    scores = scores / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    values = v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1), scores


def visible(lengths, causal, rows=None):
    """Bool [rows, keys]: which keys each query row may read, from the definition."""
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(sequence))
    seen = sequence[:, None] == sequence
    if causal:
        seen &= place[:, None] >= place
    return (seen if rows is None else seen[rows]).to(DEVICE)


def rising(*shape, dtype):
    """Values that grow from row to row, so that every block of keys changes the maximum."""
    return (torch.randn(shape) * torch.linspace(0.5, 2, shape[0])[:, None, None]).to(DEVICE, dtype)


def queries_of(lengths, rows):
    """The `Queries` for some rows, which are counted over all segments."""
    starts = Segments(lengths).cu_seqlens.tolist()
    spans = [(start, start + n) for start, n in zip(starts, lengths, strict=False)]
    own = [[row - start for row in rows if start <= row < stop] for start, stop in spans]
    positions = torch.tensor([place for places in own for place in places], device=DEVICE)
    return Queries(Segments([len(places) for places in own], DEVICE), positions)


SHAPES = [  # heads, kv heads, width, width of a value
    (6, 2, 16, 16),
    (3, 1, 80, 80),
    (2, 2, 40, 12),
    (4, 2, 9, 9),
]


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(dtype, causal, shape):
    heads, kv_heads, width, v_width = shape
    lengths = (33, 1, 67) if width == 80 else (17, 1, 100)
    rows = sum(lengths)
    q = randn(rows, heads + 1, width, dtype=dtype)[:, 1:]
    k, v = (rising(rows, kv_heads, w, dtype=dtype) for w in (width, v_width))
    args = (q, k, v, Segments(lengths, DEVICE))
    ours, low = (ops.attention(*args, causal=causal) for ops in (TRITON, TORCH))
    check(ours, low, exact_attention(q, k, v, visible(lengths, causal))[0])


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_some_rows(dtype, causal):
    """As when a method prunes inside a layer: the surviving rows attend to all rows."""
    lengths, rows = (70, 100, 5), torch.randperm(175)[:60].tolist()
    rows = sorted({*rows, 0, 69, 70, 174})
    q, k, v = (rising(175, h, 24, dtype=dtype) for h in (4, 2, 2))
    q, queries = q[rows], queries_of(lengths, rows)
    args = (q, k, v, Segments(lengths, DEVICE))
    ours, low = (ops.attention(*args, causal=causal, queries=queries) for ops in (TRITON, TORCH))
    check(ours, low, exact_attention(q, k, v, visible(lengths, causal, rows))[0])


def test_attention_over_scattered_rows():
    q, k, v = randn(3, 50, 2, 16)
    segments = Segments((20, 30), DEVICE, torch.randperm(50).to(DEVICE))
    ours, expected = (ops.attention(q, k, v, segments, causal=False) for ops in (TRITON, TORCH))
    torch.testing.assert_close(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_attention_reads_exactly_its_keys(causal, pruned):
    """With equal scores and one-hot values, scaled by head, the output shows the keys."""
    lengths, total = (37, 100, 1), 138
    rows = [0, 5, 36, 37, 69, 70, 99, 136, 137] if pruned else [*range(total)]
    q, k = randn(len(rows), 6, 140), torch.zeros(total, 2, 140, device=DEVICE)
    v = torch.eye(total, 139, device=DEVICE)[:, None] * torch.tensor([[1.0], [2.0]], device=DEVICE)
    queries = queries_of(lengths, rows) if pruned else None
    out = TRITON.attention(q, k, v, Segments(lengths, DEVICE), causal=causal, queries=queries)
    seen = visible(lengths, causal, rows)[:, None].float()
    expected = seen / seen.sum(-1, keepdim=True) * torch.tensor([1.0, 2.0]).to(DEVICE)[:, None]
    expected = torch.nn.functional.pad(expected.repeat_interleave(3, 1), (0, 1))
    torch.testing.assert_close(out.view(len(rows), 6, 139), expected)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("width", [16, 72])
def test_attention_colsum(dtype, width):
    lengths = (70, 1, 37)
    q, k = (rising(108, h, width, dtype=dtype) for h in (4, 2))
    ours, low = (ops.attention_colsum(q, k, Segments(lengths, DEVICE)) for ops in (TRITON, TORCH))
    seen = visible(lengths, False)
    _, scores = exact_attention(q, k, k, seen)
    check(ours, low, scores.masked_fill(~seen, -torch.inf).softmax(-1).sum(1).T)


@pytest.mark.slow
def test_attention_colsum_stays_inside_segments():
    lengths = (65, 2)
    q, k = randn(67, 2, 16) / 10, randn(67, 1, 16)
    expected = [[*range(65)], [*range(65)], [65, 66]]

    def receive(q, k):
        return TRITON.attention_colsum(q, k, Segments(lengths, DEVICE))

    assert changed(lambda q: receive(q, k), q, 0, 64, 65) == expected
    assert changed(lambda k: receive(q, k), k, 0, 64, 65) == expected


@dtypes
@pytest.mark.parametrize("sliced", [True, False])
def test_rope_append(dtype, sliced):
    qkv, angles = randn(67, 10, 24, dtype=dtype), randn(67, 12)
    rows = slice(5, 72) if sliced else torch.randperm(90)[:67].to(DEVICE)
    exact = qkv.double()
    exact[:, :8] = exact_rotation(exact[:, :8], 10 * angles)
    both = []
    for ops in (TRITON, TORCH):
        k, v = torch.full((2, 90, 2, 24), torch.nan, device=DEVICE, dtype=dtype)
        rope = Rope.of(10 * angles)
        q, _ = ops.rope_append(qkv, rope, k, v, rows)
        assert int(k.isfinite().sum()) == int(v.isfinite().sum()) == 67 * 48
        both.append((q, k[rows], v[rows]))
    for ours, low, truth in zip(*both, exact.split((6, 2, 2), 1), strict=True):
        check(ours, low, truth)


def test_rope_append_reads_its_row():
    rope = Rope.of(randn(67, 12))

    def append(x):
        k, v = torch.zeros(2, 67, 2, 24, device=DEVICE)
        q, _ = TRITON.rope_append(x, rope, k, v, slice(0, 67))
        return torch.cat((q, k, v), 1)

    assert changed(append, randn(67, 10, 24), 0, 40, 66) == [[0], [40], [66]]


def exact_logits(q, k, lengths):
    """Raw logits in fp64 of each row for the query of its segment, [T, HQ]."""
    parts = []
    for own, keys in zip(q.double(), k.double().split(lengths), strict=True):
        keys = keys.repeat_interleave(len(own) // k.shape[1], 1)
        parts.append(torch.einsum("hd,nhd->nh", own, keys) / k.shape[-1] ** 0.5)
    return torch.cat(parts)


LENGTHS = [(67,), (33, 1, 70), (1, 1, 2, 90)]


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 9), (28, 4, 128), (3, 3, 80)])
def test_row_logits(dtype, lengths, heads, kv_heads, width):
    """The keys are some of the heads of wider rows, as of a projection of q and k."""
    rows = sum(lengths)
    q, k = randn(len(lengths), heads, width, dtype=dtype), randn(rows, 9, width, dtype=dtype)
    k, segments = k[:, 9 - kv_heads :], Segments(lengths, DEVICE)
    ours, low = (ops.row_logits(q, k, segments) for ops in (TRITON, TORCH))
    check(ours, low, exact_logits(q, k, lengths))


def test_row_logits_read_the_query_of_their_segment():
    lengths = (33, 1, 70)
    q, k, segments = randn(3, 6, 24), randn(104, 2, 24), Segments(lengths, DEVICE)
    own = changed(lambda q: TRITON.row_logits(q, k, segments), q, 0, 1, (2, 5))
    assert own == [[*range(33)], [33], [*range(34, 104)]]
    assert changed(lambda k: TRITON.row_logits(q, k, segments), k, 0, 32, (33, 1), 103) == [
        [0],
        [32],
        [33],
        [103],
    ]

    def by_head(q):
        return TRITON.row_logits(q.transpose(0, 1), k[:33], Segments([33], DEVICE)).T

    assert changed(by_head, q[:1].transpose(0, 1), 0, 3, 5) == [[0], [3], [5]]


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "width"), [(0, 6, 2, 24), (6, 6, 2, 24), (0, 28, 4, 128)]
)
def test_rope_append_scores(dtype, sliced, lengths, queries, heads, kv_heads, width):
    """With and without heads of q; logits are those of the keys that the cache then holds."""
    rows = sum(lengths)
    wide = randn(rows, queries + 2 * kv_heads + 1, width, dtype=dtype)
    qkv, angles = wide[:, 1:], 10 * randn(rows, width // 2)
    places = slice(5, 5 + rows) if sliced else torch.randperm(rows + 9)[:rows].to(DEVICE)
    scored = (randn(len(lengths), heads, width, dtype=dtype), Segments(lengths, DEVICE))
    exact = qkv.double()
    rotated = queries + kv_heads
    exact[:, :rotated] = exact_rotation(exact[:, :rotated], angles)
    both = []
    for ops in (TRITON, TORCH):
        k, v = torch.full((2, rows + 9, kv_heads, width), torch.nan, device=DEVICE, dtype=dtype)
        q, logits = ops.rope_append(qkv, Rope.of(angles), k, v, places, scored)
        assert q.shape == (rows, queries, width)
        assert int(k.isfinite().sum()) == int(v.isfinite().sum()) == rows * kv_heads * width
        torch.testing.assert_close(logits, ops.row_logits(scored[0], k[places], scored[1]))
        both.append((torch.cat((q, k[places], v[places]), 1), logits))
    truth = (exact, exact_logits(scored[0], exact[:, queries : queries + kv_heads], lengths))
    for ours, low, wanted in zip(*both, truth, strict=True):
        check(ours, low, wanted)


@pytest.mark.slow
def test_scored_keys_belong_to_their_segment():
    lengths, rope = (33, 1, 70), Rope.of(randn(104, 12))
    q, qkv = randn(3, 6, 24), randn(104, 10, 24)

    def score(q, qkv=qkv):
        k, v = torch.zeros(2, 104, 2, 24, device=DEVICE)
        scored = (q, Segments(lengths, DEVICE))
        return TRITON.rope_append(qkv, rope, k, v, slice(0, 104), scored)[1]

    assert changed(score, q, 0, 1, 2) == [[*range(33)], [33], [*range(34, 104)]]
    # Of a row's heads its keys alone are scored.
    places = [(row, head) for row in (0, 33, 103) for head in (0, 5, 6, 7, 8, 9)]
    scored_rows = [[row] if head in (6, 7) else [] for row, head in places]
    assert changed(lambda x: score(q, x), qkv, *places) == scored_rows


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize(
    ("lengths", "share", "layers", "heads", "kv_heads", "width", "size"),
    [
        ((70, 100, 5), 3, 3, 6, 2, 24, 50),
        ((201,), 9, 5, 3, 1, 80, 90),
        # Widths of 7B, and more tiles than attention has programs.
        ((1, 90), 5, 20, 28, 4, 128, 3584),
        ((40,), 1, 2, 4, 2, 9, 7),
    ],
)
def test_gather_beside_attention(
    dtype, sliced, lengths, share, layers, heads, kv_heads, width, size
):
    """The copies are those of a gather bit by bit, and attention is that of its own launch."""
    total = sum(lengths)
    ends = Segments(lengths).cu_seqlens[1:].tolist()
    rows = sorted({*range(0, total, share), *(end - 1 for end in ends)})
    survivors = torch.tensor(rows, device=DEVICE)
    k, v = randn(2, layers, total, kv_heads, width, dtype=dtype)
    hidden, q = randn(total, size, dtype=dtype), randn(len(rows), heads, width, dtype=dtype)
    segments, queries = Segments(lengths, DEVICE), queries_of(lengths, rows)
    attends = SurvivorAttention(q, k[-1], v[-1], segments, queries)
    targets = (
        slice(11, 11 + len(rows))
        if sliced
        else torch.randperm(len(rows) + 30)[: len(rows)].to(DEVICE)
    )
    places = (2, 2, layers + 2, len(rows) + 30, kv_heads, width)
    new, expected = torch.full(places, torch.nan).to(DEVICE, dtype)
    args = (k, v, hidden, survivors)
    ours = TRITON.gather(*args, *new[:, :layers], targets, attends)
    theirs = TORCH.gather(*args, *expected[:, :layers], targets, attends)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(new.nan_to_num(7), expected.nan_to_num(7))
    exact, _ = exact_attention(q, k[-1], v[-1], visible(lengths, True, rows))
    check(ours[1], theirs[1], exact)
    alone = TRITON.attention(q, k[-1], v[-1], segments, causal=True, queries=queries)
    assert torch.equal(ours[1], alone)


def test_nothing_to_score_or_to_gather():
    q, k, none = randn(0, 6, 8), randn(0, 2, 8), Segments([], DEVICE)
    assert TRITON.row_logits(q, k, none).shape == (0, 6)
    cache = torch.zeros(2, 0, 2, 8, device=DEVICE)
    _, logits = TRITON.rope_append(
        randn(0, 4, 8), Rope.of(randn(0, 4)), *cache, slice(0, 0), (q, none)
    )
    assert logits.shape == (0, 6)
    rows = torch.empty(0, dtype=torch.int64, device=DEVICE)
    attends = SurvivorAttention(q, k, k, none, Queries(none, rows))
    caches = torch.zeros(2, 3, 0, 2, 8, device=DEVICE)
    kept, attended = TRITON.gather(*caches, randn(0, 5), rows, *caches, slice(0, 0), attends)
    assert kept.shape == (0, 5)
    assert attended.shape == (0, 48)


def test_without_a_kernel_the_reference_runs():
    """For other dtypes, and for heads that are too wide."""
    x = randn(7, 4, 12, dtype=torch.float64)
    assert torch.equal(TRITON.swiglu(x), TORCH.swiglu(x))
    one = Segments([7], DEVICE)
    ours, expected = (ops.row_logits(x[:1], x[:, :2], one) for ops in (TRITON, TORCH))
    assert torch.equal(ours, expected)
    for many in (randn(17, 12), x[0]):
        weight = randn(5, 12, dtype=many.dtype)
        assert torch.equal(TRITON.skinny_linear(many, weight), TORCH.skinny_linear(many, weight))
    row, weight, bias = randn(1, 12), randn(6, 12), randn(6)
    for more in ({"gated": True}, {"residual": randn(1, 6)}):
        ours, expected = (ops.skinny_linear(row, weight, bias, **more) for ops in (TRITON, TORCH))
        assert torch.equal(ours, expected)
    segments, rope = Segments([7], DEVICE), Rope.of(randn(7, 6))
    assert torch.equal(TRITON.rotate(x, rope), TORCH.rotate(x, rope))
    wide = randn(7, 2, 300)
    for q in (x, wide):
        ours, expected = (ops.attention(q, q, q, segments, causal=True) for ops in (TRITON, TORCH))
        assert torch.equal(ours, expected)
        ours, expected = (ops.attention_colsum(q, q, segments) for ops in (TRITON, TORCH))
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("method", ["dense", "glimpse"])
@pytest.mark.slow
def test_a_model_answers_as_with_torch(tiny_folder, method):
    """Two prompts of different lengths, whose images need whole and partial windows."""
    parts = ([3, (1, 6, 10), 5], [4, (1, 2, 4), 2, (1, 10, 2), 1])
    prefills, tokens = [], []
    for backend in ("triton", "torch"):
        engine = load(tiny_folder, dtype="float32", device=DEVICE.type, backend=backend)
        prompts = []
        for part in parts:
            grids = [x for x in part if not isinstance(x, int)]
            ids = chat_ids(*part, seed=1)
            prompts.append(Prompt.from_tokens(ids, patches_of(grids), grids, config=engine.config))
        options = {"max_ratio": 0.5} if method == "glimpse" else {}
        prefills.append(engine.prefill_many(prompts, method, **options))
        answers = engine.decode_many(prefills[-1], max_new_tokens=4, ignore_eos=True)
        tokens.append([*answers])
    ours, expected = prefills
    assert torch.equal(ours.kept, expected.kept)
    assert bool(ours.kept.all()) == (method == "dense")
    for name in ("visual", "taps", "logits"):
        exact = getattr(expected, name)
        assert float((getattr(ours, name) - exact).norm()) <= 1e-5 * float(exact.norm())
    assert tokens[0] == tokens[1]
