"""Figures, tables and page, from results written by hand."""

import csv
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from nanoglimpse.evaluate.__main__ import main
from nanoglimpse.evaluate.figures import (
    AVERAGE,
    best_score,
    read_variants,
    summarise,
    variant_results,
)
from nanoglimpse.evaluate.page import dropped, page
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.evaluate.tables import (
    as_csv,
    by_cap,
    by_category,
    by_cost,
    by_form,
    by_group,
    by_kind,
    by_layer,
    document,
    overview,
    progress_table,
)

FORMS = ("free-form", "brief")
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def result(number, method="glimpse", ratio=None, brief=False, group="gqa", **more):
    cap = "" if ratio is None else f" {ratio:g}"
    row = {
        "question": f"q{number}",
        "arm": f"{method}{cap}{' brief' if brief else ''}",
        "method": method,
        "ratio": ratio,
        "brief": brief,
        "group": group,
        "asked": f"What is <b>{number}</b>?",
        "wanted": "a </script> & more",
        "reply": "<i>{{charts}}",
        "contains": True,
        "exact": False,
        "anls": 0.5,
        "f1": 0.25,
        "visual": 100,
        "kept": 10,
        "recall": 0.5,
        "iou": 0.25,
        "input": 1.0,
        "prefill": 0.7,
        "decode_kv": 0.1,
        "kv_rows": 30.0,
        "kv_bytes": 4096,
        "stop": None if method == "dense" else 4,
        "flops": {"vision": 1e9, "prefill": 2e12, "decode": 3e6, "paper prefill": 3e12},
        "ms": {"preprocess": 1.0, "vision": 2.0, "before": 3.0, "after": 4.0, "decode": None},
        "tokens": 5,
        "peak_bytes": None,
    }
    return row | more


def results_of(rows):
    results = ResultsFile(None, {"model": "tiny", "dtype": "float32", "data": {"world": 1}})
    results.add(rows)
    return results


def table(text):
    head, _, *rest = text.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, *rest)]


def test_methods_against_caps_in_both_forms():
    rows = [
        result(0, "dense", contains=True),
        result(0, "dense", brief=True, contains=False),
        result(0, "glimpse", contains=False),
        *(result(n, "glimpse", 0.05, contains=n == 0) for n in range(4)),
        result(0, "glimpse", 0.111, brief=True, contains=True),
        result(0, "fastv", 0.111, contains=False, arm="fastv 0.111 later", kv_drop="later"),
    ]
    assert table(by_cap(variant_results(results_of(rows)), "contains")) == [
        ["method", *(f"{c} {f}" for c in ("no cap", "11.1%", "5.0%") for f in FORMS)],
        ["dense", "1.000", "0.000", "", "", "", ""],
        ["glimpse", "0.000", "", "", "1.000", "0.250", ""],
        ["fastv later", "", "", "0.000", "", "", ""],
    ]
    assert by_cap(variant_results(results_of(rows[:3])), "contains") == ""
    free = [row for row in rows if not row["brief"]]
    head = table(by_cap(variant_results(results_of(free)), "contains"))[0]
    assert head == ["method", "no cap", "11.1%", "5.0%"]


def test_a_wide_table_is_transposed():
    rows = [result(0, f"m{m}", brief=b, contains=b) for m in range(9) for b in (False, True)]
    variants = variant_results(results_of(rows))
    lines = table(by_form(variants, "contains"))
    assert lines[:2] == [["prompt", "brief", "free-form"], ["m0", "1.000", "0.000"]]
    assert len(lines) == 10
    assert table(by_cost(variants, "contains"))[1][0] == "m0"
    few = variant_results(results_of(rows[:16]))
    assert table(by_form(few, "contains"))[0] == ["prompt", *(f"m{m}" for m in range(8))]


def test_kinds_of_questions():
    rows = [
        result(0, kind="number", contains=True),
        result(1, kind="count", contains=True),
        result(2, kind="count", contains=False),
        result(0, "dense", kind="number", contains=False),
    ]
    assert table(by_kind(variant_results(results_of(rows)), "contains")) == [
        ["method", "number", "count"],
        ["glimpse", "1.000", "0.500"],
        ["dense", "0.000", ""],
    ]
    assert by_kind(variant_results(results_of(rows[:1])), "contains") == ""


def test_figures_by_hand():
    rows = [
        result(0, contains=True, kept=10, visual=100),
        result(1, contains=False, kept=30, visual=50, recall=None, iou=None),
        result(2, contains=False, kept=20, visual=100, group="vsr"),
    ]
    figures = summarise(rows)
    gqa = figures["gqa"]
    assert gqa["contains"].value == 0.5
    assert gqa["retention"].value == pytest.approx((0.1 + 0.6) / 2)
    assert gqa["kept"].value == pytest.approx(40 / 150)
    assert (gqa["recall"].value, gqa["recall"].count) == (0.5, 1)
    assert gqa["ms_first"].value == 10
    assert "ms_decode" not in gqa
    assert "judge" not in gqa
    # The average is over groups, not over questions.
    average = figures[AVERAGE]
    assert average["contains"].value == pytest.approx((0.5 + 0) / 2)
    assert average["retention"].value == pytest.approx((0.35 + 0.2) / 2)
    assert average["contains"].count == 3


def test_intervals_of_an_average_resample_inside_groups():
    """The average with a constant group has half the interval of the other group."""
    varied = [result(n, contains=n % 2 == 0) for n in range(20)]
    fixed = [result(n, contains=True, group="vsr") for n in range(20, 40)]
    figures = summarise(varied + fixed)
    own, average = figures["gqa"]["contains"], figures[AVERAGE]["contains"]
    assert (figures["vsr"]["contains"].low, figures["vsr"]["contains"].high) == (1, 1)
    assert own.low < 0.5 < own.high
    assert average.low == pytest.approx((own.low + 1) / 2)
    assert average.high == pytest.approx((own.high + 1) / 2)


def both_forms():
    rows = []
    for brief, right in ((False, 1), (True, 2)):
        for n in range(4):
            rows.append(result(n, "dense", brief=brief, contains=True, kept=100, decode_kv=1.0))
            rows.append(result(n, "glimpse", 0.111, brief=brief, contains=n < right))
    return variant_results(results_of(rows))


def test_free_form_beside_brief():
    assert table(by_form(both_forms(), "contains")) == [
        ["prompt", "dense", "glimpse 0.111"],
        ["brief", "1.000", "0.500"],
        ["free-form", "1.000", "0.250"],
    ]
    free = [variant for variant in both_forms() if not variant.brief]
    assert by_form(free, "contains") == ""


def several_groups():
    rows = []
    for method, ratio, groups in (
        ("glimpse", None, {"flickr30k": 1, "v7w": 0, "world": 1}),
        ("glimpse", 0.111, {"flickr30k": 1, "v7w": 1, "world": 0}),
        ("dense", None, {"flickr30k": 1, "v7w": 1, "world": 1}),
    ):
        for group, right in groups.items():
            row = result(group, method, ratio, group=group, contains=bool(right))
            rows.append(row | ({"kept": 100} if method == "dense" else {}))
    return variant_results(results_of(rows))


def test_groups_in_blocks_of_caps():
    assert table(by_group(several_groups(), "contains")) == [
        ["method", "flickr30k", "v7w", "world", "average"],
        ["*all visual tokens*", "", "", "", ""],
        ["dense", "1.000", "1.000", "1.000", "1.000"],
        ["kept", "100.0%", "100.0%", "100.0%", "100.0%"],
        ["*at most 11.1%*", "", "", "", ""],
        ["glimpse 0.111", "1.000", "1.000", "0.000", "0.667"],
        ["kept", "10.0%", "10.0%", "10.0%", "10.0%"],
        ["*no cap*", "", "", "", ""],
        ["glimpse", "1.000", "0.000", "1.000", "0.667"],
        ["kept", "10.0%", "10.0%", "10.0%", "10.0%"],
    ]


def test_categories():
    assert table(by_category(several_groups(), "contains")) == [
        ["method", "general VQA", "world", "average"],
        ["glimpse", "0.500", "1.000", "0.667"],
        ["glimpse 0.111", "1.000", "0.000", "0.667"],
        ["dense", "1.000", "1.000", "1.000"],
    ]
    assert by_category(variant_results(results_of([result(0, group="world")])), "contains") == ""


def test_layers_and_costs():
    variants = several_groups()
    assert table(by_layer(variants, "contains"))[1:3] == [
        ["–", "dense", "1.000", "2 TFLOP", "3 TFLOP"],
        ["4", "glimpse", "0.667", "2 TFLOP", "3 TFLOP"],
    ]
    costs = {line[0]: line[1:] for line in table(by_cost(variants, "contains"))}
    assert costs[""] == ["glimpse", "glimpse 0.111", "dense"]
    assert costs["prefill FLOPs"] == ["2 TFLOP"] * 3
    assert costs["time to first token"] == ["10.00 ms"] * 3
    assert costs["KV rows"] == ["30.0"] * 3
    assert costs["KV cache"] == ["4.1 kB"] * 3
    assert costs["score"] == ["0.667", "0.667", "1.000"]
    assert "time per token" not in costs
    assert "peak memory" not in costs


def test_overview_has_intervals_in_one_unit():
    variants = variant_results(results_of([result(n, kept=10 + n % 2) for n in range(8)]))
    head, line = table(overview(variants, "kept"))
    assert head[:4] == ["method", "n", "kept (mean)", "kept (total)"]
    assert re.fullmatch(r"10\.5% \[10\.\d, 10\.\d\]", line[2])


def test_progress_table_by_hand():
    rows = [
        result(n, "glimpse", 0.111, brief=True, group="scene", contains=right, kept=kept, recall=r)
        for n, (right, kept, r) in enumerate(((True, 10, 1.0), (False, 20, None), (True, 0, 0.5)))
    ]
    assert progress_table(variant_results(results_of(rows)), ["scene"]).splitlines()[-1] == (
        "| glimpse 0.111 brief | 66.7 | 10.0 | 75.0 |"
    )


def test_csv():
    lines = list(csv.DictReader(as_csv(several_groups()).splitlines()))
    (line,) = (
        line
        for line in lines
        if (line["run"], line["group"], line["measure"]) == ("glimpse 0.111", "v7w", "retention")
    )
    assert line["unit"] == "%"
    assert [float(line[key]) for key in ("n", "value", "low", "high")] == [
        1,
        *[pytest.approx(0.1)] * 3,
    ]


def test_default_score_is_the_judges_if_all_are_graded():
    results = results_of([result(0), result(1)])
    verdict = {"verdict": "x at 0", "arm": "glimpse", "score": 0.4, "understood": True, "said": ""}
    results.add([verdict | {"question": "q0"}])
    assert best_score(variant_results(results)) == "contains"
    results.add([verdict | {"question": "q1", "score": 0.8}])
    variants = variant_results(results)
    assert best_score(variants) == "judge"
    assert variants[0].get("judge").value == pytest.approx(0.6)


def test_labels_name_the_file_if_there_are_several(tmp_path):
    for name in ("small", "large"):
        ResultsFile.resume(tmp_path / f"{name}.jsonl", {}).add([result(0)])
    variants, _ = read_variants([tmp_path / "small.jsonl", tmp_path / "large.jsonl"])
    assert [variant.name for variant in variants] == ["small: glimpse", "large: glimpse"]


@pytest.mark.parametrize(
    ("kept", "width", "height", "path"),
    [
        ("1111", 2, 2, ""),
        ("0000", 2, 2, "M0 0h2v1h-2zM0 1h2v1h-2z"),
        ("10010110", 4, 2, "M1 0h2v1h-2zM0 1h1v1h-1zM3 1h1v1h-1z"),
    ],
)
def test_dropped_cells_as_a_path(kept, width, height, path):
    bits = kept + "0" * (-len(kept) % 8)
    assert dropped(f"{int(bits, 2):0{len(bits) // 4}x}", width, height) == path


class Balanced(HTMLParser):
    """Checks that tags are balanced, and collects tags and text."""

    VOID = ("meta", "input", "br")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def shown():
    """A page with a gallery, as text and parsed."""
    seen = {"grid": [2, 4], "cells": "96", "boxes": [[0.25, 0.5, 0.75, 1.0]]}
    rows = [
        result(0, "glimpse", **seen, importance="00102030405060ff"),
        result(1, "glimpse"),
        result(0, "fastv", 0.5, **seen, importance=None),
        result(0, "fastv", 0.25, **seen, importance=None, contains=False, decode_kv=0.05),
        result(0, "fastv", 0.25, brief=True, **seen, importance=None),
    ]
    results = results_of(rows)
    results.add([{"picture": "q0", "uri": PIXEL}])
    text = page(variant_results(results), [results], "contains", ["tiny & <small>"])
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return text, parser


def test_the_page_is_self_contained(shown):
    text, parser = shown
    for tag, attributes in parser.tags:
        assert tag not in ("link", "iframe")
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    outside = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert outside == set()
    assert text.count("<script>") == text.count("</script>") == 1


def test_the_pages_table(shown):
    text, _ = shown
    (head,) = re.findall(r'<tr class="titles">(.*?)</tr>', text)
    titles = re.findall(r"<th[^>]*>(.*?)</th>", head)
    assert titles[:5] == ["method", "prompt", "n", "contains", "exact"]
    bodies = re.findall(r'<tbody data-group="(\w+)"( hidden)?>(.*?)</tbody>', text, re.DOTALL)
    assert [(name, hidden) for name, hidden, _ in bodies] == [("average", ""), ("gqa", " hidden")]
    for _, _, body in bodies:
        lines = [re.findall(r"<td[^>]*>", line) for line in body.splitlines()]
        assert [len(line) for line in lines] == [len(titles)] * 4
        values = [re.search(r'data-v="(.*?)"', line[3]).group(1) for line in lines]
        assert values == ["1", "1", "0", "1"]


def test_the_pages_charts(shown):
    text, _ = shown
    charts = [
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg [^>]*role=.*?</svg>", text, re.S)
    ]
    # With one group only the average has charts, one for each form of prompts.
    assert [chart.find("text").text for chart in charts] == [
        "average, free-form prompts",
        "average, brief prompts",
    ]
    # The free-form chart starts at its lowest score, 0; the other one starts above 0.
    texts = [{text.text for text in chart.iter("text")} for chart in charts]
    assert ["0.5" in own for own in texts] == [True, False]
    says = [circle.find("title").text for circle in charts[0].iter("circle")]
    assert says == [
        "glimpse: 1.000 at 10.0%",
        "fastv 0.25: 0.000 at 5.0%",
        "fastv 0.5: 1.000 at 10.0%",
    ]
    lines = list(charts[0].iter("polyline"))
    assert [len(line.get("points").split()) for line in lines] == [1, 2]
    colours = [line.get("stroke") for line in lines]
    assert colours[0] != colours[1]


@pytest.mark.slow
def test_methods_are_distinguishable_in_charts():
    """Marks and lines of 24 methods are all different."""
    rows = [result(n, f"method{m}", 0.1 * n, decode_kv=0.1 * n) for m in range(24) for n in (1, 2)]
    results = results_of(rows)
    text = page(variant_results(results), [results], "contains", [])
    legend = re.findall(r'<li data-series="(\d+)"><svg[^>]*>(.*?)</svg>method(\d+)</li>', text)
    assert [int(number) for number, _, _ in legend] == [int(m) for _, _, m in legend]
    assert len({mark for _, mark, _ in legend}) == 24
    (svg,) = re.findall(r"<svg [^>]*role=.*?</svg>", text, re.DOTALL)
    lines = [line.attrib for line in ElementTree.fromstring(svg).iter("polyline")]
    assert len({(line["stroke"], line.get("stroke-dasharray")) for line in lines}) == 24


def test_attributes_for_the_selectors(shown):
    text, _ = shown
    rows = re.findall(r"<tr( data-.*?)><td>(.*?)</td><td>(.*?)</td>", text)[:4]
    assert rows == [
        (' data-form="free"', "glimpse", "free"),
        (' data-cap="0.5" data-form="free"', "fastv 0.5", "free"),
        (' data-cap="0.25" data-form="free"', "fastv 0.25", "free"),
        (' data-cap="0.25" data-form="brief"', "fastv 0.25", "brief"),
    ]
    figures = re.findall(r"<figure(.*?)>", text)
    assert figures == [marks for marks, _, _ in rows]
    caps = '<option value="0.25">25.0%</option><option value="0.5">50.0%</option>'
    table, gallery = re.findall(r'data-by="cap">(.*?)</select>', text)
    assert (table, gallery) == ('<option value="">every cap</option>' + caps, caps)


def test_the_pages_gallery(shown):
    text, parser = shown
    cards = re.findall(r"<figure[^>]*>(.*?)</figure>", text, re.DOTALL)
    assert len(cards) == 4
    pictures = [attributes["href"] for tag, attributes in parser.tags if tag == "image"]
    assert pictures == [PIXEL]
    assert 'd="M1 0h2v1h-2zM0 1h1v1h-1zM3 1h1v1h-1z"' in cards[0]
    assert 'x="1.000" y="1.000" width="2.000" height="1.000"' in cards[0]
    assert 'data-importance="00102030405060ff"' in cards[0]
    assert "data-importance" not in cards[1]
    assert ["✓" in card for card in cards] == [True, True, False, True]
    # Questions and answers are escaped.
    said = "".join(parser.text)
    assert "What is <b>0</b>?" in said
    assert "a </script> & more" in said
    assert said.count("<i>{{charts}}") == 4


def test_the_report_command(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    results = ResultsFile.resume(path, {"model": "tiny", "dtype": "float32", "data": {"world": 1}})
    results.add([result(n) for n in range(3)])
    with path.open("a") as file:
        file.write('{"question": "half')
    files = ["--csv", str(tmp_path / "a" / "f.csv"), "--html", str(tmp_path / "f.html")]
    assert main(["report", str(path), *files]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Comparison\n\nresults.jsonl: tiny, float32, world 1.\n")
    assert printed == document(variant_results(results), "contains", printed.splitlines()[2:3])
    assert "| glimpse | 3 | 1.000 [1.000, 1.000] |" in printed
    assert (tmp_path / "a" / "f.csv").read_text().startswith("run,method,")
    assert "What each method kept" not in (tmp_path / "f.html").read_text()
    # The unfinished line may belong to a run in progress and is not touched.
    assert path.read_text().endswith('{"question": "half')


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "there is no file"),
        ("", [], "is not a file of results"),
        (json.dumps({"options": {}}) + "\n", [], "no results yet"),
        (
            json.dumps({"options": {}}) + "\n" + json.dumps(result(0)) + "\n",
            ["--score", "judge"],
            "no result has the score judge",
        ),
    ],
)
def test_bad_reports_are_one_line(text, options, message, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    if text is not None:
        path.write_text(text)
    assert main(["report", str(path), *options]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
