"""Mutated files of rows, batch files, files of results, and logs and states of runs.

Each target writes one mutated input into an empty folder and returns the call that is to be tried:
it must end in a value, or in a NanoglimpseError. Anything else is a fault.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from nanoglimpse.cli.batch_file import AnswerFile, read_questions
from nanoglimpse.data.sources import FileExamples
from nanoglimpse.data.viscot import read_questions as read_rows
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.evaluate.figures import read_variants
from nanoglimpse.evaluate.page import page
from nanoglimpse.evaluate.questions import FileQuestions
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.evaluate.tables import as_csv, document
from nanoglimpse.train.loop import STATE, MasterWeights, Recipe, TrainingLog, _restore, _save

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.0,
    0.5,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a",
    "a.png",
    "\0",
    "x" * 300,
    "../a.png",
    "/",
    ".",
    "\u2028",
    "\x1b[31m",
    "<b>",
    "=1+1",
    [],
    [[]],
    [1],
    [0, 0, 1, 1],
    [[0, 0, 1, 1]],
    [[0.5, 0.1, 0.2, 0.3]],
    ["a", None],
    {},
    {"a": 1},
)
BYTES = (b"", b"\0", b"\n", b"\r", b"\xff", b"\xef\xbb\xbf", b'"', b"{", b"[" * 2000, b"\\ud800")

PLAIN = {
    "image": "a.png",
    "question": "Which number?",
    "answer": "It is 7.",
    "short": "7",
    "boxes": [[0.1, 0.2, 0.3, 0.4]],
    "domain": "scene",
    "kind": "number",
}
COT = {
    "image": "a.png",
    "question": "Which number?",
    "answer": ["7", "seven"],
    "width": 56,
    "height": 28,
    "bboxs": [[5, 5, 20, 20]],
    "dataset": "gqa",
    "question_id": 3,
}
BENCHMARK = {
    "question_id": 1,
    "dataset": "gqa",
    "image": ["a.png", "a.png###[1,2,30,20]"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhich number?"},
        {"from": "gpt", "value": "[0.1]"},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "It is 7."},
    ],
}
RESULT = {
    "question": "rows 1",
    "arm": "glimpse 0.111",
    "method": "glimpse",
    "ratio": 0.111,
    "brief": False,
    "group": "scene",
    "kind": "number",
    "asked": "Which number?",
    "wanted": "It is 7.",
    "short": "7",
    "reply": "It is 7.",
    "contains": True,
    "exact": True,
    "anls": 1.0,
    "f1": 1.0,
    "visual": 4,
    "kept": 1,
    "recall": None,
    "iou": None,
    "prompt": 30,
    "tokens": 3,
    "stop": 4,
    "input": 1.0,
    "prefill": 0.6,
    "decode_kv": 0.25,
    "kv_rows": 20.5,
    "kv_bytes": 1000,
    "flops": {"vision": 1e9, "prefill": 1e9, "decode": 1e8, "paper prefill": 1e9},
    "ms": {"preprocess": 1.0, "vision": 2.0, "before": 1.0, "decode": None},
    "batch": 1,
    "peak_bytes": None,
    "grid": [2, 2],
    "boxes": [[0.1, 0.2, 0.3, 0.4]],
    "cells": "80",
    "importance": "ff000000",
}
RECORDS = (
    RESULT,
    RESULT | {"question": "rows 2", "arm": "dense", "method": "dense", "ratio": None},
    {"picture": "rows 1", "uri": "data:image/jpeg;base64,AA=="},
    {"verdict": "judge", "arm": "dense", "question": "rows 2", "score": 0.5, "understood": True},
    {"missing": ["gone.png"]},
    {"question": "rows 3", "error": "damaged"},
)


def changed(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which one part is another, is missing, or is there twice."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.15:
            return {name: part for name, part in value.items() if name != key}
        if kind < 0.25:
            return {**value, rng.choice(list(value)): value[key]}
        return {**value, key: changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            return value[:at] + value[at + 1 :]
        if kind < 0.25:
            return value[:at] + value[at : at + 1] + value[at:]
        return [*value[:at], changed(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes of which some are cut, changed, repeated or inserted."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + 64)
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[end:]
        elif kind == 2:
            data = data[:at] + data[at:end] + data[at:]
        elif kind == 3:
            data = data[:at] + rng.choice(BYTES) + data[at:]
        elif at < len(data):
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data


def _lines(rng: random.Random, *rows: Any) -> bytes:
    """A file of rows, of which some are changed."""
    some = [changed(rng, row) if rng.random() < 0.3 else row for row in rows]
    rng.shuffle(some)
    text = "".join(json.dumps(row) + "\n" for row in some).encode()
    return damaged(rng, text) if rng.random() < 0.3 else text


def _picture(rng: random.Random, folder: Path) -> None:
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 3, 6, 8, 0, 9, 65535))
    image = Image.new("RGB", rng.choice(((56, 28), (28, 56), (1, 1), (300, 1))))
    image.save(data, rng.choice(("PNG", "JPEG")), exif=exif)
    (folder / "a.png").write_bytes(
        damaged(rng, data.getvalue()) if rng.random() < 0.5 else data.getvalue()
    )


def rows(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A file of questions in one of the three layouts, and a picture."""
    _picture(rng, folder)
    if rng.random() < 0.3:
        entries = [changed(rng, BENCHMARK), BENCHMARK]
        path, text = folder / "rows.json", json.dumps(entries)
        path.write_bytes(damaged(rng, text.encode()) if rng.random() < 0.3 else text.encode())
    else:
        path = folder / "rows.jsonl"
        path.write_bytes(_lines(rng, PLAIN, COT, PLAIN))

    def examined() -> list:
        """The usable rows, as `train check` shows them."""
        read = read_rows(path, folder)
        return [_opened(row.opened) for row in read.rows]

    def asked() -> list:
        source = FileQuestions([path], None, None)
        return [_opened(question.loaded) for question in source.questions(rng.random() < 0.5)]

    return rng.choice((lambda: FileExamples(path, folder, 0).examples(0), examined, asked))


def _opened(open_: Callable[[], Any]) -> Any:
    try:
        return open_()
    except NanoglimpseError as error:
        return error


def batch_file(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A batch file, and results that an earlier run has written."""
    questions = [
        {"image": "a.png", "question": "Which number?", "id": 1},
        {"image": ["a.png", "b.png"], "question": "Which picture?"},
        {"video": "v.gif", "question": "What?", "id": {"a": [1]}},
        {"image": None, "question": "Hello"},
    ]
    path, output = folder / "questions.jsonl", folder / "results.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in questions).encode()
    path.write_bytes(_lines(rng, *questions) if rng.random() < 0.5 else good)
    settings = {"max_new_tokens": 12}
    results: list[dict[str, Any]] = [
        {
            "index": 0,
            "id": 1,
            "question": "Which number?",
            "images": ["a.png"],
            "settings": settings,
            "answer": "7",
        },
        {"index": 3, "question": "Hello", "images": [], "settings": settings, "error": "damaged"},
    ]
    output.write_bytes(_lines(rng, *results))

    def resume() -> object:
        found = read_questions(path, 2.0, 8)
        answers = AnswerFile(output, found, settings)
        for question in answers.left:
            answers.add(question, {"answer": "7"})
        assert not AnswerFile(output, found, settings).left
        return answers

    return resume


def results(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A file of results, which is reported or continued."""
    path, options = folder / "results.jsonl", {"model": "nano", "data": {"world": 1}, "dtype": "x"}
    head = options if rng.random() < 0.8 else changed(rng, options)
    body = _lines(rng, *RECORDS) if rng.random() < 0.8 else b""
    header = json.dumps({"options": head}).encode() + b"\n"
    path.write_bytes((damaged(rng, header) if rng.random() < 0.2 else header) + body)

    def report() -> str:
        variants, files = read_variants([path])
        return page(variants, files, "contains", []) + document(variants, "contains", [])

    def table() -> str:
        return as_csv(read_variants([path])[0])

    def resume() -> object:
        found = ResultsFile.resume(path, options)
        found.add([RESULT | {"question": "rows 9"}])
        again = ResultsFile.resume(path, options)
        assert ("glimpse 0.111", "rows 9") in again.done
        return again

    return rng.choice((report, table, resume))


def run_folder(rng: random.Random, folder: Path) -> Callable[[], object]:
    """The log and the state of a training run, which is resumed."""
    torch.manual_seed(0)
    recipe, settings = Recipe(steps=4), {"steps": "4"}
    masters = MasterWeights(nn.Linear(3, 2), recipe, {})
    masters.step(0.1, 1.0)
    _save(folder / STATE, 1, settings, masters)
    lines = [{"step": 1, "lm": 0.5}, {"step": 1, "heldout": {"accuracy": 1.0}}, {"step": 2}]
    (folder / "log.jsonl").write_bytes(_lines(rng, *lines))
    state = (folder / STATE).read_bytes()
    if rng.random() < 0.5:
        content = torch.load(folder / STATE, weights_only=True)
        torch.save(_changed_state(rng, content), folder / STATE)
    else:
        (folder / STATE).write_bytes(damaged(rng, state))

    def resume() -> int:
        other = MasterWeights(nn.Linear(3, 2), recipe, {})
        first = _restore(folder / STATE, settings, other)
        log = TrainingLog(folder / "log.jsonl", first, recipe, lambda line: None)
        log.add({"lm": 0.5})
        log.step(first + 1, lr=0.1)
        other.step(0.1, 1.0)
        return first

    return resume


def _changed_state(rng: random.Random, value: Any) -> Any:
    """A state in which one part is of another kind, shape or dtype."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: _changed_state(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _changed_state(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        half, flat = value.to(torch.float16), value.reshape(-1)
        return rng.choice((half, flat, value[None], value * float("nan"), value.to(torch.int64)))
    return rng.choice((*VALUES, torch.zeros(2), torch.zeros(0)))


TARGETS: dict[str, Callable[[random.Random, Path], Callable[[], object]]] = {
    "rows": rows,
    "batch_file": batch_file,
    "results": results,
    "run_folder": run_folder,
}
