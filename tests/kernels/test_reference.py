"""The reference operations against definitions written with loops."""

import math

import pytest
import torch

from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.varlen import Segments


def attention_by_rows(q, k, v, lengths, causal):
    out, start = torch.zeros(len(q), q.shape[1], v.shape[-1]), 0
    group = q.shape[1] // k.shape[1]
    for length in lengths:
        for i in range(start, start + length):
            stop = i + 1 if causal else start + length
            for head in range(q.shape[1]):
                scores = k[start:stop, head // group] @ q[i, head] / math.sqrt(q.shape[-1])
                out[i, head] = scores.softmax(0) @ v[start:stop, head // group]
        start += length
    return out.flatten(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (9, 9, 3, 1, 1), (1, 6, 2), (4, 0, 3)])
@pytest.mark.parametrize(("heads", "kv_heads", "width", "v_width"), [(6, 2, 8, 8), (3, 3, 12, 4)])
def test_attention_stays_inside_segments(lengths, causal, heads, kv_heads, width, v_width):
    rows = sum(lengths)
    q, k = torch.randn(rows, heads, width), torch.randn(rows, kv_heads, width)
    v = torch.randn(rows, kv_heads, v_width)
    ours = TORCH.attention(q, k, v, Segments(lengths), causal=causal)
    torch.testing.assert_close(ours, attention_by_rows(q, k, v, lengths, causal))


def test_attention_over_scattered_rows():
    """Segments of x[rows]: the rows of a segment are not contiguous in x."""
    q, k, v = torch.randn(3, 9, 2, 4)
    rows = torch.randperm(9)
    ours = TORCH.attention(q, k, v, Segments((4, 5), rows=rows), causal=False)
    expected = attention_by_rows(q[rows], k[rows], v[rows], (4, 5), False)
    torch.testing.assert_close(ours[rows], expected)


def test_attention_reads_exactly_its_keys():
    """With equal scores and one-hot values, scaled by head, the output shows the keys."""
    lengths, heads = (5, 3, 5), 2
    v = torch.eye(13)[:, None] * torch.tensor([1.0, 2.0])[:, None]
    q, k = torch.randn(13, 4, 13), torch.zeros(13, heads, 13)
    out = TORCH.attention(q, k, v, Segments(lengths), causal=True).view(13, 4, 13)
    start = 0
    for length in lengths:
        for i in range(length):
            for head in range(4):
                expected = torch.zeros(13)
                expected[start : start + i + 1] = (1 + head // 2) / (i + 1)
                torch.testing.assert_close(out[start + i, head], expected)
        start += length


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_some_rows(causal):
    q, k, v = torch.randn(11, 6, 8), *torch.randn(2, 11, 2, 8)
    rows = torch.tensor([1, 4, 5, 9])
    queries = Queries(Segments([2, 2]), torch.tensor([1, 4, 0, 4]))
    some = TORCH.attention(q[rows], k, v, Segments([5, 6]), causal=causal, queries=queries)
    every = attention_by_rows(q, k, v, (5, 6), causal)
    torch.testing.assert_close(some, every[rows])
    all_of_them = Queries(Segments([5, 6]), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]))
    same = TORCH.attention(q, k, v, Segments([5, 6]), causal=causal, queries=all_of_them)
    torch.testing.assert_close(same, every)


def test_attention_colsum():
    q, k, lengths = torch.randn(1300, 4, 8), torch.randn(1300, 2, 8), (1, 1290, 9)
    ours, start = TORCH.attention_colsum(q, k, Segments(lengths)), 0
    for length in lengths:
        part = slice(start, start + length)
        for head in range(4):
            scores = q[part, head] @ k[part, head // 2].T / math.sqrt(8)
            torch.testing.assert_close(ours[part, head], scores.softmax(-1).sum(0))
        start += length


@pytest.mark.parametrize("rows", [slice(2, 7), torch.tensor([8, 0, 3, 5, 1])])
def test_rope_append_writes_rows(rows):
    qkv, rope = torch.randn(5, 10, 4), Rope.of(torch.randn(5, 2))
    k_rows, v_rows = torch.full((2, 9, 2, 4), torch.nan)
    q, _ = TORCH.rope_append(qkv, rope, k_rows, v_rows, rows)
    assert torch.equal(q, TORCH.rotate(qkv[:, :6], rope))
    assert torch.equal(k_rows[rows], TORCH.rotate(qkv[:, 6:8], rope))
    assert torch.equal(v_rows[rows], qkv[:, 8:])
    assert int(k_rows.isfinite().sum()) == int(v_rows.isfinite().sum()) == 5 * 8


@pytest.mark.parametrize("sequences", [1, 3])
def test_decode_attention_reads_only_its_rows(sequences):
    starts, lengths = [2, 9, 0][:sequences], [5, 3, 1][:sequences]
    k, v = torch.full((2, 14, 2, 8), torch.nan)
    for start, length in zip(starts, lengths, strict=True):
        k[start : start + length] = torch.randn(length, 2, 8)
        v[start : start + length] = torch.randn(length, 2, 8)
    q = torch.randn(sequences, 6, 8)
    heads_first = (x.transpose(0, 1)[None] for x in (k, v))
    ours = TORCH.decode_attention(q, *heads_first, starts, lengths).view(sequences, 6, 8)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for head in range(6):
            keys = k[start : start + length, head // 3]
            weights = (keys @ q[b, head] / math.sqrt(8)).softmax(0)
            torch.testing.assert_close(
                ours[b, head], weights @ v[start : start + length, head // 3]
            )


def test_row_logits_are_raw_and_in_query_head_order():
    q, k = torch.randn(2, 6, 8), torch.randn(5, 2, 8)
    ours = TORCH.row_logits(q, k, Segments([2, 3]))
    for row in range(5):
        for head in range(6):
            expected = k[row, head // 3] @ q[int(row >= 2), head] / math.sqrt(8)
            torch.testing.assert_close(ours[row, head], expected)


def test_rotation_turns_pairs_half_a_head_apart():
    angles = torch.randn(4, 3)
    x = torch.randn(4, 2, 6)
    out = TORCH.rotate(x, Rope.of(angles))
    for row in range(4):
        for head in range(2):
            for j in range(3):
                c, s = math.cos(angles[row, j]), math.sin(angles[row, j])
                a, b = x[row, head, j], x[row, head, j + 3]
                assert float(out[row, head, j]) == pytest.approx(float(a * c - b * s), abs=1e-6)
                assert float(out[row, head, j + 3]) == pytest.approx(float(b * c + a * s), abs=1e-6)


@pytest.mark.parametrize("rows", [3, slice(1, 4), torch.tensor([4, 0])], ids=str)
def test_a_rope_is_indexed_by_row(rows):
    rope = Rope.of(torch.randn(5, 3))
    part = rope[rows]
    assert torch.equal(part.cos, rope.cos[rows])
    assert torch.equal(part.sin, rope.sin[rows])


def test_a_rope_is_not_unpacked():
    """Rope was a tuple whose [0] was not its first element; unpacking it must fail now."""
    with pytest.raises(TypeError):
        _, _ = Rope.of(torch.randn(2, 3))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(eps):
    x, weight = torch.randn(4, 3, 10), torch.randn(10)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight
    torch.testing.assert_close(TORCH.rms_norm(x, weight, eps), expected)
    low = TORCH.rms_norm(x.bfloat16(), weight.bfloat16(), eps)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.02, atol=0.02)


def test_rms_norm_of_large_half_precision_values():
    """The squares of these fp16 values overflow fp16, so the mean must be taken in fp32."""
    x = torch.full((2, 8), 300.0, dtype=torch.float16)
    assert TORCH.rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6).tolist() == [[1.0] * 8] * 2


def test_add_rms_norm():
    x, residual, weight = *torch.randn(2, 5, 10), torch.randn(10)
    normed, total = TORCH.add_rms_norm(x.clone(), residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, TORCH.rms_norm(total, weight, 1e-6))


def test_swiglu():
    x = torch.randn(5, 14)
    gate, up = x[:, :7], x[:, 7:]
    torch.testing.assert_close(TORCH.swiglu(x), gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("target_rows", [slice(1, 4), torch.tensor([6, 0, 2])])
def test_gather_writes_only_its_target(target_rows):
    (k, v), hidden = torch.randn(2, 3, 9, 2, 4), torch.randn(9, 5)
    new = torch.full((2, 5, 7, 2, 4), torch.nan)
    rows = torch.tensor([8, 0, 5])
    kept, _ = TORCH.gather(k, v, hidden, rows, new[0, :3], new[1, :3], target_rows)
    assert torch.equal(new[0, :3, target_rows], k[:, rows])
    assert torch.equal(new[1, :3, target_rows], v[:, rows])
    assert torch.equal(kept, hidden[rows])
    assert int(new.isfinite().sum()) == 2 * 3 * 3 * 8


def test_operations_are_differentiable():
    """The trainer runs the same modules, so no operation may overwrite an input of a gradient."""
    x = torch.randn(6, 4, 8, requires_grad=True)
    weight = torch.rand(8, requires_grad=True)

    def loss(x, weight):
        y = TORCH.rms_norm(x, weight, 1e-6)
        y = TORCH.attention(y, y[:, :2], y[:, 2:], Segments((4, 2)), causal=True)
        return (TORCH.swiglu(y) ** 2).sum()

    value = loss(x, weight)
    gradients = torch.autograd.grad(value, (x, weight))
    for argument, gradient in zip((x, weight), gradients, strict=True):
        direction = torch.randn_like(argument)
        step = 1e-2 * direction
        with torch.no_grad():
            shifted = [
                loss(*(a + s * step if a is argument else a for a in (x, weight))) for s in (1, -1)
            ]
        slope = (shifted[0] - shifted[1]) / 2e-2
        assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=1e-2)


def test_attention_colsum_in_chunks(monkeypatch):
    """The chunk size makes no difference to the column sums of a segment."""
    monkeypatch.setattr("nanoglimpse.kernels.reference.attention_colsum.MAX_SCORES", 20)
    q, k = torch.randn(9, 6, 5), torch.randn(9, 3, 5)
    expected = torch.zeros(9, 6)
    for sequence in (range(5), range(5, 9)):
        for head in range(6):
            for i in sequence:
                weights = [math.exp(float(q[i, head] @ k[j, head // 2]) / 5**0.5) for j in sequence]
                for j, weight in zip(sequence, weights, strict=True):
                    expected[j, head] += weight / sum(weights)
    torch.testing.assert_close(TORCH.attention_colsum(q, k, Segments((5, 4))), expected)
