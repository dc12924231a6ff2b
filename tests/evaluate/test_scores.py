"""Scores, intervals and FLOPs against numbers computed by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanoglimpse import Prompt
from nanoglimpse import flops as cost
from nanoglimpse.config import parse_config
from nanoglimpse.evaluate.interval import DRAWS, bounds, resampled
from nanoglimpse.evaluate.scores import anls, contains, edits, exact, overlap, token_f1, words
from nanoglimpse.flops import LayerRows, RowCounts
from tests.helpers.tiny import chat_ids, patches_of

SHAPES = Path(__file__).parents[2] / "weights" / "configs"


@pytest.mark.parametrize(
    ("reply", "short", "right"),
    [
        ("The number is 7.", "7", True),
        ("The number is 17.", "7", False),
        ("It is 7.50.", "7", False),
        ("Yes, there is.", "yes", True),
        ("", "7", False),
    ],
)
def test_contains(reply, short, right):
    assert contains(reply, short) is right


def test_exact():
    assert exact(" A83\n", "a83")
    assert not exact("A83.", "A83")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("a", "a", 0)],
)
def test_edits(a, b, distance):
    assert edits(a, b) == distance


@pytest.mark.parametrize(
    ("reply", "wanted", "score"),
    [
        ("Sitting", "kitten", 1 - 3 / 7),
        (" 12.50 ", "12.50", 1.0),
        ("abcd", "abxy", 0.5),  # a half still counts
        ("abc", "axy", 0.0),  # a third does not
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_anls(reply, wanted, score):
    assert anls(reply, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reply", "wanted", "score"),
    [
        ("the red star", "a red circle", 0.5),  # they share one of two words each
        ("It is the red star.", "red star", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("red red", "red", 2 * 1 / 3),  # a word counts as often as it is in both
        ("blue", "red", 0.0),
        ("The.", "a", 1.0),  # both are empty without articles
        ("the", "red", 0.0),
    ],
)
def test_token_f1(reply, wanted, score):
    assert token_f1(reply, wanted) == pytest.approx(score)


def test_words():
    assert words("An answer: the Red-Star, 7.") == ["answer", "redstar", "7"]


def test_overlap():
    kept = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    evidence = torch.tensor([0, 1, 1, 1, 1, 0], dtype=torch.bool)
    assert overlap(kept, evidence) == (2 / 4, 2 / 5)
    assert overlap(kept, torch.zeros(6, dtype=torch.bool)) == (None, None)


def mean_interval(values, draws=DRAWS, seed=0):
    """The mean of values and the ends of its interval."""
    column = torch.tensor(values, dtype=torch.float64)[:, None]
    low, high = bounds(resampled(column, torch.ones_like(column), draws, seed))[:, 0].tolist()
    return float(column.mean()), low, high


def test_interval_of_what_does_not_vary():
    assert mean_interval([0.25] * 9) == (0.25, 0.25, 0.25)


def test_interval_is_that_of_the_binomial():
    """Resampled means of 0-1 values are binomial: here of 40 draws at 0.3, with std 0.0725."""
    values = [1.0] * 12 + [0.0] * 28
    mean, low, high = mean_interval(values, draws=20000)
    assert mean == pytest.approx(0.3)
    # Quantiles of Binomial(40, 0.3) / 40 at 2.5 and 97.5 per cent: 7 and 18.
    assert (low, high) == (pytest.approx(7 / 40), pytest.approx(18 / 40))
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1, draws=50) != mean_interval(values, draws=50)


def test_resampled_ratios_by_hand():
    """Two rows: a draw takes the first twice, the second twice or both, as 1 : 1 : 2."""
    sums = torch.tensor([[1.0, 6.0], [3.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    drawn = resampled(sums, weights, draws=4000)
    means, counts = drawn[:, 0].unique(return_counts=True)
    assert means.tolist() == [1.0, 2.0, 3.0]
    assert counts[1] / 4000 == pytest.approx(0.5, abs=0.03)
    # In the second column only the first row has a weight.
    without = drawn[:, 1].isnan()
    assert torch.equal(without, drawn[:, 0] == 3)
    assert drawn[:, 1][~without].unique().tolist() == [3.0]
    assert bounds(drawn)[:, 1].tolist() == [3.0, 3.0]


def test_columns_are_resampled_alike():
    values = torch.rand(20, 1, dtype=torch.float64)
    both = resampled(values.expand(-1, 2), torch.ones(20, 2, dtype=torch.float64), draws=150)
    assert torch.equal(both[:, 0], both[:, 1])
    assert len(both) == 150
    assert len(both[:, 0].unique()) > 100


@pytest.mark.parametrize(("shape", "tera"), [("7b", 76.553), ("3b", 35.749)])
def test_flops_as_the_paper_counts(shape, tera):
    """Dense prefill of 5074 rows; the paper's Table 7 has 77.8 T, a mean over prompts."""
    config = _shape(shape).text_config
    depth = config.num_hidden_layers
    rows = RowCounts(5074, 5000, [5000] * depth, [5000] * depth)
    assert cost.decoder(config, rows.paper_prefill()) / 1e12 == pytest.approx(tera, abs=5e-4)


def _shape(name: str):
    path = SHAPES / f"qwen2.5-vl-{name}.json"
    return parse_config(json.loads(path.read_text()), str(path))


def test_flops_of_the_paper_after_pruning():
    """19 of 28 layers see all rows, 9 the survivors without the text; then as many for decoding."""
    config = _shape("7b").text_config
    rows = RowCounts(1000, 900, [900] * 19 + [90] * 9, [90] * 28)

    def layer(n, keys):
        d, kv, inner = 3584, 4 * 128, 18944
        return 4 * n * d * d + 4 * n * d * kv + 4 * n * keys * d + 6 * n * d * inner

    wanted = 19 * layer(1000, 1000) + 9 * layer(90, 90)
    assert cost.decoder(config, rows.paper_prefill()) == wanted
    decoded = 28 * (layer(1, 90) + layer(1, 91))
    assert sum(cost.decoder(config, rows.paper_step(n)) for n in range(2)) == decoded


# Of the tiny model: d = 48, k and v 2 × 16, MLP 72.
WRITE, ATTEND, PAIR = 2 * 48 * 32, 2 * 48 * (2 * 48 + 3 * 72), 4 * 48


def test_exact_flops_by_hand(tiny):
    """6 layers, 130 words; 10 text and 8 visual rows, 3 kept, a glimpse below."""
    config = tiny.config.text_config
    rows = RowCounts(18, 8, [8] * 4 + [3] * 2, [3] * 6, stops=(4,), probe=True)
    full = 19 * (WRITE + ATTEND) + 19 * 20 // 2 * PAIR
    pruned = 13 * (WRITE + ATTEND) + 13 * 14 // 2 * PAIR
    last = 13 * WRITE + ATTEND + 13 * PAIR
    assert cost.decoder(config, rows.prefill()) == 4 * full + pruned + last
    assert cost.head(config) == 2 * 48 * 130
    for number in (1, 2):
        step = 6 * (WRITE + ATTEND + (13 + number) * PAIR)
        assert cost.decoder(config, rows.step(number)) == step
    places = [0, 1, 4, *range(8, 18)]
    inside = replace(rows, survivors=places)
    some = 19 * WRITE + 13 * ATTEND + (13 + sum(places)) * PAIR
    assert cost.decoder(config, inside.prefill()) == 3 * full + some + pruned + last


def test_where_the_last_layer_looks_it_runs_for_more_than_the_last_row():
    """Whole if the method waits for its end, for what survives if it looks inside."""
    rows = RowCounts(18, 8, [8] * 6, [3] * 6, stops=(6,))
    assert rows.prefill() == [LayerRows.all(18)] * 6
    inside = replace(rows, survivors=range(13)).prefill()
    assert inside == [LayerRows.all(18)] * 5 + [LayerRows(18, 13, 13 * 14 // 2)]


def test_flops_of_answers(tiny):
    """Each prompt of a batch by itself; what survives inside layer K sees what stands before."""
    prompts, head = [], 2 * 48 * 130
    for seed, grid in enumerate([(1, 4, 4), (1, 10, 12)]):
        ids = chat_ids(5, grid, 4, seed=seed)
        prompts.append(Prompt.from_tokens(ids, patches_of([grid]), [grid], config=tiny.config))
    prefill = tiny.prefill_many(prompts, "glimpse", max_ratio=0.5)
    kept = prefill.kept.split(prefill.batch.visual_counts)
    for i, prompt in enumerate(prompts):
        stays = ~prompt.visual
        stays[prompt.visual] = kept[i]
        n, left = len(prompt), int(stays.sum())
        below = 3 * ((n + 1) * (WRITE + ATTEND) + (n + 1) * (n + 2) // 2 * PAIR)
        seen = sum(row + 1 for row in range(n) if stays[row])
        below += (n + 1) * WRITE + left * ATTEND + seen * PAIR
        above = left * (WRITE + ATTEND) + left * (left + 1) // 2 * PAIR
        above += left * WRITE + ATTEND + left * PAIR
        chosen = cost.predict(tiny.glimpse.predictor, prompt.grids)
        chosen += 2 * len(tiny.glimpse.config.selected_layers) * 48 * (48 + n)
        found = cost.count(tiny.model, prefill, i, 2)
        assert found["prefill"] == below + above + chosen + head
        assert found["vision"] == cost.vision(tiny.config, prompt.grids)
        assert found["decode"] == head + 6 * (WRITE + ATTEND + (left + 1) * PAIR)
        assert cost.count(tiny.model, prefill, i, 1)["decode"] == 0


def test_predictor_flops_by_hand(tiny):
    """Width 12, condition 20, MLP 24, 3 blocks on taps of 24; 6 heads' logits of 15 tokens."""
    predictor, grid = tiny.glimpse.predictor, (1, 6, 10)
    n, size, condition = 15, 12, 20
    block = (size + condition) * 2 * (size + condition) + 2 * size * size + 3 * size * 2 * size
    products = 6 * size + 3 * (24 * condition + block) + size
    attended = 3 * n * n * (size + condition + size)
    assert cost.predict(predictor, [grid]) == 2 * (n * products + attended)


def test_vision_flops_by_hand(tiny):
    """A grid of 8 × 8 patches is one window and one frame; 5 blocks of width 24, MLP 40."""
    patches, unit = 64, 4 * 24
    linear = patches * (5 * 24 * (4 * 24 + 3 * 40) + 3 * 2 * 14 * 14 * 24)
    merger = 16 * unit * (unit + 48)
    attention = 5 * patches**2 * 24
    assert cost.vision(tiny.config, [(1, 8, 8)]) == 2 * (linear + merger) + 4 * attention


def test_budgets_of_each_prompt(tiny):
    """Two prompts of 4 and 30 visual tokens, half dropped after 4 of 6 layers."""
    grids = [(1, 4, 4), (1, 10, 12)]
    prompts = [
        Prompt.from_tokens(chat_ids(5, g, 4), patches_of([g]), [g], config=tiny.config)
        for g in grids
    ]
    prefill = tiny.prefill_many(prompts, "random", max_ratio=0.5)
    for i, count in enumerate((4, 30)):
        own = prefill.budgets_of(i)
        assert own.input_ratio == 1
        assert own.prefill_ratio == pytest.approx((4 + 2 * 0.5) / 6)
        assert own.decode_kv_ratio == pytest.approx(0.5)
        assert [layer[i] for layer in prefill.processed] == [count] * 4 + [count // 2] * 2
    later = tiny.prefill_many(prompts, "random", max_ratio=0.8, kv_drop="later")
    share = (0.8 * 6 - 4) / 2
    kept = [math.floor(share * count) for count in (4, 30)]
    for i, count in enumerate((4, 30)):
        assert [layer[i] for layer in later.cached] == [count] * 4 + [kept[i]] * 2
        assert later.budgets_of(i).decode_kv_ratio == pytest.approx((4 + 2 * kept[i] / count) / 6)
    whole = later.budgets
    assert whole.decode_kv_ratio == pytest.approx((4 * 34 + 2 * sum(kept)) / (6 * 34))
