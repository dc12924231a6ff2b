"""Comparisons: questions, records of answers, resuming, several processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nanoglimpse.cli.ask import EXAMPLES
from nanoglimpse.data.qa import Example, token_mask
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.evaluate.__main__ import main
from nanoglimpse.evaluate.questions import FileQuestions, WorldQuestions, world_questions
from nanoglimpse.evaluate.run import QuestionBatch, answer_batch, bits, score_examples
from nanoglimpse.evaluate.scores import contains, overlap
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.evaluate.variants import Variant, check_variants, combine
from nanoglimpse.methods import METHODS
from nanoglimpse.model.model import Model
from nanoglimpse.world import BRIEF_SUFFIX, DOMAINS, QUESTION_KINDS, SPLITS
from nanoglimpse.world.__main__ import main as write_world
from tests.helpers.commands import exit_code
from tests.helpers.prompts import QUESTION, SCENE

HELDOUT = SPLITS["heldout"].start
ARGUMENTS = ["--count", "3", "--domains", "scene", "--batch", "2", "--device", "cpu", "--quiet"]
SMALL = ["--data", str(EXAMPLES / "questions.jsonl"), "--count", "5", "--device", "cpu", "--quiet"]


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_questions_are_fixed_and_of_all_kinds(domain):
    questions = list(world_questions(HELDOUT, domain, 40, False))
    assert [question.name for question in questions] == [
        question.name for question in world_questions(HELDOUT, domain, 40, False)
    ]
    assert len({question.name for question in questions}) == 40
    assert {question.kind for question in questions} == set(QUESTION_KINDS[domain])
    assert [question.number for question in questions] == list(range(40))
    first = [question.name for question in world_questions(HELDOUT, domain, 10, False)]
    assert first == [question.name for question in questions[:10]]


@pytest.mark.slow
def test_kinds_of_questions_can_be_chosen():
    world = WorldQuestions(HELDOUT, ["scene"], 12, ["number", "exists", "bar"])
    questions = list(world.questions(True))
    assert {question.kind for question in questions} == {"number", "exists"}
    assert (len(questions), world.total) == (12, 12)
    assert world.identity != WorldQuestions(HELDOUT, ["scene"], 12).identity
    assert main([*ARGUMENTS, "--kinds", "bar"]) == 2


def test_brief_questions_are_the_same_questions():
    free, brief = (list(world_questions(HELDOUT, "scene", 6, form)) for form in (False, True))
    for one, other in zip(free, brief, strict=True):
        assert (one.name, one.qa.short) == (other.name, other.qa.short)
        assert other.qa.question == one.qa.question + BRIEF_SUFFIX
        assert other.qa.answer == one.qa.short


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures of the world with their questions in both layouts."""
    folder = tmp_path_factory.mktemp("world")
    options = ["--count", "3", "--questions", "3", "--canvas", "280", "--quiet"]
    assert write_world(["--out", str(folder), *options]) == 0
    return folder


@pytest.mark.slow
def test_both_layouts_hold_the_same_questions(files):
    plain = FileQuestions([files / "questions.jsonl"], None, None)
    benchmark = FileQuestions([files / "viscot.json"], None, None)
    assert plain.groups == ["document", "scene", "chart"]
    assert benchmark.groups == ["world_document", "world_scene", "world_chart"]
    located = [question for question in plain.questions(False) if question.qa.boxes]
    assert len(located) == benchmark.total > 5
    for one, other in zip(located, benchmark.questions(False), strict=True):
        assert one.qa.question == other.qa.question
        assert one.qa.answer == other.qa.answer
        loaded = other.loaded()
        (box,) = loaded.qa.boxes
        x0, y0, x1, y1 = zip(*one.qa.boxes, strict=True)
        assert box == pytest.approx((min(x0), min(y0), max(x1), max(y1)), abs=0.5 / 280)
        assert loaded.picture.size == (280, 280)
    brief = next(iter(plain.questions(True)))
    assert brief.qa.question == next(iter(plain.questions(False))).qa.question + BRIEF_SUFFIX
    assert brief.qa.answer == brief.qa.short


def test_questions_are_counted_by_group(files):
    source = FileQuestions([files / "questions.jsonl"], None, 2)
    assert [(question.group, question.number) for question in source.questions(False)] == [
        (group, number) for group in ("document", "scene", "chart") for number in (0, 1)
    ]
    assert source.total == 6


def test_boxes_are_optional_and_the_training_layout_is_read(tmp_path):
    Image.new("RGB", (56, 28)).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "What?", "answer": "red"},
        {"image": "a.png", "question": "Where?", "answer": "left", "width": 56, "height": 28},
    ]
    rows[1] |= {"bboxs": [[14, 7, 28, 14]], "dataset": "gqa", "question_id": 9}
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = FileQuestions([tmp_path / "own.jsonl"], None, None).questions(False)
    assert (one.group, one.name, one.qa.boxes) == ("own", "own 1", ())
    assert (two.group, two.name) == ("gqa", "own 9")
    assert two.qa.boxes == ((0.25, 0.25, 0.5, 0.5),)


@pytest.mark.slow
def test_missing_pictures_are_counted_and_named(files, tmp_path, capsys):
    rows = json.loads((files / "viscot.json").read_text())
    gone = rows[0]["image"][0]
    kept = [row for row in rows if row["image"][0] != gone]
    for row in kept:
        name = row["image"][0]
        (tmp_path / name).write_bytes((files / name).read_bytes())
    (tmp_path / "viscot.json").write_text(json.dumps(rows))
    source = FileQuestions([tmp_path / "viscot.json"], None, None)
    assert source.missing == [str(tmp_path / gone)] * (len(rows) - len(kept))
    assert source.total == len(kept)
    out = tmp_path / "out.jsonl"
    options = ["--methods", "nothing", "--device", "cpu", "--out", str(out)]
    assert main(["--data", str(tmp_path / "viscot.json"), *options]) == 0
    error = capsys.readouterr().err
    note = (
        f"1 pictures are missing, {len(source.missing)} questions are left out: {tmp_path / gone}"
    )
    assert note in error
    assert ResultsFile.read(out).missing == source.missing
    assert main(["report", str(out)]) == 0
    assert note in capsys.readouterr().out


def test_pictures_in_a_folder_val(files, tmp_path):
    rows = json.loads((files / "viscot.json").read_text())[:1]
    (tmp_path / "cot" / "set" / "val").mkdir(parents=True)
    Image.new("RGB", (280, 280)).save(tmp_path / "cot" / "set" / "val" / "a.png")
    rows[0]["image"][0] = "cot/set/a.png"
    (tmp_path / "some.json").write_text(json.dumps(rows))
    (question,) = FileQuestions([tmp_path / "some.json"], None, None).questions(False)
    assert question.picture == tmp_path / "cot" / "set" / "val" / "a.png"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "no usable questions"),
        ("a.jsonl", "nonsense\n", "line 1, is not JSON"),
        ("a.jsonl", "[1]\n", "line 1, is not a question"),
        ("a.jsonl", '{"image": "a.png", "answer": "x"}\n', "has no key 'question'"),
        ("a.json", "{}", "must hold a list of questions, got a dict"),
        ("a.json", "[", "cannot be read"),
        ("a.json", '[{"image": ["a.png"]}]', "entry 0, is not a question of the benchmark"),
        ("a.json", None, "there is no file"),
    ],
)
def test_bad_files_are_one_line(name, text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["--data", str(tmp_path / name), "--quiet"]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nanoglimpse: error: ")
    assert error.count("\n") == 1


def test_combinations():
    variants = combine(
        ["dense", "glimpse", "fastv", "nothing"], [None, 0.111], [False, True], "all"
    )
    assert [variant.name for variant in variants[:5]] == [
        "dense",
        "glimpse",
        "glimpse 0.111",
        "fastv 0.111",
        "nothing",
    ]
    assert [variant.name for variant in variants[5:]] == [
        f"{variant.name} brief" for variant in variants[:5]
    ]
    every = combine(["glimpse", "all"], [0.5], [False], "all")
    assert [variant.method for variant in every[:2]] == ["glimpse", "dense"]
    assert {variant.method for variant in every} == set(METHODS) - {"evs"}
    assert len(every) == len(METHODS) - 1
    assert Variant("fastv", 0.5, True, "later").name == "fastv 0.5 later brief"


@pytest.mark.slow
def test_all_methods_can_be_checked_before_the_work(nano):
    check_variants(nano, combine(list(METHODS), [0.5], [False], "all"))
    with pytest.raises(UsageError, match="cannot be reached"):
        check_variants(nano, [Variant("random", 0.1, kv_drop="later")])


@pytest.mark.slow
def test_method_nothing_keeps_nothing(nano):
    prompt = nano.prompt(SCENE, QUESTION)
    prefill = nano.prefill(prompt, "nothing")
    depth = nano.config.text_config.num_hidden_layers
    assert not bool(prefill.kept.any())
    assert prefill.cache.num_rows == depth * int((~prompt.visual).sum())
    assert prefill.budgets.decode_kv_ratio == 0
    assert prefill.budgets.prefill_ratio == -(-2 * depth // 3) / depth


@pytest.mark.slow
def test_a_result_has_the_scores_and_costs_of_the_answer(nano):
    question = next(iter(FileQuestions([EXAMPLES / "questions.jsonl"], None, 1).questions(False)))
    (row,) = answer_batch(QuestionBatch(nano, [question]), Variant("glimpse", 0.2), gallery=1)
    alone = nano.ask(question.picture, question.qa.question, method="glimpse", max_ratio=0.2)
    assert row["reply"] == alone.text
    assert row["tokens"] == len(alone.token_ids)
    visual = len(alone.kept)
    assert (row["visual"], row["kept"]) == (visual, int(alone.kept.sum()))
    assert row["kv_bytes"] == alone.stats.kv_bytes[1]
    assert row["kv_rows"] * nano.config.text_config.num_hidden_layers == alone.stats.kv_rows[1]
    assert row["decode_kv"] == alone.stats.budgets.decode_kv_ratio
    assert set(row["ms"]) == {"preprocess", "vision", "before", "score", "keep", "after", "decode"}
    grid = alone.grids[0]
    assert row["grid"] == [grid[1] // 2, grid[2] // 2]
    seen = bytes.fromhex(row["cells"])
    found = [bool(seen[i // 8] >> (7 - i % 8) & 1) for i in range(visual)]
    assert found == alone.kept.tolist()
    importance = torch.tensor(list(bytes.fromhex(row["importance"])))
    assert torch.equal(importance, (255 * alone.importance.sigmoid()).round().int())
    mask = token_mask(question.qa.boxes, grid, nano.config)
    both = int((mask & alone.kept).sum())
    assert row["recall"] == both / int(mask.sum())
    assert row["iou"] == both / int((mask | alone.kept).sum())
    (plain,) = answer_batch(QuestionBatch(nano, [question]), Variant("dense"))
    assert not {"cells", "importance", "grid"} & plain.keys()


@pytest.mark.slow
def test_pictures_are_encoded_once_for_methods_with_equal_needs(nano, monkeypatch):
    """Answers equal those without sharing, and every method is charged for the vision encoder."""
    questions, seen = list(WorldQuestions(1_000_000, ["scene"], 2).questions(False)), []

    def encode(model, patches, grids, taps=(), vision_blocks=()):
        seen.append((taps, vision_blocks))
        return Model.encode(model, patches, grids, taps, vision_blocks)

    Watched = type("Watched", (Model,), {"encode": encode})
    caps = {name: 0.3 if method.budget == "cap" else None for name, method in METHODS.items()}
    variants = [Variant(name, cap) for name, cap in caps.items()]
    alone = [answer_batch(QuestionBatch(nano, questions), variant) for variant in variants]
    monkeypatch.setattr(nano, "model", Watched(**vars(nano.model)))
    batch = QuestionBatch(nano, questions)
    brief = QuestionBatch(
        nano, list(WorldQuestions(1_000_000, ["scene"], 2).questions(True)), vision=batch.vision
    )
    for variant, wanted in zip(variants, alone, strict=True):
        answer_batch(brief, variant)
        for row, one in zip(answer_batch(batch, variant), wanted, strict=True):
            assert row["ms"]["vision"] > 0
            assert {**row, "ms": 0} == {**one, "ms": 0}, variant.name
    assert len(seen) == len(set(seen)) < len(variants) / 2


def test_cells_as_bits():
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
    assert bits(mask) == "8140"
    assert bits(mask[:8]) == "81"
    assert bits(torch.zeros(9, dtype=torch.bool)) == "0000"


@pytest.mark.slow
def test_scores_of_examples_equal_those_of_single_answers(nano):
    questions = list(FileQuestions([EXAMPLES / "questions.jsonl"], None, 40).questions(False))
    examples = [Example(question.loaded().picture, (question.qa,)) for question in questions]
    alone = [nano.ask(i.picture, i.qa.question, method="glimpse") for i in questions]
    found = score_examples(nano, examples, size=3)
    kept = [float(one.kept.float().mean()) for one in alone]
    assert found["retention"] == pytest.approx(sum(kept) / len(kept))
    assert found["accuracy"] == sum(
        contains(one.text, question.qa.short)
        for question, one in zip(questions, alone, strict=True)
    ) / len(questions)
    masks = [
        token_mask(i.qa.boxes, nano.prompt(e.image, "").grids[0], nano.config)
        for i, e in zip(questions, examples, strict=True)
    ]
    recall = [overlap(o.kept, m)[0] for o, m in zip(alone, masks, strict=True) if m.any()]
    assert found["recall"] == pytest.approx(sum(recall) / len(recall))
    assert 0 < found["recall"] < 1


@pytest.mark.slow
def test_a_table_of_results(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    options = ["--methods", "dense", "random", "oracle", "--ratios", "none", "0.25", "--out"]
    assert main([*ARGUMENTS, *options, str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "dense",
        "random 0.25",
        "oracle",
    ]
    rows = ResultsFile.read(out).rows
    assert len(rows) == 9
    by_arm = {
        variant: [row for row in rows if row["arm"] == variant]
        for variant in ("dense", "random 0.25")
    }
    assert all(row["kept"] == row["visual"] for row in by_arm["dense"])
    assert all(0.2 < row["kept"] / row["visual"] <= 0.25 for row in by_arm["random 0.25"])
    assert all(row["recall"] in (1.0, None) for row in rows if row["arm"] == "oracle")
    dense = [row["contains"] for row in by_arm["dense"]]
    assert lines[2].startswith(f"| dense | {100 * sum(dense) / 3:.1f} | 100.0 |")


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path, capsys):
    """Wherever the file is cut, even in the first line, the next run completes it."""
    out = tmp_path / "results.jsonl"
    command = [*SMALL, "--methods", "nothing", "--batch", "3", "--gallery", "1", "--out", str(out)]
    assert main(command) == 0
    whole, printed = out.read_bytes(), capsys.readouterr().out
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (5, ends[0] - 1, ends[2] + 40, ends[-1] - 1):
        out.write_bytes(whole[:cut])
        assert main(command) == 0
        assert capsys.readouterr().out == printed
        assert timeless(out) == timeless(whole), cut
    before = out.read_bytes()
    assert main(command) == 0
    assert out.read_bytes() == before


def timeless(source):
    """Records without the fields that differ between two runs."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    records = [json.loads(line) for line in data.splitlines()]
    differs = ("ms", "batch")
    return [{k: v for k, v in record.items() if k not in differs} for record in records]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    options = [*SMALL, "--methods", "dense", "random", "--ratios", "0.2", "--batch", "1"]
    options += ["--gallery", "3"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main([*options, "--out", str(one)]) == 0
    # The second run resumes a file that was cut in the middle of a line.
    two.write_bytes(b"".join(one.read_bytes().splitlines(keepends=True)[:5]) + b'{"ques')
    several = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    several += [f"--master-port={30500 + os.getpid() % 1000}", "-m", "nanoglimpse.evaluate"]
    run = subprocess.run(
        [*several, *options, "--out", str(two)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr

    def results(path):
        read = ResultsFile.read(path)
        rows = {(r["arm"], r["question"]): r | {"ms": 0, "batch": 0} for r in read.rows}
        return rows, len(read.rows), read.pictures, read.options

    assert results(one) == results(two)
    assert results(two)[1] == 2 * 3 * 5  # methods, domains, questions
    assert run.stdout.count("| dense |") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--max-new-tokens", "5"], "max_new_tokens 64 instead of 5"),
        (["--dtype", "bfloat16"], "dtype float32 instead of bfloat16"),
        (["--max-pixels", "50176"], "max_pixels None instead of 50176"),
    ],
)
def test_results_of_other_options_are_not_mixed(change, message, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    command = [*SMALL, "--methods", "nothing", "--count", "1", "--out", str(out)]
    assert main(command) == 0
    before, _ = out.read_bytes(), capsys.readouterr()
    assert main([*command, *change]) == 2
    error = capsys.readouterr().err
    assert "holds results of other options: " in error
    assert f"{message}; give another --out" in error
    assert error.count("\n") == 1
    assert out.read_bytes() == before


@pytest.mark.slow
def test_results_of_other_weights_are_not_mixed(tmp_path, capsys):
    """Weights that change in the same folder are noticed."""
    model, out = tmp_path / "model", tmp_path / "results.jsonl"
    model.mkdir()
    for path in EXAMPLES.parent.iterdir():
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    command = [*SMALL, "--model", str(model), "--methods", "dense", "--count", "1"]
    assert main([*command, "--out", str(out)]) == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main([*command, "--out", str(out)]) == 2
    assert "other options: weights" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("text", ['{"image": "a.png"}\n', "notes\nwithout an end", "[]"])
def test_other_files_are_left_alone(text, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(text)
    assert main([*SMALL, "--out", str(other)]) == 1
    assert "is not a file of results" in capsys.readouterr().err
    assert other.read_text() == text


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"options": {}}\n{"missing": []}\n{"question": 1}\n')
    with pytest.raises(NanoglimpseError, match="line 3, is not a result"):
        ResultsFile.read(path)
    path.write_text('{"options": {}}\n{"missing"\n{"missing": []}\n')
    with pytest.raises(NanoglimpseError, match="line 2, is not a result"):
        ResultsFile.read(path)


def test_another_world_is_other_data():
    assert WorldQuestions(1, ["scene"], 3).identity != WorldQuestions(2, ["scene"], 3).identity
    assert WorldQuestions(1, ["scene"], 3).identity == WorldQuestions(1, ["chart"], 9).identity


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--methods", "random"], "need a cap"),
        (["--ratios", "2"], "must be in (0, 1], or none, got '2'"),
        (["--ratios", "x"], "must be in (0, 1], or none, got 'x'"),
        (["--count", "0"], "--count: must be a whole number of at least 1, got '0'"),
        (["--batch", "0"], "--batch: must be a whole number of at least 1, got '0'"),
        (["--out", "/dev/null/x"], "cannot be"),
        (["--methods", "random", "--ratios", "0.1", "--kv-drop", "later"], "cannot be reached"),
        (["--judge-url", "http://localhost/v1"], "needs --judge-model"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys):
    assert exit_code(main, [*ARGUMENTS, *options]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nanoglimpse: error: ")
    assert error.count("\n") == 1
