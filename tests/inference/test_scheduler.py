"""Many questions at once: each answered as alone, rows handed on, errors kept apart, no leak."""

import errno
import gc
import json
import os
import tracemalloc
from dataclasses import replace

import pytest
import torch
from PIL import Image

from nanoglimpse import NanoglimpseError, Prompt, Sampling, UsageError, files, load
from nanoglimpse.cli import ask as generate
from nanoglimpse.cli import options
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.kvcache.pool import KVPool
from tests.helpers.commands import exit_code
from tests.helpers.prompts import ANSWER, QUESTION, SCENE, SCENES
from tests.helpers.tiny import chat_ids, patches_of

LAYOUTS = (
    (3, (1, 12, 18), 6),
    (9,),
    (2, (1, 4, 4), 1, (1, 8, 10), 4),
    ((1, 2, 22), 5),
    (40,),
    (3, (1, 6, 6), 2, (1, 6, 6), 2, (1, 10, 4), 7),
    (1,),
    (5, (1, 16, 8), 3),
)


@pytest.fixture
def engine(tiny_folder, monkeypatch):
    """The tiny engine, asked in layouts of `chat_ids` instead of pictures and text."""
    engine = load(tiny_folder, dtype="float32", device="cpu")

    def prompt(images, layout):
        if isinstance(layout, Exception):
            raise layout
        grids = [part for part in layout if not isinstance(part, int)]
        ids = chat_ids(*layout, seed=len(layout))
        return Prompt.from_tokens(ids, patches_of(grids), grids, config=engine.config)

    monkeypatch.setattr(engine, "prompt", prompt)
    monkeypatch.setattr(engine.processor, "decode", lambda ids: " ".join(map(str, ids)))
    # Endings at different places: some answers are short, some as long as they may be.
    engine.model = replace(engine.model, eos_token_id=frozenset(range(0, 130, 7)))
    return engine


def alone(engine, layout, **options):
    return engine.ask([], layout, **options)


OPTIONS = {
    "glimpse": {},
    "dense": {"method": "dense"},
    "a pyramid": {"method": "pdrop", "max_ratio": 0.5},
    "rows of their own in every layer": {"method": "pdrop", "max_ratio": 0.75, "kv_drop": "later"},
    "drawn tokens": {"sampling": Sampling(temperature=1.5, seed=3, repetition_penalty=1.3)},
    "never ending": {"ignore_eos": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [60, 200, 100000], ids=["one by one", "in turns", "at once"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_answer_is_that_of_the_question_alone(engine, options, limit):
    items = [([], layout) for layout in LAYOUTS]
    answers = engine.ask_many(items, max_batch_tokens=limit, max_new_tokens=12, **options)
    for layout, answer in zip(LAYOUTS, answers, strict=True):
        one = alone(engine, layout, max_new_tokens=12, **options)
        assert answer.token_ids == one.token_ids
        assert (answer.text, answer.finish_reason) == (one.text, one.finish_reason)
        assert torch.equal(answer.kept, one.kept)
        assert answer.grids == one.grids
        ours, theirs = answer.stats, one.stats
        assert ours.budgets == theirs.budgets
        assert (ours.kv_rows, ours.kv_bytes) == (theirs.kv_rows, theirs.kv_bytes)
        assert (ours.prompt_tokens, ours.visual_tokens) == (
            theirs.prompt_tokens,
            theirs.visual_tokens,
        )
        assert ours.kept_tokens == theirs.kept_tokens
        assert list(ours.timings) == list(theirs.timings)
        if one.importance is not None:
            torch.testing.assert_close(answer.importance, one.importance, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_answers_end_at_different_places(engine):
    """What makes rows change hands: the other tests would be empty if all ended together."""
    lengths = {len(alone(engine, layout, max_new_tokens=12).token_ids) for layout in LAYOUTS}
    assert len(lengths) > 3


@pytest.mark.slow
def test_rows_change_hands_in_a_cache_of_fixed_size(engine, monkeypatch):
    """No allocation but the one, never more rows than allowed, several sequences at a time."""
    made, together = [], []
    build, step = KVPool.__init__, type(engine.decoder).step

    def counted(self, rows, like):
        build(self, rows, like)
        made.append(rows)

    def watched(self, tokens, rope, cache):
        (pool,) = cache.caches
        spans = sorted(zip(pool.starts, pool.capacity, strict=True))
        ends = [0, *(start + capacity for start, capacity in spans)]
        assert all(start >= end for (start, _), end in zip(spans, ends, strict=False))
        assert ends[-1] <= len(pool.k_rows[0])
        together.append(len(tokens))
        return step(self, tokens, rope, cache)

    monkeypatch.setattr(KVPool, "__init__", counted)
    monkeypatch.setattr(type(engine.decoder), "step", watched)
    items = [([], layout) for layout in LAYOUTS * 3]
    answers = list(engine.answers(items, max_batch_tokens=150, max_new_tokens=12))
    assert made == [150]
    assert max(together) > 3
    # In step, and refilled: fewer steps than the chunks would take one after the other.
    assert len(together) < sum(len(answer.token_ids) for _, answer in answers) / 2
    assert sorted(index for index, _ in answers) == list(range(24))
    assert [index for index, _ in answers] != list(range(24))


@pytest.mark.slow
def test_chunks_hold_no_more_than_the_budget(engine, monkeypatch):
    chunks, prefill_many = [], engine.prefill_many

    def watched(prompts, *arguments, **options):
        chunks.append([len(prompt) for prompt in prompts])
        return prefill_many(prompts, *arguments, **options)

    monkeypatch.setattr(engine, "prefill_many", watched)
    items = [([], layout) for layout in LAYOUTS]
    engine.ask_many(items, max_batch_tokens=80, max_new_tokens=10)
    lengths = [len(engine.prompt([], layout)) for layout in LAYOUTS]
    assert [n for chunk in chunks for n in chunk] == lengths
    assert all(sum(n + 10 for n in chunk) <= 80 for chunk in chunks if len(chunk) > 1)
    # None of the chunks could have taken the next prompt in.
    following = [chunk[0] for chunk in chunks[1:]]
    assert all(
        sum(n + 10 for n in chunk) + n + 10 > 80
        for chunk, n in zip(chunks, following, strict=False)
    )


@pytest.mark.slow
def test_a_prompt_larger_than_the_budget_runs_alone(engine):
    layouts = [(9,), (30, (1, 12, 18), 6), (7,)]
    items = [([], layout) for layout in layouts]
    answers = engine.ask_many(items, max_batch_tokens=40, max_new_tokens=5, method="dense")
    for layout, answer in zip(layouts, answers, strict=True):
        one = alone(engine, layout, max_new_tokens=5, method="dense")
        assert answer.token_ids == one.token_ids


def test_nobody_overtakes_and_questions_are_opened_when_their_turn_comes(engine):
    opened = []

    def items():
        for number, layout in enumerate(LAYOUTS):
            opened.append(number)
            yield [], layout

    answers = engine.answers(items(), max_batch_tokens=60, max_new_tokens=3)
    next(answers)
    assert opened[-1] < len(LAYOUTS) - 1


@pytest.mark.slow
def test_an_error_is_the_answer_of_its_question_alone(engine):
    errors = {1: UsageError("there is no picture"), 3: ZeroDivisionError("odd bytes")}
    items = [([], errors.get(i, layout)) for i, layout in enumerate(LAYOUTS)]
    items.insert(2, ([], (1995,)))
    answers = engine.ask_many(items, max_batch_tokens=150, max_new_tokens=6)
    failed = [i for i, answer in enumerate(answers) if isinstance(answer, NanoglimpseError)]
    assert failed == [1, 2, 4]
    assert answers[1] is errors[1]
    assert "1995 tokens and 6 new ones exceed the context of 2000" in str(answers[2])
    assert str(answers[4]) == "ZeroDivisionError: odd bytes"
    for i, (_, layout) in enumerate(items):
        if i not in failed:
            assert answers[i].token_ids == alone(engine, layout, max_new_tokens=6).token_ids


@pytest.mark.slow
def test_nothing_but_errors_and_nothing_at_all(engine):
    assert engine.ask_many([]) == []
    assert len(engine.ask_many([([], UsageError("no"))] * 3)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"max_batch_tokens": 0}, {"max_new_tokens": 0}, {"method": "magic"}, {"max_ratio": 2}],
    ids=str,
)
def test_options_that_make_no_sense_are_no_answers(engine, options):
    with pytest.raises(UsageError):
        engine.ask_many([([], (5,))], **options)


@pytest.mark.slow
def test_gaps_are_found_first_fit(engine):
    config = engine.config.text_config
    source = KVCache(config, range(2), [4, 2, 3, 9], torch.arange(4), torch.zeros(0), TORCH)
    source.reserve([4, 2, 3, 9])
    source.k.copy_(torch.arange(18.0).view(1, 18, 1, 1).expand_as(source.k))
    pool = KVPool(12, source)
    for sequence in (0, 1, 2):
        pool.admit(source, sequence, 1)
    assert (pool.starts, pool.capacity, pool.lengths) == ([0, 5, 8], [5, 3, 4], [4, 2, 3])
    assert pool.gap(1) is None
    pool.release([0, 2], torch.tensor([0, 2]))
    assert (pool.gap(3), pool.gap(4)) == (5, None)
    pool.release([1], torch.tensor([1]))
    assert (pool.gap(8), pool.gap(9)) == (0, None)
    assert pool.layer(1)[0][:, 0, 0].tolist() == [6, 7, 8]
    assert pool.next_position.tolist() == [2]


@pytest.mark.slow
def test_many_short_questions_leave_no_memory_behind(engine):
    """Objects, bytes of Python and bytes of tensors; the layouts' cache is full before."""

    def ask():
        items = [([], LAYOUTS[number % len(LAYOUTS)]) for number in range(64)]
        for _ in engine.answers(items, max_batch_tokens=150, max_new_tokens=4):
            pass
        for layout in LAYOUTS:
            alone(engine, layout, max_new_tokens=4)
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        # Packed weights are opaque; they are the model's.
        plain = [tensor for tensor in tensors if tensor.layout is torch.strided]
        held = sum(tensor.untyped_storage().nbytes() for tensor in plain)
        return len(gc.get_objects()), held, tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        ask()
        before, after = ask(), ask()
    finally:
        tracemalloc.stop()
    assert after[0] - before[0] < 32
    assert after[1] == before[1]
    assert after[2] - before[2] < 20000


@pytest.fixture
def batch(tmp_path, capsys, monkeypatch, nano):
    """Writes a file of questions and asks them: exit code, lines of the results, stderr."""
    loads = []
    monkeypatch.setattr(options, "load", lambda *_, **__: loads.append(1) or nano)

    class Batch:
        path, output = tmp_path / "in" / "questions.jsonl", tmp_path / "results.jsonl"

        def write(self, *rows):
            self.path.parent.mkdir(exist_ok=True)
            text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            self.path.write_text("".join(line + "\n" for line in text), encoding="utf-8")

        def run(self, *options, to_file=True):
            loads.clear()
            where = ["--output", self.output] if to_file else []
            arguments = ["--batch-file", self.path, *where, "--max-new-tokens", 12, *options]
            code = exit_code(generate.main, arguments)
            out = capsys.readouterr()
            text = self.output.read_text() if to_file and self.output.exists() else out.out
            return code, [json.loads(line) for line in text.splitlines()], out.err

        @property
        def loaded(self):
            return bool(loads)

    return Batch()


ROWS = (
    {"image": str(SCENE), "question": QUESTION, "id": 7},
    {"image": None, "question": "What is “red”?"},
    {"image": [str(SCENE), str(SCENES[0])], "question": QUESTION, "boxes": []},
)


@pytest.mark.slow
def test_a_file_of_questions_is_answered_as_each_alone(batch, nano):
    batch.write(ROWS[0], "", *ROWS[1:])
    code, lines, err = batch.run(to_file=False)
    assert code == 0
    assert "questions   3 of 3" in err
    assert sorted(line["index"] for line in lines) == [0, 1, 2]
    for line in lines:
        row = ROWS[line["index"]]
        images = [row["image"]] if isinstance(row["image"], str) else row["image"] or []
        one = nano.ask(images, row["question"], max_new_tokens=12)
        assert line["question"] == row["question"]
        assert line["images"] == images
        assert line.get("id") == row.get("id")
        assert line["answer"] == one.text
        assert line["tokens"] == one.token_ids
        assert line["finish_reason"] == one.finish_reason
        assert line["kept"] == one.kept.nonzero().flatten().tolist()
        assert (line["visual_tokens"], line["kept_tokens"]) == (len(one.kept), int(one.kept.sum()))
        assert line["settings"] == {"max_new_tokens": 12}


@pytest.mark.slow
def test_paths_count_from_the_folder_of_the_file(batch):
    batch.path.parent.mkdir()
    with Image.open(SCENE) as image:
        image.save(batch.path.parent / "here.png")
    batch.write({"image": "here.png", "question": QUESTION})
    _, lines, _ = batch.run()
    assert lines[0]["answer"] == ANSWER
    assert lines[0]["images"] == ["here.png"]


@pytest.mark.slow
def test_failures_have_lines_and_are_asked_again(batch):
    picture = batch.path.parent / "late.png"
    long = {"image": None, "question": "word " * 5000}
    batch.write(ROWS[0], {"image": "late.png", "question": QUESTION}, long, ROWS[1])
    code, lines, err = batch.run()
    assert code == 1
    assert "2 of 4 questions failed" in err.splitlines()[-1]
    errors = {line["index"]: line["error"] for line in lines if "error" in line}
    assert errors.keys() == {1, 2}
    assert "there is no picture" in errors[1]
    assert "exceed the context of" in errors[2]
    whole = {line["index"]: line for line in lines if "answer" in line}
    assert whole.keys() == {0, 3}
    picture.write_bytes(b"no picture")
    assert "is not a picture" in {x["index"]: x for x in batch.run()[1]}[1]["error"]
    with Image.open(SCENE) as image:
        image.save(picture)
    code, lines, err = batch.run()
    assert code == 1
    assert "1 of 4 questions failed" in err
    found = {line["index"]: line for line in lines}
    assert len(lines) == 4
    assert found[1]["answer"] == ANSWER
    assert {index: found[index] for index in whole} == whole


@pytest.mark.slow
def test_a_second_start_goes_on(batch, monkeypatch, nano):
    """After Ctrl-C, and after a kill that left half a line; what is done is not asked again."""
    batch.write(*ROWS)
    answers = nano.answers

    def stopped(*arguments, **options):
        yield next(answers(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(nano, "answers", stopped)
    code, lines, err = batch.run()
    assert (code, len(lines)) == (130, 1)
    assert "interrupted: 1 of 3 questions answered; the same command continues" in err
    first = lines[0]
    with batch.output.open("a") as file:
        file.write('{"index": 1, "answ')
    asked = []

    def watched(items, **options):
        return answers((asked.append(item) or item for item in items), **options)

    monkeypatch.setattr(nano, "answers", watched)
    code, lines, err = batch.run()
    assert code == 0
    assert lines[0] == first
    assert sorted(line["index"] for line in lines) == [0, 1, 2]
    assert len(asked) == 2
    before = batch.output.read_bytes()
    assert batch.run()[0] == 0
    assert not batch.loaded
    assert batch.output.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "contains no questions"),
        (["{"], "line 1, is not JSON"),
        ([ROWS[0], "[]"], "line 2: expected"),
        ([{"image": None}], "line 1: expected"),
        ([{"question": "What?"}], "null for text alone"),
        ([{"image": 3, "question": "What?"}], "line 1: image must be a path"),
        ([{"image": ["a", 3], "question": "What?"}], "line 1: image must be a path"),
        ([{"image": None, "question": ""}], "line 1: expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_with_mistakes_is_refused_before_any_work(batch, rows, words):
    batch.write(*rows)
    code, _, err = batch.run()
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not batch.loaded
    assert not batch.output.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-ratio", 0.5], r'the settings {"max_new_tokens": 12}, but this run has'),
        (["--method", "magic"], "unknown method"),
        (["--image", str(SCENE)], "--batch-file cannot be combined"),
        (["Why?"], "--batch-file cannot be combined"),
        (["--output", "/nowhere/x.jsonl"], "results cannot be written: there is no folder"),
        (["--temperature", -1], "temperature"),
    ],
    ids=str,
)
def test_a_start_that_does_not_fit_leaves_the_results_alone(batch, options, words):
    batch.write(*ROWS)
    batch.run()
    before = batch.output.read_bytes()
    code, _, err = batch.run(*options)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not batch.loaded
    assert batch.output.read_bytes() == before


@pytest.mark.slow
def test_results_of_other_questions_are_not_touched(batch):
    batch.write(*ROWS)
    batch.run()
    before = batch.output.read_bytes()
    batch.write(ROWS[1], ROWS[0], ROWS[2])
    code, _, err = batch.run()
    assert code == 2
    assert "is not a result of this batch file; choose another --output" in err
    assert batch.output.read_bytes() == before
    batch.output.write_bytes(batch.path.read_bytes())
    assert batch.run()[0] == 2
    assert batch.output.read_bytes() == batch.path.read_bytes()


def test_a_missing_file_and_output_without_one(batch, capsys):
    assert batch.run()[0] == 2
    assert generate.main(["x", "--output", "r.jsonl", "--quiet"]) == 2
    assert "--output needs a --batch-file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_is_one_line(batch, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    batch.write(*ROWS)
    monkeypatch.setattr(files.os, "fsync", full)
    code, _, err = batch.run("--quiet")
    assert code == 1
    assert "results.jsonl cannot be written" in err
    assert err.count("\n") == 1
