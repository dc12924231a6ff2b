"""Every command, killed at each of its file operations, and then given again."""

import json
from pathlib import Path

import pytest
import torch

from nanoglimpse import load
from nanoglimpse.cli import ask, options
from nanoglimpse.cli.ask import EXAMPLES
from nanoglimpse.config import read_glimpse_config
from nanoglimpse.evaluate.__main__ import main as evaluate
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.train import __main__ as training
from nanoglimpse.train.curriculum import CURRICULA, Draw, Stage
from nanoglimpse.train.pretrain import BaseTask, write_folder
from nanoglimpse.train.shared_prefix import OPS
from nanoglimpse.weights.glimpse import read_tensors
from tests.helpers.kills import in_child, killed_everywhere
from tests.helpers.prompts import QUESTION, SCENE
from tests.helpers.tiny import TEXT, TOP, VISION, write_checkpoint

pytestmark = pytest.mark.slow
SHAPE = {**TOP, **TEXT, "vision_config": VISION}


def nothing(folder: Path) -> None:
    pass


def again_everywhere(call, folder, check, begin=nothing):
    """Kills `call` everywhere; after that, the same call must end with what `check` wants."""
    for at, work in killed_everywhere(call, begin, folder):
        check(work, whole=False)
        assert in_child(lambda work=work: call(work)) == 0, at
        check(work, whole=True)
        left = [file.name for file in work.rglob(".*")]
        assert left == [], at


def test_batch(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "load", lambda *_, **__: nano)
    questions = tmp_path / "questions.jsonl"
    rows = [{"image": str(SCENE), "question": q} for q in (QUESTION, "Is there a red star?")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = tmp_path / "work"
    work.mkdir()

    def call(folder):
        output = ["--output", str(folder / "results.jsonl"), "--max-new-tokens", "3"]
        return ask.main(["--batch-file", str(questions), *output, "--quiet"])

    def check(folder, whole):
        path = folder / "results.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        indices = [json.loads(line)["index"] for line in lines]
        assert len(set(indices)) == len(indices)
        assert not whole or sorted(indices) == [0, 1]

    again_everywhere(call, work, check)


def test_evaluate(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "load", lambda *_, **__: nano)

    def call(folder):
        data = ["--data", str(EXAMPLES / "questions.jsonl"), "--count", "1", "--batch", "2"]
        more = ["--methods", "nothing", "--max-new-tokens", "2", "--gallery", "1", "--quiet"]
        return evaluate([*data, *more, "--out", str(folder / "results.jsonl")])

    def check(folder, whole):
        path = folder / "results.jsonl"
        if path.exists() and path.read_bytes():
            rows = ResultsFile.read(path).rows
            assert len({row["question"] for row in rows}) == len(rows)
        assert not whole or len(rows) == 3  # one of each group

    again_everywhere(call, tmp_path, check)


@pytest.mark.parametrize("old", [False, True], ids=["absent", "present"])
def test_a_saved_session(nano, tmp_path, old):
    session = nano.session(str(SCENE))
    answer = session.chat(QUESTION, max_new_tokens=4).text

    def begin(folder):
        if old:
            (folder / "s").write_bytes(b"old")

    def call(folder):
        session.save(folder / "s")
        return 0

    def check(folder, whole):
        if not whole and not old and not (folder / "s").exists():
            return
        if not whole and old and (folder / "s").read_bytes() == b"old":
            return
        assert nano.load_session(folder / "s").turns == [(QUESTION, answer)]

    again_everywhere(call, tmp_path, check, begin)


TINY = ["--size", "16", "--condition", "16", "--taps", "4", "2", "1", "--accumulate", "1"]
TINY += ["--pictures", "1", "--questions", "1", "--steps", "2", "--save-every", "1"]
TINY += ["--log-every", "1", "--no-lm-loss", "--device", "cpu"]


def test_train_glimpse(tmp_path, monkeypatch):
    base = tmp_path / "base"
    write_folder(base, SHAPE, 0, pictures=40)
    kept = (base / "tokenizer.json").read_bytes()
    write_checkpoint(base, json.loads((base / "config.json").read_text()))
    (base / "tokenizer.json").write_bytes(kept)
    engine = load(base, device="cpu", dtype="float32", backend=OPS)
    monkeypatch.setattr(training, "load", lambda *_, **__: engine)
    monkeypatch.setattr(training.GlimpseTask, "evaluate", lambda self: {"accuracy": 0.0})

    def call(folder):
        return training.main(["glimpse", str(folder / "run"), "--model", str(base), *TINY])

    whole_run = tmp_path / "whole"
    whole_run.mkdir()
    assert call(whole_run) == 0
    wanted = read_tensors(whole_run / "run" / "glimpse")[1]
    log = (whole_run / "run" / "log.jsonl").read_text().splitlines()

    def check(folder, whole):
        glimpse = folder / "run" / "glimpse"
        if glimpse.exists():
            read_glimpse_config(glimpse / "config.json")
            found = read_tensors(glimpse)[1]
            assert found.keys() == wanted.keys()
        if (folder / "run" / "state.pt").exists():
            state = torch.load(folder / "run" / "state.pt", weights_only=True)
            assert state["step"] in (1, 2)
            assert glimpse.exists(), "a state speaks of weights that are not there"
        if whole:
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
            lines = (folder / "run" / "log.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == [
                json.loads(line)["step"] for line in log
            ]

    work = tmp_path / "work"
    work.mkdir()
    again_everywhere(call, work, check)


def test_train_base(tmp_path, monkeypatch):
    draws = (Draw("scene", ((112, 112),), (1, 2)),)
    monkeypatch.setitem(CURRICULA, "whole", (Stage(1.0, 24, 1, (1.0, 1.0), draws),))
    monkeypatch.setattr(BaseTask, "evaluate", lambda self: {"scene": 0.0})
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(SHAPE))
    monkeypatch.setattr(training, "write_folder", lambda *given: write_folder(*given, pictures=20))

    def call(folder):
        command = ["base", str(folder / "run"), "--shape", str(shape), "--steps", "2"]
        return training.main([*command, "--save-every", "1", "--log-every", "1", "--device", "cpu"])

    whole_run = tmp_path / "whole"
    whole_run.mkdir()
    assert call(whole_run) == 0
    wanted = {f.name: f.read_bytes() for f in (whole_run / "run").iterdir()}
    same = wanted.keys() - {"log.jsonl", "state.pt"}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= same

    def check(folder, whole):
        run = folder / "run"
        if (run / "config.json").exists():
            named = {"tokenizer.json", "generation_config.json", "tokenizer_config.json"}
            assert all((run / name).exists() for name in named)
        if (run / "state.pt").exists():
            assert (run / "model.safetensors").exists()
        if whole:
            assert all((run / name).read_bytes() == wanted[name] for name in same)

    work = tmp_path / "work"
    work.mkdir()
    again_everywhere(call, work, check)
