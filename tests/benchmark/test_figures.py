"""What the benchmark may say: spreads, ratios, roofs, forms of output, and the whole figure."""

import csv
import io
import json
from itertools import count

import pytest
import torch
from PIL import ImageDraw

from nanoglimpse.benchmark import contenders, measuring, plot, roofs
from nanoglimpse.benchmark.figures import Ratio, Ratios, spread
from nanoglimpse.benchmark.models import make_picture, noise, visual_sizes
from nanoglimpse.benchmark.output import Output, shown
from nanoglimpse.benchmark.roofs import Roofs
from nanoglimpse.benchmark.work import Cost
from tests.benchmark.test_bench import bench, call, shape  # noqa: F401


def test_spread_is_half_the_distance_of_the_quartiles():
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == 1.0
    assert spread([5.0]) is None


def test_a_ratio_that_spreads_too_far_is_not_told(capsys):
    """Pairs are of one round: a drift that both share spreads nothing."""
    drift = [1.0, 5.0, 2.0, 9.0]
    assert Ratio.of([2 * x for x in drift], drift) == Ratio(2, 2, 2)
    ratios, out = Ratios(), Output("md")
    assert ratios.tell("steady", [2.0, 2.1, 1.9], [1.0, 1.0, 1.0]) == 2.0
    ratios.write(out)
    assert capsys.readouterr().out == ""
    assert ratios.tell("wild", [0.5, 1.0, 2.0], [1.0, 1.0, 1.0]) is None
    ratios.write(out)
    line = capsys.readouterr().out
    assert "wild (0.75 to 1.50)" in line
    assert "steady" not in line


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12345.6, "12346"), (1.234, "1.23"), (0.0012345, "0.00123"), (-2.5, "-2.50")],
)
def test_numbers_have_three_digits_or_all_before_the_point(value, text):
    assert shown(value) == text


def test_the_forms_of_a_table(capsys):
    head, rows = ["a, b", "ms"], [["x", 1.23456789], ["y", None], ["z", 3]]

    def written(form):
        out = Output(form)
        out.note("word")
        out.table("t", head, rows)
        out.end({"cases": []})
        *lines, last = capsys.readouterr().out.splitlines()
        assert json.loads(last) == {"cases": []}
        return lines

    assert written("json") == [
        '{"note": "word"}',
        '{"table": "t", "columns": ["a, b", "ms"], '
        '"rows": [["x", 1.23457], ["y", null], ["z", 3]]}',
    ]
    comments, table = written("csv")[:2], written("csv")[2:]
    assert comments == ["# word", "# t"]
    assert [*csv.reader(io.StringIO("\n".join(table)))] == [
        head,
        ["x", "1.23457"],
        ["y", ""],
        ["z", "3"],
    ]
    table = [line for line in written("md") if line.startswith("|")]
    assert len(table) == 5
    assert len(set(map(len, table))) == 1


class Timed:
    """Roofs whose measurements are given; the device does nothing."""

    def __init__(self, monkeypatch, seconds):
        left = iter(seconds)
        monkeypatch.setattr(roofs, "best", lambda *_: next(left))


def test_a_roof_that_is_passed_is_measured_again(monkeypatch, tiny):
    monkeypatch.setattr(roofs, "SIDE", {"cpu": 16})
    monkeypatch.setattr(roofs, "READ", {"cpu": 2**15})
    # Two products and three reads each time.
    Timed(monkeypatch, [1.0] * 5 + [0.5, 0.25, 2.0, 2.0, 2.0] + [1.0] * 5)
    found, cost = Roofs(tiny), Cost(2 * 16**3, 0)
    assert found.floor(cost) == 1000
    found.settle(lambda: found.floor(cost) > 1000)  # not passed
    assert found.floor(cost) == 1000
    found.settle(lambda: found.floor(cost) > 300)
    assert found.floor(cost) == 250  # a product was faster,
    assert found.bandwidth == 2**15  # reading was slower, which lowers no roof
    found.renew()
    assert found.floor(cost) == 1000


def test_rounds_end_when_time_is_over(monkeypatch):
    seconds = count()
    monkeypatch.setattr(measuring.time, "monotonic", lambda: next(seconds))
    figures = measuring.run_rounds("", {"a": lambda: {"ms": 1.0}}, 100, until=2.5)
    assert 1 < len(figures["a"]["ms"]) < 6
    figures = measuring.run_rounds("", {"a": lambda: {"ms": 1.0}}, 100, until=0)
    assert len(figures["a"]["ms"]) == 1
    turns = measuring.take_turns({"a": int, "b": int}, 100, torch.device("cpu"), until=0)
    assert [len(times) for times in turns.values()] == [1, 1]


def figure(labels, points):
    """A figure with the boxes of its texts."""
    boxes, text = [], ImageDraw.ImageDraw.text

    def noted(self, place, words, *args, **options):
        boxes.append((words, self.textbbox(place, words, anchor=options.get("anchor"))))
        text(self, place, words, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", noted)
        panels = {title: [points] * len(labels) for title in plot.PANELS.values()}
        return plot.draw_figure(labels, panels), boxes


@pytest.mark.parametrize("longest", ["dense", "pruned to 11.1%, batch 128 of a long name " * 4])
def test_nothing_of_a_figure_is_cut(longest):
    points = [plot.Point(64, 1234567.0, 5e5), plot.Point(163840, 98765432.1, 10.0)]
    image, boxes = figure([longest, *(f"line {i}" for i in range(9))], points)
    for _, (left, top, right, bottom) in boxes:
        assert left >= 0 <= top
        assert right <= image.width
        assert bottom <= image.height
    # No text lies on another one.
    for number, (_, one) in enumerate(boxes):
        for _, other in boxes[:number]:
            apart = one[0] >= other[2] or other[0] >= one[2]
            assert apart or one[1] >= other[3] or other[1] >= one[3]
    # Nor does a line or a point reach the edge.
    drawn = image.convert("L").point(lambda x: 255 - x).getbbox()
    assert drawn[0] > 4 < drawn[1]
    assert drawn[2] < image.width - 4
    assert drawn[3] < image.height - 4


def test_a_figure_has_several_sizes_by_default(bench):  # noqa: F811
    for options in ([], ["--shape", "7b"]):
        args = bench.parser().parse_args(options)
        assert len(visual_sizes(args)) == 1
        args.plot = "x.png"
        assert len(visual_sizes(args)) == 4
        args.visual_tokens = [7]
        assert visual_sizes(args) == [7]


def test_noise_of_more_columns_has_more_visual_tokens():
    width, height = noise(24).size
    assert noise(24, 3).size == (width + 3 * 28, height)


@pytest.mark.slow
def test_steps_ahead_are_timed_as_ask_takes_them(bench, shape, capsys, monkeypatch):  # noqa: F811
    """On a GPU `ask` lets steps run ahead; streaming shows each token as it is chosen."""
    asked = []
    decode_many = contenders.Engine.decode_many

    def noted(self, *args, ahead=0, **options):
        asked.append(ahead)
        return decode_many(self, *args, ahead=ahead, **options)

    monkeypatch.setattr(contenders.Engine, "decode_many", noted)
    monkeypatch.setattr(contenders, "lookahead", lambda device: 3)
    code, out, _ = call(bench, shape, capsys, "--alone", "--retain", 1, "-o", "json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    (case,) = lines[-1]["cases"]
    dense = case["arms"]["dense"]
    assert set(asked) == {0, 3}
    assert dense["a token, streamed"]["ms"] > 0 < dense["a token"]["ms"]
    # 24 visual and 12 text tokens with two around the picture; 4 new tokens, 3 after the first.
    assert dense["pp38"]["tokens/s"] == pytest.approx(38000 / dense["all prefill"]["ms"])
    assert dense["tg3"]["tokens/s"] == pytest.approx(1000 / dense["a token"]["ms"])
    assert dense["first token, cold"]["ms"] > 0
    assert set(case["roofs"]) == {"matrix_gflops", "read_gb_per_s"}
    tables = {line["table"]: line for line in lines[:-1] if "table" in line}
    assert {"dense", "milliseconds", "tokens a second", "dense, new lengths"} <= tables.keys()
    assert [row[1] for row in tables["tokens a second"]["rows"]] == ["pp38", "tg3"]


@pytest.mark.slow
def test_a_figure_below_its_floor_is_marked(bench, shape, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(roofs, "best", lambda *_: 1e3)  # a device that is slower than it is
    code, out, _ = call(bench, shape, capsys, "--alone", "--retain", 1)
    assert code == 0
    assert "roof invalid" in out
    (case,) = json.loads(out.splitlines()[-1])["cases"]
    assert case["arms"]["dense"]["vision"]["roof_invalid"]
    assert "% of the roof" not in out
    code, out, _ = call(bench, shape, capsys, "--kernels")
    assert code == 0
    assert "roof invalid" in out
    assert all(entry["roof_invalid"] for entry in json.loads(out.splitlines()[-1])["kernels"])


@pytest.mark.slow
def test_every_round_has_new_lengths(bench, shape, capsys, monkeypatch):  # noqa: F811
    lengths, answer = [], contenders.Ours.answer

    def noted(self):
        lengths.append(len(self.workload.prompts[0]))
        return answer(self)

    monkeypatch.setattr(contenders.Ours, "answer", noted)
    options = ("--alone", "--retain", 1, "--rounds", 3)
    code, _, _ = call(bench, shape, capsys, *options)
    assert code == 0
    usual = lengths[0]
    new = [length for length in lengths if length != usual]
    assert new[::2] == new[1::2]  # each of them twice
    assert len(set(new)) == 4  # the round that warms up as well
    # No step of decoding has a length that another round had.
    assert all(b - a >= 4 for a, b in zip(new[::2], new[2::2], strict=False))


@pytest.mark.parametrize("visual", [64, 576])
def test_the_picture_of_a_checkpoint_is_scaled_to_the_visual_tokens(bench, visual):  # noqa: F811
    args = bench.parser().parse_args([])
    width, height = make_picture(args, visual, 1.0).size
    assert width * height == pytest.approx(visual * 28**2, rel=0.01)
    assert make_picture(args, visual, 1.0, more=2).size == (width + 2 * 28, height)
