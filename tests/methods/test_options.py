"""How pruning is asked for: by name, object or file, in Python and in every command."""

import json

import pytest
import torch

from nanoglimpse.cli import ask
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.evaluate.__main__ import main as evaluate
from nanoglimpse.inference.sampling import Sampling
from nanoglimpse.methods import METHODS, Decision, PruningMethod
from nanoglimpse.methods.options import Pruning, find_method
from tests.helpers.prompts import QUESTION, SCENE

EVERY_THIRD = '''
from nanoglimpse.methods import Decision, PruningMethod


class EveryThird(PruningMethod):
    """Every third visual token, before the decoder."""

    name = "every third"
    about = "every third visual token"
    budget = "fixed"

    def choose(self, context):
        kept = ~context.prunable
        kept[::3] = True
        return Decision(kept)


class Other:
    pass
'''


class EveryThird(PruningMethod):
    """The same as an object."""

    name = "every third"
    about = "every third visual token"
    budget = "fixed"

    def choose(self, context):
        kept = ~context.prunable
        kept[::3] = True
        return Decision(kept)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(EVERY_THIRD, "utf-8")
    return path


@pytest.mark.slow
def test_a_method_is_a_name_an_object_or_a_file(nano, file):
    forms = [
        {"method": EveryThird()},
        {"method": f"{file}:EveryThird"},
        {"pruning": EveryThird()},
        {"pruning": Pruning(EveryThird())},
    ]
    answers = [nano.ask(SCENE, QUESTION, **form) for form in forms]
    kept = torch.zeros_like(answers[0].kept)
    kept[::3] = True
    for answer in answers:
        assert torch.equal(answer.kept, kept)
        assert answer.token_ids == answers[0].token_ids
    named, itself = (nano.ask(SCENE, QUESTION, form) for form in ("vtw", METHODS["vtw"]))
    assert named.token_ids == itself.token_ids


@pytest.mark.slow
def test_a_file_is_a_method_in_every_command(file, tmp_path, capsys):
    method = f"{file}:EveryThird"
    shown = ["--image", str(SCENE), "--quiet", "--method", method]
    assert ask.main([*shown, "--json", QUESTION]) == 0
    one = json.loads(capsys.readouterr().out)
    batch = tmp_path / "batch.jsonl"
    batch.write_text(json.dumps({"image": str(SCENE), "question": QUESTION}) + "\n", "utf-8")
    assert ask.main(["--batch-file", str(batch), "--quiet", "--method", method]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == one["answer"]
    results = tmp_path / "results.jsonl"
    asked = ["--split", "heldout", "--domains", "scene", "--count", "2", "--out", str(results)]
    assert evaluate([*asked, "--methods", method, "--ratios", "0.5"]) == 0
    rows = [json.loads(line) for line in results.read_text("utf-8").splitlines()]
    assert len([row for row in rows if row.get("method") == method]) == 2


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("glimpes", UsageError, "unknown method 'glimpes'; choose one of dense, glimpse"),
        ("{}/none.py:A", UsageError, "there is no file"),
        ("{}/mine.py:None", UsageError, "defines no class None that is a PruningMethod"),
        ("{}/mine.py:Other", UsageError, "defines no class Other that is a PruningMethod"),
        ("{}/broken.py:A", NanoglimpseError, "cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_wrong_method_is_one_line(name, error, line, file):
    file.with_name("broken.py").write_text("1 / 0", "utf-8")
    with pytest.raises(error, match=line):
        find_method(name.format(file.parent))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"threshold": 2}, r"threshold must be in \[0, 1\], got 2"),
        ({"max_ratio": -0.1}, r"max_ratio must be in \[0, 1\], got -0.1"),
        ({"max_frame_ratio": 1.5}, r"max_frame_ratio must be in \[0, 1\], got 1.5"),
        ({"min_tokens": -1}, "min_tokens must be at least 0, got -1"),
        ({"anchors": ["middle"]}, "anchors must be among tl, tr, bl, br, got middle"),
        ({"kv_drop": "some"}, "kv_drop must be one of all, later, got 'some'"),
        ({"method": "fastv"}, "give max_ratio"),
        ({"method": "pdrop", "anchors": ["tl"]}, "anchors would have no meaning"),
    ],
)
def test_pruning_is_checked_where_it_is_made(options, line):
    with pytest.raises(UsageError, match=line):
        Pruning(**options)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"temperature": -1}, "temperature must be in"),
        ({"temperature": float("nan")}, "temperature must be in"),
        ({"top_p": 0}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in"),
    ],
)
def test_sampling_is_checked_where_it_is_made(options, line):
    with pytest.raises(UsageError, match=line):
        Sampling(**options)


def test_an_option_is_given_once(nano):
    with pytest.raises(TypeError, match="given twice"):
        nano.ask(SCENE, QUESTION, "vtw", method="dense")
    with pytest.raises(TypeError, match="treshold"):
        nano.ask(SCENE, QUESTION, treshold=0.5)


def test_the_methods_are_read_only():
    with pytest.raises(TypeError):
        METHODS["mine"] = EveryThird()
