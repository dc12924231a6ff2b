"""First contact: its time boxing on a fake clock, its children, and each step in a rehearsal."""

import json
import sys

import pytest
import torch

from nanoglimpse.benchmark import first_contact, kernel_tests, rules
from nanoglimpse.benchmark.first_contact import Step, StepEnded, child, command, run_steps, steps
from nanoglimpse.benchmark.output import Output
from nanoglimpse.benchmark.rules import NAMES, verdict
from tests.benchmark.test_bench import bench, shape  # noqa: F401

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only when a step says so."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def boxed(durations, seconds, budget=10, least=2, lines=(), ends=None):
    """Results of steps that take so long, and the limits that each was given."""
    clock, limits = Clock(), {}

    def start(step, limit):
        limits[step.name] = limit
        yield from lines
        spent = durations[step.name]
        clock.seconds += min(spent, limit)
        if spent > limit:
            raise StepEnded(f"stopped after {limit:g} s", failed=False)
        if ends and step.name in ends:
            raise StepEnded(ends[step.name], failed=True)

    plan = [Step(name, ("x",), budget, least) for name in durations]
    return run_steps(plan, seconds, Output("json"), start, clock), limits


def said(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_steps_are_skipped_when_time_is_over(capsys):
    results, limits = boxed({"a": 5, "b": 9, "c": 1, "d": 1}, 15)
    assert [row[1] for row in results.rows] == [
        "done",
        "stopped after 6 s",  # 10 s are left, of which the others need 4
        "done",
        "done",
    ]
    assert limits == {"a": 9, "b": 6, "c": 2, "d": 3}
    assert not results.failed
    results, limits = boxed({"a": 9, "b": 9, "c": 1}, 3)
    assert limits == {"a": 2}
    assert [row[1] for row in results.rows][1:] == ["skipped: no time left"] * 2
    assert {"note": "c: skipped: no time left"} in said(capsys)


def test_a_step_never_gets_more_than_its_budget():
    _, limits = boxed({"a": 1, "b": 1}, 1000)
    assert limits == {"a": 10, "b": 10}


def test_a_step_that_fails_is_a_line_and_the_next_one_begins(capsys):
    results, _ = boxed({"a": 1, "b": 1}, 100, ends={"a": "failed: SIGSEGV: illegal access"})
    assert [row[1:] for row in results.rows] == [
        ["failed: SIGSEGV: illegal access", 1],
        ["done", 1],
    ]
    assert results.failed
    assert {"note": "a: failed: SIGSEGV: illegal access"} in said(capsys)


def test_tables_pass_as_they_come_and_summaries_are_kept(capsys):
    table = {"table": "t", "columns": ["x"], "rows": [[1]]}
    lines = ["a warning of a library", "[1]", json.dumps(table), '{"note": "n"}']
    lines.append('{"rules": [{"rule": "r"}], "cases": []}')
    # A table is known although its step is stopped.
    results, _ = boxed({"a": 99}, 10, lines=lines)
    assert said(capsys) == [
        table | {"table": "a: t"},
        {"note": "a: n"},
        {"note": "a: stopped after 10 s"},
    ]
    assert results.rules == [{"rule": "r"}]
    assert results.steps == {"a": {"cases": []}}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed: SIGSEGV"),
        ("raise SystemExit('two\\nlines')", "failed: exit code 1: lines"),
        ("raise SystemExit(2)", "failed: exit code 2"),
    ],
)
def test_a_child_that_crashes_is_one_line(code, words):
    code = f"print('before', flush=True); {code}"
    seen = []
    with pytest.raises(StepEnded, match=words) as end:
        seen += child([sys.executable, "-c", code], CPU, 60)
    assert end.value.failed
    assert "\n" not in str(end.value)


def test_a_child_that_hangs_is_stopped_with_what_it_started(tmp_path):
    grandchild = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', '{grandchild}'])\n"
        "print(p.pid, flush=True); p.wait()"
    )
    seen = []

    def listen():
        for line in child([sys.executable, "-c", code], CPU, 2):
            seen.append(line)

    # The grandchild holds stdout, so that this ends only if it has ended as well.
    with pytest.raises(StepEnded, match="stopped after 2 s") as end:
        listen()
    assert not end.value.failed
    assert len(seen) <= 1


def test_without_a_gpu_it_is_one_line(bench, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--first-contact"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "there is none" in err


def test_all_of_first_contact(bench, capsys, monkeypatch):  # noqa: F811
    """Its tables and its last line, whatever the steps do."""
    record = {"rule": "pruning", "case": "c", "taken": "a", "other": "b", "verdict": "keep"}
    record |= {"ms": 1.0, "ms_spread": 0.1, "other_ms": 2.0, "other_ms_spread": None}

    def fake(command, device, limit):
        if "pruning" in command:
            yield json.dumps({"rules": [record]})
        if "nanoglimpse.benchmark.kernel_tests" in command:
            raise StepEnded("failed: exit code 1: 1 of 9 tests failed", failed=True)

    monkeypatch.setattr(first_contact, "child", fake)
    code = bench.main(["--first-contact", "--device", "cpu", "--shape", "nano"])
    assert code == 1
    out = capsys.readouterr().out
    assert "1 of 9 tests failed" in out
    assert "which rules to keep" in out
    found = json.loads(out.splitlines()[-1])["first_contact"]
    assert found["rules"] == [record]
    assert [row[1] for row in found["results"]][1:] == ["done"] * 11


def test_a_gpu_gets_every_rule_and_the_sizes_of_both_models():
    plan = steps(torch.device("cuda:1"), "7b", "3b")
    for step in plan:
        assert 0 < step.least <= step.budget
    assert sum(step.least for step in plan) < first_contact.SECONDS
    options = [step.options for step in plan[1:]]
    assert {o[o.index("--rule") + 1] for o in options if "--rule" in o} == set(NAMES)
    assert all(o[o.index("--device") + 1] == "cuda:1" for o in options)
    assert {o[o.index("--shape") + 1] for o in options if "few_rows" in o} == {"3b", "7b"}
    backends = [o[o.index("--backend") + 1] for o in options if "--backend" in o]
    assert set(backends) == {"torch", "triton", "auto"}


REHEARSED = {step.name: step for step in steps(CPU, "big", "small")[1:]}


@pytest.mark.slow
@pytest.mark.parametrize("name", REHEARSED)
def test_each_step_in_a_rehearsal(bench, shape, capsys, name):  # noqa: F811
    options = [str(shape) if o in ("big", "small") else o for o in REHEARSED[name].options]
    line = command(Step(name, tuple(options), 50, 1), 50)
    assert bench.main(line[2:]) == 0
    *tables, last = capsys.readouterr().out.splitlines()
    assert any("table" in json.loads(line) for line in tables)
    summary = json.loads(last)
    if name.startswith("rule"):
        for record in summary["rules"]:
            assert record["verdict"] in ("keep", "change", "no difference")
            assert record["ms"] > 0 < record["other_ms"]
    elif name.endswith("kernels"):
        assert summary["kernels"]
    else:
        (case,) = summary["cases"]
        assert case["new_lengths"]["a token"]["new"]["ms"] > 0


@pytest.mark.slow
def test_a_rule_whose_ways_differ_is_not_timed(bench, shape, capsys, monkeypatch):  # noqa: F811
    def wrong(x, weight, eps):
        return torch.zeros_like(x)

    plain = rules.TORCH
    monkeypatch.setattr(rules, "TORCH", type(plain)(**(vars(plain) | {"rms_norm": wrong})))
    options = ["--device", "cpu", "--dtype", "float32", "--visual-tokens", "4", "--text", "4"]
    assert bench.main(["--shape", str(shape), "--rule", "elementwise", *options]) == 0
    (record,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rules"]
    assert record["verdict"].startswith("not timed: they differ by")
    assert record["ms"] is None


@pytest.mark.parametrize(
    ("taken", "other", "words"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.2, 2.1], "keep"),
        ([2.0, 2.2, 2.1], [1.0, 1.1, 0.9], "change"),
        ([1.0, 1.0, 1.0], [1.02, 1.02, 1.02], "no difference"),
        ([1.0, 1.0, 1.0, 1.0], [0.5, 0.6, 3.0, 4.0], "no difference"),
        ([1.0], [2.0], "keep"),
    ],
)
def test_the_verdict_follows_the_quartiles(taken, other, words):
    assert verdict(taken, other) == words


TESTS = """
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_left(): pass
"""


@pytest.mark.slow
def test_the_tests_are_counted_and_failures_named(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    seen, line = [], [sys.executable, "-m", "nanoglimpse.benchmark.kernel_tests"]

    def listen():
        for line_ in child([*line, "60", str(file)], CPU, 60):
            seen.append(json.loads(line_))

    with pytest.raises(StepEnded, match="exit code 1: 1 of 3 tests failed"):
        listen()
    assert "test_bad" in seen[0]["note"]
    assert seen[1]["rows"] == [[1, 1, 1, 0]]
    file.unlink()
    with pytest.raises(StepEnded, match="0 of 0 tests"):
        listen()


def test_no_test_begins_after_its_time():
    clock = Clock()
    tally = kernel_tests.Tally(Output("json"), 10, clock)

    class Session:
        shouldstop = False
        items = (1, 2)

    session = Session()
    tally.pytest_collection_finish(session)
    tally.pytest_runtest_logfinish()
    assert not session.shouldstop
    clock.seconds += 11
    tally.pytest_runtest_logfinish()
    assert session.shouldstop


def test_without_pytest_a_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr(kernel_tests, "find_spec", lambda name: None)
    assert kernel_tests.main(["1", "x.py"]) == 0
    assert "not installed" in said(capsys)[0]["note"]
