"""Reports of results that others wrote: hostile text, damaged lines, questions that are missing."""

import csv
import io
import json
import re
from contextlib import redirect_stdout
from html.parser import HTMLParser

import pytest

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.evaluate.__main__ import main
from nanoglimpse.evaluate.figures import caveats, comparable, read_variants, variant_results
from nanoglimpse.evaluate.page import page
from nanoglimpse.evaluate.records import GALLERY, OPTIONAL, PICTURE, REQUIRED, VERDICT, wrong
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.evaluate.tables import as_csv, document
from nanoglimpse.world.__main__ import main as write_world
from tests.evaluate.test_report import PIXEL, result, results_of
from tests.helpers.commands import exit_code

HOSTILE = "=1+1|\"'><script>alert(1)</script>\x1b]0;x\x07\r\n{{charts}}\udcff\u202e"
SEEN = {"grid": [2, 4], "boxes": [[0.25, 0.5, 0.75, 1.0]], "cells": "96"}
SEEN |= {"importance": "00102030405060ff"}
FULL = result(0, **SEEN, kind="colour", stop=4, outside=False)
PICTURES = {"picture": "q0", "uri": PIXEL}
VERDICTS = {"verdict": "j at 0", "arm": "glimpse", "question": "q0", "score": 0.5}
VERDICTS |= {"understood": True, "said": "ok"}


def written(tmp_path, records, options=None):
    path = tmp_path / "results.jsonl"
    lines = [{"options": {"model": "m", "data": {}} if options is None else options}, *records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_hostile_text_acts_nowhere(tmp_path, capsys):
    """Names of models, methods, groups, kinds, questions, answers, judges and missing files."""
    text = dict.fromkeys(("method", "group", "kind", "asked", "wanted", "reply"), HOSTILE)
    rows = [
        FULL | text | {"arm": f"{HOSTILE}{n}", "question": f"{HOSTILE}{q}", "ratio": ratio}
        for n, ratio in ((0, None), (1, 0.5))
        for q in range(2)
    ]
    records = [*rows, PICTURES | {"picture": f"{HOSTILE}0"}, {"missing": [HOSTILE]}]
    records += [
        VERDICTS | {"verdict": HOSTILE, "said": HOSTILE, "arm": r["arm"], "question": r["question"]}
        for r in rows
    ]
    options = {"model": HOSTILE, "dtype": HOSTILE, "data": {HOSTILE: [HOSTILE]}}
    path = written(tmp_path, records, options)
    files = ["--csv", tmp_path / "f.csv", "--html", tmp_path / "f.html"]
    assert exit_code(main, ["report", path, *files]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(line.isprintable() for line in out.splitlines())
    assert "<script" not in out.replace(r"\<script", "")
    for table in re.findall(r"(?:^\|.*\|$\n?)+", out, re.MULTILINE):
        lines = [re.sub(r"\\.", "", line) for line in table.splitlines()]
        assert len({line.count("|") for line in lines}) == 1
    with (tmp_path / "f.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r"))]
    assert any(cell.startswith("'=1+1") for cell in cells)
    tags = Tags((tmp_path / "f.html").read_text("utf-8")).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in tags].count("figure") == 2


BAD = [None, "", "x", HOSTILE, -1, 2, 0.5, 10**400, 1e31, -1e31, True, [], {}, [[]]]
BAD += [{"a": "b"}, ["\udcff"], "0" * 9, {"a": {"b": [1] * 3}}]
LINES = {"result": FULL, "picture": PICTURES, "verdict": VERDICTS}
FIELDS = [(kind, name) for kind, record in LINES.items() for name in record]


def test_every_field_that_is_read_has_a_kind():
    assert set(FULL) == {*REQUIRED, *OPTIONAL, *GALLERY}
    assert (set(PICTURES), set(VERDICTS)) == (set(PICTURE), set(VERDICT))
    assert not any(map(wrong, LINES.values()))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[".".join(field) for field in FIELDS])
def test_a_damaged_field_is_named_or_does_no_harm(kind, name, tmp_path):
    left = [record for other, record in LINES.items() if other != kind]
    kept = {key: value for key, value in LINES[kind].items() if key != name}
    for changed in [kept, *(LINES[kind] | {name: value} for value in BAD)]:
        path = written(tmp_path, [FULL | {"question": "q1"}, changed, *left])
        if fault := wrong(changed):
            assert re.search(name if name in changed else "is missing", fault)
            words = f"line 3, is not a result: {fault}"
            with pytest.raises(NanoglimpseError, match=re.escape(words)):
                read_variants([path])
            assert len(fault) < 100
            continue
        variants, files = read_variants([path])
        document(variants, "contains", []).encode("utf-8", "surrogateescape")
        as_csv(variants).encode()
        page(variants, files, "contains", []).encode()


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "null",
        "[]",
        "7",
        '"x"',
        '{"a": NaN}',
        "{}",
        '{"options": {}}',
        "9" * 5000,
        "{",
    ],
    ids=["deep", "null", "list", "number", "text", "NaN", "empty", "head", "digits", "half"],
)
def test_a_damaged_line_is_named(line, tmp_path, capsys):
    path = written(tmp_path, [FULL])
    path.write_text(path.read_text() + line + "\n")
    assert main(["report", str(path)]) == 1
    err = capsys.readouterr().err
    assert "line 3, is not a result" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"cells": "9"},
        {"cells": "96" * 50},
        {"grid": [0, 4]},
        {"grid": [10**9, 10**9]},
        {"grid": [2, 4.0]},
        {"importance": "00"},
        {"importance": "0" * 15 + '"'},
        {"boxes": [["a", 0, 1, 1]]},
        {"kept": 101},
    ],
    ids=str,
)
def test_cells_are_those_of_the_grid(change):
    assert next(iter(change)) in wrong(FULL | change)


@pytest.mark.parametrize(
    "uri",
    [
        "https://host/tracker.png",
        "javascript:alert(1)",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AA"onload="x',
        "data:text/html;base64,AAAA",
    ],
)
def test_a_picture_of_the_page_is_a_picture_in_it(uri):
    assert "uri is" in wrong(PICTURES | {"uri": uri})


def unequal():
    """Dense has answered the four questions, glimpse the easy half: equally good on those."""
    rows = [result(n, "dense", contains=n < 2) for n in range(4)]
    return [*rows, *(result(n, "glimpse", contains=True) for n in range(2))]


def test_methods_are_compared_on_questions_that_all_have_answered(tmp_path, capsys):
    path = written(tmp_path, unequal())
    files = ["--csv", tmp_path / "f.csv", "--html", tmp_path / "f.html"]
    assert exit_code(main, ["report", path, *files]) == 0
    out = capsys.readouterr().out
    line = "those of the 2 questions that all variants have answered, of 4: glimpse lacks 2."
    assert line in out
    for name in ("dense", "glimpse"):
        assert f"| {name} | 2 | 1.000 [1.000, 1.000] |" in out
    values = list(csv.DictReader((tmp_path / "f.csv").read_text("utf-8").splitlines()))
    assert {(v["n"], v["value"]) for v in values if v["measure"] == "contains"} == {("2", "1.0")}
    assert line in (tmp_path / "f.html").read_text("utf-8")


def test_equal_questions_need_no_words():
    variants = variant_results(results_of([result(n, m) for n in range(3) for m in ("a", "b")]))
    assert comparable(variants, "contains") == (variants, [])


def test_a_judges_figures_are_of_questions_that_are_graded_in_all(tmp_path):
    verdicts = [VERDICTS | {"arm": "dense", "question": f"q{n}"} for n in range(3)]
    verdicts += [VERDICTS | {"question": "q1", "score": 1}]
    rows = [result(n, m) for n in range(3) for m in ("dense", "glimpse")]
    variants, _ = read_variants([written(tmp_path, [*rows, *verdicts])])
    shown, lines = comparable(variants, "judge")
    assert [[row["question"] for row in v.rows] for v in shown] == [["q1"], ["q1"]]
    assert lines[0].endswith("of 3: glimpse lacks 2.")


def test_variants_without_a_common_question_are_not_ranked(tmp_path, capsys):
    path = written(tmp_path, [result(0, "dense"), result(1, "glimpse")])
    assert exit_code(main, ["report", path]) == 2
    err = capsys.readouterr().err
    assert "no question has the score contains in all of dense, glimpse" in err
    assert err.count("\n") == 1
    with pytest.raises(UsageError):
        comparable(read_variants([path])[0], "contains")


def test_files_of_different_data_are_reported_side_by_side(tmp_path, capsys):
    """Each over its own questions; a file that is cut is named."""
    paths = [tmp_path / "scene.jsonl", tmp_path / "document.jsonl"]
    for path, first in zip(paths, (0, 10), strict=True):
        rows = [result(first + n, m) for n in range(3) for m in ("dense", "glimpse")]
        written(tmp_path, rows if first else rows[:-1]).rename(path)
    assert exit_code(main, ["report", *paths]) == 0
    out = capsys.readouterr().out
    assert "those of the 2 questions that all variants have answered, of 3: scene: glimpse" in out
    assert "Some files hold other questions than others" in out
    for name, count in (("scene: dense", 2), ("scene: glimpse", 2), ("document: dense", 3)):
        assert f"| {name} | {count} |" in out


def test_the_oracle_says_where_it_knows_nothing():
    rows = [result(n, m, recall=n or None) for n in range(2) for m in ("oracle", "dense")]
    (line,) = caveats(variant_results(results_of(rows)))
    assert line.startswith("oracle: 1 of 2 questions have no boxes.")


def test_the_oracle_is_not_run_on_data_without_boxes(tmp_path, capsys, monkeypatch):
    with redirect_stdout(io.StringIO()):
        assert write_world(["--out", str(tmp_path), "--count", "1", "--quiet"]) == 0
    data = tmp_path / "questions.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    bare = [{k: r[k] for k in ("image", "question", "answer")} for r in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in bare))
    monkeypatch.setattr("nanoglimpse.evaluate.__main__.load_engine", None)
    assert exit_code(main, ["--data", data, "--methods", "dense", "oracle"]) == 2
    err = capsys.readouterr().err
    assert "method oracle keeps what the questions' boxes mark, but no question" in err
    assert err.count("\n") == 1


def test_a_file_of_results_in_memory_is_not_checked_twice():
    results = ResultsFile(None, {})
    results.add([FULL])
    assert results.rows == [FULL]
