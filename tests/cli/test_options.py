"""Every option of every command, with values that make no sense."""

import argparse
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest

from nanoglimpse.__main__ import COMMANDS
from nanoglimpse.cli import ask, console, kinds
from nanoglimpse.cli.console import Parser, adder
from nanoglimpse.cli.kinds import Kind
from nanoglimpse.doctor import __main__ as doctor
from nanoglimpse.evaluate import __main__ as evaluate
from nanoglimpse.kernels import report as kernels
from nanoglimpse.train import __main__ as train
from nanoglimpse.weights import __main__ as weights
from nanoglimpse.world import __main__ as world
from tests.helpers.commands import exit_code

ROOT = Path(__file__).parents[2]
LONG = "x" * 300
ABSURD = ["nan", "inf", "-inf", "-1", "0", "1.5", str(10**22), "1e400", "", "abc", LONG]
ABSURD += ["foo\x1b[31m", "1\n2", "0x10", "१२", "\udcff", "cuda:-1", "a\0b"]
# Options of which any text is a value, or which are checked where they are read.
TEXTS = {"question", "image", "system", "token", "judge_url"}


def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A function that runs the command, its parser, and the least that it needs.
RUN = {
    "generate": (ask.main, ask.parser(), []),
    "evaluate": (evaluate.main, evaluate._parser(), []),
    "evaluate report": (evaluate.main, evaluate._report_parser(), ["r.jsonl"]),
    "evaluate judge": (evaluate.main, evaluate._judge_parser(), ["r.jsonl"]),
    "world": (world.main, world.parser(), ["--out", "o"]),
    "weights": (weights.main, weights.parser(), ["a", "b"]),
    "doctor": (doctor.main, doctor.parser(), []),
    "kernels": (kernels.main, Parser("kernels"), []),
    "bench.py": (bench().main, bench().parser(), []),
}
for name, own in next(
    action.choices
    for action in train._parser()._actions
    if isinstance(action, argparse._SubParsersAction)
).items():
    RUN[f"train {name}"] = train.main, own, ["run"]


def of(name):
    """The words of the command line, and the options that take a value."""
    main, parser, least = RUN[name]
    words = name.split()[1:]
    takes = [action for action in parser._actions if action.nargs != 0]
    return main, [*words, *least], takes, least


def test_every_command_is_tried():
    assert {name.split()[0] for name in RUN} == {*COMMANDS, "bench.py"}


@pytest.mark.parametrize("name", RUN)
def test_every_option_has_a_kind(name):
    for action in of(name)[2]:
        known = isinstance(action.type, Kind) or action.choices or action.dest in TEXTS
        assert known, f"{name}: {action.option_strings or action.dest} has no kind"


def forms(action, value, least):
    """The words that give a value to an option or in place of a positional argument."""
    if not action.option_strings:
        return [] if not least else ["--", *[value] * len(least)]
    count = action.nargs if isinstance(action.nargs, int) else 1
    flag = action.option_strings[-1]
    return [f"{flag}={value}"] if count == 1 else [flag, *[value] * count]


def numbers(value):
    found = value if isinstance(value, list | tuple) else [value]
    return [one for one in found if isinstance(one, int | float) and not isinstance(one, bool)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_absurd_values_are_refused_in_one_line_or_are_values(name, monkeypatch, capsys):
    """No command begins: what would run is replaced by a record of the values that it got."""
    main, words, takes, least = of(name)
    got = []
    real = console.run

    def parsed_only(command, parser, arguments, **more):
        return real(lambda args: got.append(vars(args)) or 0, parser, arguments, **more)

    monkeypatch.setattr(console, "run", parsed_only)
    monkeypatch.setattr(kernels, "run", parsed_only)
    for action in takes:
        for value in ABSURD:
            given = forms(action, value, least)
            base = words[: len(words) - len(least)] if "--" in given else words
            code = exit_code(main, [*base, *given])
            out, err = capsys.readouterr()
            where = f"{name} {given}: {err}"
            assert out == "", where
            if code == 0:
                assert err == "", where
                (args,) = got
                value_of = args[action.dest]
                assert all(math.isfinite(one) and abs(one) <= 1e22 for one in numbers(value_of))
                if isinstance(action.type, Kind):
                    # A value of its kind, as the kind itself says.
                    assert action.type(value) == (
                        value_of[0] if isinstance(value_of, list) else value_of
                    )
                got.clear()
                continue
            assert (code, got) == (2, []), where
            assert err.startswith("nanoglimpse: error: "), where
            assert re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*\n", err), where
            assert len(err) < 700, where


@pytest.mark.parametrize(
    ("kind", "accepted", "refused"),
    [
        (kinds.COUNT, ["1", "+7", "2147483647"], ["0", "-1", "2147483648", "1.0", "1_0", " 1", ""]),
        (kinds.NATURAL, ["0", "12"], ["-1", "nan", "9" * 5000]),
        (kinds.SEED, ["0", "9223372036854775807"], ["-1", "9223372036854775808"]),
        (kinds.SHARE, ["1", "1e-3", "0.111"], ["0", "-0.0", "1.01", "nan", "inf", "x"]),
        (kinds.FRACTION, ["0", "1"], ["-0.1", "1.1", "nan"]),
        (kinds.RATE, ["0", "1e-4", "100"], ["inf", "1e400", "101", "-1"]),
        (kinds.WEIGHT, ["0", "3.5"], ["inf", "-inf", "nan", "-1e-9"]),
        (kinds.RATIO, ["none", "0.5"], ["None", "0", "2", ""]),
        (kinds.DEVICE, ["auto", "cpu", "cuda", "cuda:7"], ["foo", "cuda:", "cuda:-1", "meta", ""]),
        (kinds.NAME, ["nano", "a/b.py:C", "ü"], ["", LONG, "a\0b", "/" + "a/" * 3000]),
        (world.CANVAS, ["448", "448x336"], ["448x", "x448", "1x2x3", "10", "9999", "9" * 5000]),
    ],
)
def test_kinds(kind, accepted, refused):
    for text in accepted:
        kind(text)
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            kind(text)


def test_help_of_the_kernels_compiles_nothing(monkeypatch):
    monkeypatch.setattr(kernels, "report", None)
    monkeypatch.setitem(sys.modules, "nanoglimpse.kernels.triton_ops.resources", None)
    assert exit_code(kernels.main, ["--help"]) == 0
    assert exit_code(kernels.main, ["--targets"]) == 2


def test_declaring_an_option_takes_a_line(capsys):
    parser = Parser("x")
    add = adder(parser)
    add("--rounds", 11, "rounds", kind=kinds.COUNT)
    add("--seed", kinds.SEED, "seed", "any")
    add("--shares", [0.5], "shares", kind=kinds.SHARE)
    assert vars(parser.parse_args([])) == {
        **{"rounds": 11, "seed": None, "shares": [0.5], "debug": False}
    }
    assert parser.parse_args(["--shares", "0.1", "1"]).shares == [0.1, 1.0]
    assert exit_code(parser.parse_args, ["--rounds", "x"]) == 2
    assert capsys.readouterr().err == (
        "nanoglimpse: error: argument --rounds: must be a whole number of at least 1, got 'x' "
        "(see --help)\n"
    )


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number of at least 1, got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be"),
        ({"RANK": "x\x1b[2J"}, "RANK must be a whole number of at least 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but"),
    ],
    ids=["text", "zero", "long", "rank", "alone"],
)
def test_variables_of_torchrun_that_make_no_sense_are_one_line(
    variables, words, monkeypatch, capsys
):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(evaluate, "load_engine", None)
    assert exit_code(evaluate.main, ["--count", "1"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert re.fullmatch(r"[^\x00-\x1f]*\n", err)
    assert len(err) < 700
