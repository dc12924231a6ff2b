"""The comparison on the world: what is asked, what is counted, and going on after a stop."""

import json

import pytest

from nanoglimpse.evaluate import Arm, Results, main, questions, table
from nanoglimpse.world import BRIEF_SUFFIX, DOMAINS, QUESTION_KINDS

ARGUMENTS = ["--count", "3", "--domains", "scene", "--batch", "2", "--device", "cpu", "--quiet"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_questions_are_fixed_and_of_all_kinds(domain):
    items = list(questions("heldout", domain, 40, False))
    assert [item.name for item in items] == [
        item.name for item in questions("heldout", domain, 40, False)
    ]
    assert len({item.name for item in items}) == 40
    assert {item.kind for item in items} == set(QUESTION_KINDS[domain])
    assert [item.number for item in items] == list(range(40))
    first = [item.name for item in questions("heldout", domain, 10, False)]
    assert first == [item.name for item in items[:10]]


def test_brief_questions_are_the_same_questions():
    free, brief = (list(questions("heldout", "scene", 6, form)) for form in (False, True))
    for one, other in zip(free, brief, strict=True):
        assert (one.name, one.asked.short) == (other.name, other.asked.short)
        assert other.asked.question == one.asked.question + BRIEF_SUFFIX


def test_a_table_of_results(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    options = ["--methods", "dense", "random", "oracle", "--ratios", "none", "0.25", "--out"]
    assert main([*ARGUMENTS, *options, str(out)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "dense",
        "random 0.25",
        "oracle",
    ]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 9
    assert all(row["kept"] == 1 for row in rows if row["arm"] == "dense")
    assert all(0.2 < row["kept"] <= 0.25 for row in rows if row["arm"] == "random 0.25")
    assert all(row["recall"] in (1.0, None) for row in rows if row["arm"] == "oracle")
    dense = [row["right"] for row in rows if row["arm"] == "dense"]
    assert lines[2].startswith(f"| dense | {100 * sum(dense) / 3:.1f} | 100.0 |")


def test_a_stopped_run_goes_on(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    command = [*ARGUMENTS, "--methods", "dense", "--out", str(out)]
    assert main(command) == 0
    whole, printed = out.read_text(), capsys.readouterr().out
    lines = whole.splitlines(keepends=True)
    out.write_text(lines[0] + lines[1][:40])
    assert main(command) == 0
    assert capsys.readouterr().out == printed
    rows = [row["question"] for row in Results(out).rows]
    assert sorted(rows) == sorted(json.loads(line)["question"] for line in lines)
    before = out.read_text()
    assert main(command) == 0
    assert out.read_text() == before


def test_other_files_are_not_continued(tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"image": "a.png"}\n')
    assert main([*ARGUMENTS, "--out", str(tmp_path / "other.jsonl")]) == 1
    assert "holds something else than results" in capsys.readouterr().err
    assert (tmp_path / "other.jsonl").read_text() == '{"image": "a.png"}\n'


def test_table_by_hand():
    arm = Arm("glimpse", 0.111, True)
    assert arm.name == "glimpse 0.111 brief"
    rows = [
        {"arm": arm.name, "domain": "scene", "right": right, "kept": kept, "recall": recall}
        for right, kept, recall in ((True, 0.1, 1.0), (False, 0.2, None), (True, 0.0, 0.5))
    ]
    rows.append({**rows[0], "arm": "dense"})
    assert table(rows, ["scene"], [arm]).splitlines()[-1] == (
        "| glimpse 0.111 brief | 66.7 | 10.0 | 75.0 |"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--methods", "random"], "need a cap"),
        (["--ratios", "2"], "ratio 2 is no share"),
        (["--ratios", "x"], "neither a number nor none"),
        (["--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert main([*ARGUMENTS, *options]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nanoglimpse: error: ")
    assert error.count("\n") == 1
