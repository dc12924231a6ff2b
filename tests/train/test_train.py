"""Training: agreement with inference, the losses of the paper, and exact resuming."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from nanoglimpse import load
from nanoglimpse.config import GlimpseConfig, parse_config, read_config
from nanoglimpse.data.qa import Example, as_qa, draw_questions, token_mask
from nanoglimpse.data.sources import FileExamples, WorldExamples, domains_of
from nanoglimpse.evaluate.scores import contains
from nanoglimpse.model.decoder import run_layers
from nanoglimpse.model.rope import mrope
from nanoglimpse.train import pretrain as base
from nanoglimpse.train.__main__ import main
from nanoglimpse.train.cell_loss import (
    CHARACTERS,
    FIELDS,
    FIRST_PRINTED,
    NAME_LENGTH,
    CellHead,
    cell_targets,
)
from nanoglimpse.train.collate import IGNORED, SHORT_WEIGHT, collate
from nanoglimpse.train.curriculum import CURRICULA, Draw, Stage
from nanoglimpse.train.glimpse import GlimpseTask, LossWeights, location_loss
from nanoglimpse.train.loop import Recipe, _batches, train
from nanoglimpse.train.pretrain import (
    WORD_SHARE,
    BaseTask,
    attention_loss,
    phrases,
    retokenized,
    write_folder,
)
from nanoglimpse.train.shared_prefix import OPS, KeptKeys, visual_logits
from nanoglimpse.train.tokens import make_tokenizer
from nanoglimpse.weights.glimpse import read_tensors
from nanoglimpse.world import BRIEF_SUFFIX, DOMAINS, render
from nanoglimpse.world.types import Thing
from tests.helpers.commands import exit_code
from tests.helpers.tiny import TEXT, TOP, VISION, random_tensors, write_checkpoint

SHAPE = {**TOP, **TEXT, "vision_config": VISION}
TAPS = (4, 2, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random checkpoint with a tokenizer of the world."""
    folder = tmp_path_factory.mktemp("trainable")
    write_folder(folder, SHAPE, 0, pictures=40)
    config = json.loads((folder / "config.json").read_text())
    kept = folder / "tokenizer.json"
    text = kept.read_text()
    write_checkpoint(folder, config)
    kept.write_text(text)
    return folder


@pytest.fixture
def engine(folder):
    return load(folder, device="cpu", dtype="float32", backend=OPS)


def glimpse_config(**changes) -> GlimpseConfig:
    fields = {
        "reduce_layer": 3,
        "selected_layers": (3,),
        "le_layers": tuple(range(TEXT["num_hidden_layers"])),
        "attn_fuse_size": 16,
        "visual_cond_size": 16,
        "attn_fuse_num_heads": 4,
        "attn_fuse_global": True,
        "selected_visual_layers": TAPS,
        "deep_supervision": False,
    }
    return GlimpseConfig(**fields | changes)


def glimpse_task(engine, losses=None, source=None, config=None, **options) -> GlimpseTask:
    source = source or WorldExamples(("scene",), 2, 3, 0)
    defaults = {"dropout": 0.0, "seed": 0, "checkpointing": False}
    return GlimpseTask(
        engine, config or glimpse_config(), losses or LossWeights(), source, **defaults | options
    )


def recipe(**changes) -> Recipe:
    fields = {"steps": 4, "lr": 1e-2, "accumulate": 1, "log_every": 1, "evaluate_every": 100}
    return Recipe(**fields | changes)


def quiet(line: str) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0, 7])
def test_a_branch_is_computed_as_if_it_were_alone(engine, gap):
    """The shared prefix, other questions and padding change nothing; a gap shifts positions."""
    examples = WorldExamples(("scene",), 2, 3, 5).examples(1)
    rows = collate(examples, engine.processor, probes=False, gap=gap)
    decoder, layout = engine.decoder, rows.layout
    with torch.no_grad():
        visual, _ = engine.vision(rows.patches, rows.grids)
        hidden = decoder.embed_tokens(rows.token_ids).index_copy(0, rows.visual_rows, visual)
        rope = mrope(rows.positions, engine.config.text_config)
        layers, keys = range(len(decoder.layers)), KeptKeys(0, decoder.layers[0].kv_heads)
        hidden, _ = run_layers(decoder, hidden, rope, keys, layout, layers)
    ends = layout.branch_start + torch.arange(6) * layout.branch_rows
    for number, (example, one) in enumerate((e, a) for e in examples for a in e.qas):
        prompt = engine.prompt(example.image, one.question)
        prompt.positions[:, layout.prefix_rows :] += gap
        alone = engine.prefill(prompt, "dense").logits
        row = ends[number] + len(prompt) - layout.prefix_rows - 1
        torch.testing.assert_close(decoder.logits(hidden[row][None])[0], alone)


@pytest.mark.slow
def test_labels_are_the_answer_its_end_and_a_line_break(engine):
    example = WorldExamples(("document",), 1, 2, 3).examples(0)[0]
    rows = collate([example], engine.processor, probes=True)
    for number, one in enumerate(example.qas):
        branch = slice(number * rows.layout.branch_rows, (number + 1) * rows.layout.branch_rows)
        wanted = rows.labels[branch]
        said = wanted[wanted != IGNORED].tolist()
        assert engine.processor.decode(said) == one.answer + "\n"
        assert said[-2:-1] == list(engine.model.eos_token_id)
        weighty = rows.weights[branch] == SHORT_WEIGHT
        assert engine.processor.decode(wanted[weighty].tolist()).strip().lower() == one.short
        value = rows.layout.branch_start + branch.start + int(weighty.nonzero()[0])
        assert int(rows.value_rows[number]) == value
        first = int((wanted != IGNORED).nonzero()[0])
        assert int(rows.probe_rows[number]) == rows.layout.branch_start + branch.start + first


def test_attention_loss():
    """The loss uses the mean over heads; questions without evidence do not count."""
    heads = torch.tensor([[0.5, 0.1], [0.25, 0.7], [0.25, 0.2]])
    even = torch.tensor([[0.01, 0.01], [0.9, 0.09], [0.09, 0.9]])
    logits = torch.stack((heads, heads, even)).log() + 3
    evidence = torch.tensor([[False, True, True], [False] * 3, [False, True, True]])
    located = torch.tensor([True, False, True])
    apart = [
        (0.5 * (0.5 / torch.tensor(shares)).log()).sum() for shares in ([0.475, 0.225], [0.495] * 2)
    ]
    torch.testing.assert_close(attention_loss(logits, evidence, located), sum(apart) / 2)
    assert attention_loss(logits, evidence, torch.zeros(3, dtype=torch.bool)) == 0


def test_visual_logits_are_those_of_the_layer(engine):
    """The logits of the attention loss are those of the layer's attention."""
    rows = collate(WorldExamples(("scene",), 2, 2, 5).examples(1), engine.processor, probes=False)
    block, layout = engine.decoder.layers[0], rows.layout
    with torch.no_grad():
        visual, _ = engine.vision(rows.patches, rows.grids)
        hidden = engine.decoder.embed_tokens(rows.token_ids)
        hidden = hidden.index_copy(0, rows.visual_rows, visual)
        rope = mrope(rows.positions, engine.config.text_config)
        q, k, _ = block.project(hidden, rope)
        logits = visual_logits(q[rows.value_rows], k[rows.visual_rows], layout.pictures)
    groups = q.shape[1] // k.shape[1]
    for branch, row in enumerate(rows.value_rows.tolist()):
        seen = rows.visual_rows.view(layout.pictures, -1)[branch // layout.branches]
        for head in range(q.shape[1]):
            wanted = k[seen, head // groups] @ q[row, head] / q.shape[2] ** 0.5
            torch.testing.assert_close(logits[branch, :, head], wanted)


@pytest.mark.slow
def test_training_computes_the_importance_of_inference(folder, engine, tmp_path):
    """Logits and importance in training equal those of the engine with the written weights."""
    task = glimpse_task(engine)
    train(task, recipe(steps=2), tmp_path, settings={}, log=quiet)
    batch = task.batch(7)
    rows = batch.rows
    with torch.no_grad():
        visual, taps = engine.vision(rows.patches, rows.grids, TAPS)
        logits, _ = task._layers(rows, visual, task.token())
        importance = task._importance(rows, logits, taps)
    for layout in ("glimpse.safetensors", "new_modules_gp.pt"):
        (tmp_path / "glimpse" / layout).rename(tmp_path / layout)
        other = load(
            folder, glimpse=tmp_path / "glimpse", device="cpu", dtype="float32", backend="torch"
        )
        (tmp_path / layout).rename(tmp_path / "glimpse" / layout)
        number = 0
        for example in task.source.examples(7):
            for one in example.qas:
                prefill = other.prefill(other.prompt(example.image, one.question), "glimpse")
                torch.testing.assert_close(prefill.glimpse_logits, logits[number])
                torch.testing.assert_close(prefill.importance, importance[number])
                number += 1
    assert float(importance.std()) > 0


def test_location_loss():
    """Against the formula of the official code, written with loops."""
    importance = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [1.0, 1.0, 1.0]])
    evidence = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
    dices, bces = [], []
    for row, truth in zip(importance[:2], evidence[:2], strict=True):
        p = [1 / (1 + 2.718281828459045 ** -float(x)) for x in row]
        g = [float(x) for x in truth]
        both = sum(a * b for a, b in zip(p, g, strict=True))
        dices.append(1 - (2 * both + 1e-6) / (sum(p) + sum(g) + 1e-6))
        logs = [-torch.tensor(a if b else 1 - a).log().item() for a, b in zip(p, g, strict=True)]
        bces.append(sum(logs) / 3)
    dice, bce, figures = location_loss(importance, evidence, evidence.any(1))
    assert float(dice) == pytest.approx(sum(dices) / 2, abs=1e-6)
    assert float(bce) == pytest.approx(sum(bces) / 2, abs=1e-6)
    assert figures["recall"] == pytest.approx((1 + 0.5) / 2)
    assert figures["kept"] == pytest.approx((2 / 3 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ((0.0, 0.0, 0.2, 0.2), {(0, 0)}),
        ((0.3, 0.1, 0.6, 0.2), {(0, 1), (0, 2)}),
        # A box that ends on a border also marks the next cell, if there is one.
        ((0.0, 0.0, 0.5, 1 / 3), {(r, c) for r in (0, 1) for c in (0, 1, 2)}),
        ((0.9, 0.9, 1.0, 1.0), {(2, 3)}),
    ],
)
def test_boxes_mark_visual_tokens(folder, box, cells):
    config = parse_config(SHAPE | json.loads((folder / "config.json").read_text()), "tiny")
    mask = token_mask([box], (1, 6, 8), config).view(3, 4)
    assert {tuple(cell) for cell in mask.nonzero().tolist()} == cells


@pytest.mark.slow
def test_frozen_parameters_never_change(engine, tmp_path):
    before = {k: v.clone() for k, v in engine.decoder.state_dict().items()}
    before |= {k: v.clone() for k, v in engine.vision.state_dict().items()}
    task = glimpse_task(engine)
    old = {k: v.clone() for k, v in task.module.state_dict().items()}
    train(task, recipe(), tmp_path, settings={}, log=quiet)
    after = engine.decoder.state_dict() | engine.vision.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    new = task.module.state_dict()
    still = [k for k, v in old.items() if torch.equal(new[k], v)]
    assert not still, still
    assert all(p.grad is None for p in engine.decoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "trained"),
    [(LossWeights(lm=0.0), {"token", "predictor"}), (LossWeights(dice=0.0, bce=0.0), {"token"})],
    ids=["no language loss", "no location loss"],
)
def test_ablations_train_what_their_loss_reaches(engine, tmp_path, losses, trained):
    task = glimpse_task(engine, losses)
    old = {k: v.clone() for k, v in task.module.state_dict().items()}
    train(task, recipe(steps=2), tmp_path, settings={}, log=quiet)
    new = task.module.state_dict()
    assert {k.split(".")[0] for k, v in old.items() if not torch.equal(new[k], v)} == trained


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences(engine):
    """The gradient of all losses with respect to the glimpse, through the frozen layers."""
    task = glimpse_task(engine)
    batch = task.batch(0)
    loss, _ = task.loss(batch)
    loss.backward()
    parameter = task.token.embeddings
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    direction *= float(parameter.detach().norm() / direction.norm())
    expected, step = float((parameter.grad * direction).sum().detach()), 1e-2
    sides = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter += sign * step * direction
            sides.append(float(task.loss(batch)[0]))
            parameter -= sign * step * direction
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_checkpointing_changes_memory_and_nothing_else(engine):
    gradients = []
    for checkpointing in (False, True):
        task = glimpse_task(engine, checkpointing=checkpointing, dropout=0.1)
        task.loss(task.batch(2))[0].backward()
        gradients.append([p.grad for p in task.module.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["glimpse", "base"])
@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(folder, engine, tmp_path, kind):
    def make():
        if kind == "glimpse":
            return glimpse_task(engine, dropout=0.1, source=WorldExamples(("scene",), 1, 2, 0))
        return small_base(folder)

    whole, broken = make(), make()
    train(whole, recipe(steps=5, save_every=2), tmp_path / "whole", settings={}, log=quiet)
    loss = broken.loss
    calls = []

    def dying(batch):
        calls.append(batch)
        if len(calls) == 4:
            raise Killed
        return loss(batch)

    broken.loss = dying
    with pytest.raises(Killed):
        train(broken, recipe(steps=5, save_every=2), tmp_path / "broken", settings={}, log=quiet)
    resumed = make()
    steps = recipe(steps=5, save_every=2)
    assert train(resumed, steps, tmp_path / "broken", settings={}, log=quiet) is None
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name
    lines = (tmp_path / "broken" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [1, 2, 3, 4, 5, 5]


def small_base(folder: Path) -> BaseTask:
    draws = (Draw("scene", ((112, 112),), (1, 2)), Draw("document", ((168, 112),), (3, 3)))
    stages = (Stage(0.5, 48, 0, (1.0, 1.0), draws), Stage(0.5, 70, 2, (1.0, 0.5), draws))
    task = BaseTask(folder, stages, 5, 0, torch.device("cpu"), torch.float32)
    task.evaluate = lambda: {"exact": 0.0}
    return task


@pytest.mark.slow
def test_a_state_of_another_run_is_refused(folder, engine, tmp_path, capsys):
    common = ["glimpse", str(tmp_path), "--model", str(folder), "--device", "cpu", "--steps", "1"]
    common += ["--pictures", "1", "--questions", "1", "--accumulate", "1", "--no-lm-loss"]
    common += ["--size", "16", "--condition", "16"]
    assert main(common) == 0
    assert main([*common, "--threads", "1", "--save-every", "9"]) == 0
    assert main([*common, "--lr", "0.5"]) == 1
    assert "belongs to a run with other options" in capsys.readouterr().err
    (tmp_path / "state.pt").write_bytes(b"nonsense")
    assert main(common) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_subprocesses_make_the_same_batches_in_order(folder):
    task = small_base(folder)
    for made, micro in zip(_batches(task, [3, 0, 2], workers=2), (3, 0, 2), strict=True):
        assert torch.equal(made.patches, task.batch(micro).patches)
        assert made.grids == task.batch(micro).grids


def test_rates():
    cosine = Recipe(steps=100, lr=1.0)
    assert cosine.rate(0) == pytest.approx(0.05)
    assert cosine.rate(9) == pytest.approx(0.95)
    assert cosine.rate(54) == pytest.approx(0.5, abs=0.02)
    assert cosine.rate(99) < 0.001
    flat = Recipe(steps=100, lr=1.0, schedule="trapezoid", decay=0.3)
    assert flat.rate(30) == flat.rate(69) == 1.0
    assert flat.rate(84) == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(folder, tmp_path):
    command = [sys.executable, "-m", "nanoglimpse.train", "glimpse", str(tmp_path)]
    command += ["--model", str(folder), "--device", "cpu", "--steps", "400", "--accumulate", "1"]
    command += ["--pictures", "1", "--questions", "1", "--size", "16", "--condition", "16"]
    command += ["--log-every", "1", "--no-lm-loss", "--taps", "4", "2", "1"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "step 1/400" in run.stdout.readline()
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=60)
    assert run.returncode == 130, error
    assert "the same command continues" in out
    assert "Traceback" not in error
    done = torch.load(tmp_path / "state.pt", weights_only=True)["step"]
    assert 1 <= done < 400
    assert not list(tmp_path.glob(".*"))
    again = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert f"step {done + 1}/400" in again.stdout.readline()
    again.kill()
    again.communicate()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(folder, tmp_path):
    common = ["-m", "nanoglimpse.train", "glimpse"]
    options = ["--model", str(folder), "--device", "cpu", "--steps", "3", "--threads", "1"]
    options += ["--pictures", "1", "--questions", "2", "--size", "16", "--condition", "16"]
    options += ["--taps", "4", "2", "1", "--lr", "0.01", "--evaluate-every", "1000"]
    single = [sys.executable, *common, str(tmp_path / "one"), *options, "--accumulate", "2"]
    several = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    several += [f"--master-port={29500 + os.getpid() % 1000}"]
    double = [*several, *common, str(tmp_path / "two"), *options, "--accumulate", "1"]
    runs = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in (single, double)
    ]
    for run in runs:
        _, error = run.communicate(timeout=240)
        assert run.returncode == 0, error
    one, two = (
        torch.load(tmp_path / name / "state.pt", weights_only=True)["parameters"]
        for name in ("one", "two")
    )
    for ours, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # Adam is invariant to the scale of gradients, so that only their norm reveals a wrong scale.
    norms = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["norm"]
        for name in ("one", "two")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
def test_eight_samples_are_learned_by_heart(tmp_path):
    """Cell loss, language loss and optimiser together, in well under a minute."""
    shape = {**SHAPE, "num_hidden_layers": 3}
    write_folder(tmp_path, shape, 0, pictures=40)
    stages = (Stage(1.0, 4, 2, (0.2, 0.2), (Draw("scene", ((112, 112),), (2, 2)),)),)
    task = BaseTask(tmp_path, stages, 1, 0, torch.device("cpu"), torch.float32)
    batch = task.batch(0)
    task.batch = lambda micro: batch
    start = time.perf_counter()
    exact = 0.0
    for steps in (60, 120, 240, 480):
        plan = recipe(steps=steps, lr=4e-3, schedule="trapezoid", save_every=1000, decay=1e-9)
        task.evaluate = lambda: {"exact": task.loss(batch)[1]["exact"]}
        (tmp_path / "state.pt").unlink(missing_ok=True)
        train(task, plan, tmp_path, settings={}, log=quiet)
        exact = task.loss(batch)[1]["exact"]
        if exact == 1.0:
            break
    assert exact == 1.0
    assert time.perf_counter() - start < 120


@pytest.mark.slow
def test_a_trained_model_is_an_ordinary_checkpoint(folder, tmp_path):
    """The engine and transformers load it and compute the same visual tokens as the trainer."""
    transformers = pytest.importorskip("transformers")
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    task = small_base(tmp_path)
    train(task, recipe(steps=2), tmp_path, settings={}, log=quiet)
    engine = load(tmp_path, device="cpu", dtype="float32")
    picture = render(0, 3, domain="scene", canvas=(168, 112))
    rows = collate(
        [Example(picture.image, (as_qa(picture.questions[0], False),))],
        engine.processor,
        probes=False,
    )
    answer = engine.prefill(engine.prompt(picture.image, picture.questions[0].text), "dense")
    task.module.to(torch.bfloat16).to(torch.float32)
    with torch.no_grad():
        visual, _ = task.module["vision"](rows.patches, rows.grids)
    torch.testing.assert_close(answer.visual, visual, rtol=1e-4, atol=1e-5)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    grid = torch.tensor([answer.batch.grids[0][0]])
    with torch.no_grad():
        theirs = model.model.visual(rows.patches, grid_thw=grid)
    theirs = getattr(theirs, "pooler_output", theirs)
    theirs = torch.cat(list(theirs)) if isinstance(theirs, list | tuple) else theirs
    torch.testing.assert_close(answer.visual, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_chat_template_is_the_engines(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    engine = load(folder, device="cpu", dtype="float32")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pad = "<|image_pad|>"
    image = render(0, 0, domain="scene", canvas=(112, 112)).image
    ids = tokenizer(text.replace(pad, pad * 16)).input_ids
    assert ids == engine.prompt(image, "What is it?").token_ids.tolist()


def test_words_are_tokens_and_names_are_spelled(folder):
    """Also in transformers; "red" is a token because it is a colour."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load(folder, device="cpu").processor.tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    words = {"What": 1, " is": 1, " the": 1, " value": 1, " red": 1, ".": 1}
    spelled = {" melon": 6, "milk": 4, " AB7": 4, "*melon*": 7, "é": 2}
    for text, count in (words | spelled).items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) == count, text
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text


def test_phrases_have_no_names():
    picture = render(3, 0, domain="document", canvas=(280, 280))
    said = " ".join(phrases(picture))
    names = {thing.name for thing in picture.things} - {"total"}
    assert any(name in " ".join(q.text for q in picture.questions) for name in names)
    assert not any(re.search(rf"\b{name}\b", said) for name in names)
    assert "What is the value of 7?" in said or "How much is the 7?" in said


@pytest.mark.slow
def test_rows_for_another_tokenizer(folder):
    """A known token keeps its row; a new word gets the mean of its letters."""
    now = load(folder, device="cpu").processor.tokenizer
    before = make_tokenizer(["a b"])
    old = torch.randn(before.get_vocab_size(), 3)
    rows = retokenized(old, before, now)
    assert rows.shape == (now.get_vocab_size(), 3)
    for token in ("q", "<|im_end|>"):
        assert torch.equal(rows[now.token_to_id(token)], old[before.token_to_id(token)])
    letters = [before.token_to_id(letter) for letter in ("Ġ", "r", "e", "d")]
    torch.testing.assert_close(rows[now.token_to_id("Ġred")], old[letters].mean(0))


def test_cell_targets():
    """A picture of two by two cells, with a red circle with a 7 on its right half."""
    thing = Thing((0.5, 0.0, 1.0, 1.0), "circle", "red", "", "7", ((0.6, 0.0, 0.9, 0.25),), ("7",))
    picture = type("Picture", (), {"things": (thing,)})
    wanted, weights = cell_targets(picture, (1, 4, 4), 2)
    assert wanted.shape == (4, 2, len(FIELDS))
    assert wanted[0].unique().tolist() == wanted[2].unique().tolist() == [0]
    thing = [1, 1, *[0] * NAME_LENGTH, 8, 0, 0, 0, 0, 0]
    assert (
        wanted[1, :, :FIRST_PRINTED].tolist()
        == wanted[3, :, :FIRST_PRINTED].tolist()
        == [thing, thing]
    )
    assert wanted[1, 0, FIRST_PRINTED:].tolist() == [8, 0, 0, 0, 0]
    assert not wanted[[1, 3, 3], [1, 0, 1], FIRST_PRINTED:].any()
    assert weights.tolist() == [
        [pytest.approx(0.3)] * 2,
        [5.0, 1.0],
        [pytest.approx(0.3)] * 2,
        [1.0, 1.0],
    ]


def printed(thing: Thing, height: int, width: int) -> list[list[list[str]]]:
    """The characters that the halves of cells have to predict, row by row."""
    picture = type("Picture", (), {"things": (thing,)})
    wanted = cell_targets(picture, (1, 2 * height, 2 * width), 2)[0][..., FIRST_PRINTED:]
    rows = wanted.view(height, width, 2, -1).transpose(1, 2).flatten(0, 1)
    return [
        ["".join(CHARACTERS[i - 1] for i in half if i) for half in row] for row in rows.tolist()
    ]


def test_characters_are_read_where_they_are_printed():
    """A character belongs to the cell of its middle and to halves that cover much of it."""
    boxes = ((0, 0, 0.5, 0.25), (0.5, 0.45, 1, 1))
    thing = Thing((0.0, 0.0, 1.0, 1.0), "row", "", "ab", "Z9", boxes, ("Ab:", "10.5"))
    assert printed(thing, 2, 4) == [
        ["A", "B", "", ""],
        ["", "", "", ""],
        ["", "", "10", ".5"],
        ["", "", "10", ".5"],
    ]


def test_characters_are_as_wide_as_they_are_printed():
    """Three narrow letters are in the first of two cells and a wide one is in the second."""
    thing = Thing((0.0, 0.0, 1.0, 1.0), "row", "", "", "9", ((0, 0, 1, 1),), ("iiiw",))
    assert printed(thing, 1, 2) == [["III", "W"]] * 2


def test_cells_of_a_named_thing():
    """A row of four cells, with the name on the first one and the value on the last one."""
    boxes = ((0, 0, 0.25, 1), (0.75, 0, 1, 1))
    thing = Thing((0.0, 0.0, 1.0, 1.0), "row", "", "ab", "9", boxes, ("ab:", "9"))
    picture = type("Picture", (), {"things": (thing,)})
    wanted = cell_targets(picture, (1, 2, 8), 2)[0][:, 0]
    name, value = wanted[:, 2 : 2 + NAME_LENGTH], wanted[:, 2 + NAME_LENGTH : FIRST_PRINTED]
    spelled, nine = [1, 2, 0, 0, 0, 0], [10, 0, 0, 0, 0, 0]
    assert wanted[:, 0].unique().tolist() == [8]
    assert name.tolist() == [spelled, [-100] * 6, [-100] * 6, spelled]
    assert value.tolist() == [[-100] * 6, [-100] * 6, [-100] * 6, nine]


def test_ignored_targets_have_no_gradient():
    head = CellHead(4)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    wanted = torch.full((3, 2, len(FIELDS)), -100)
    wanted[..., 0] = 2
    head(torch.randn(3, 4), wanted, torch.ones(3, 2))[0].backward()
    rows = head.linear.weight.grad.view(2, sum(FIELDS), 4).abs().sum((0, 2))
    assert bool((rows[: FIELDS[0]] > 0).all())
    assert not bool(rows[FIELDS[0] :].any())


@pytest.mark.parametrize(
    ("reply", "short", "right"),
    [
        ("The number is 7.", "7", True),
        ("The number is 17.", "7", False),
        ("It is 7.50.", "7", False),
        ("It is 4.50.", "4.50", True),
        ("It is 14.50.", "4.50", False),
        ("Yes, there is.", "yes", True),
        ("The blue square is.", "blue square", True),
        ("No.", "yes", False),
        ("K77", "K7", False),
        ("", "7", False),
    ],
)
def test_what_counts_as_right(reply, short, right):
    assert contains(reply, short) is right


@pytest.mark.slow
@pytest.mark.parametrize("name", CURRICULA)
def test_a_curriculum_can_be_drawn(name):
    """Every kind of picture of every stage has things and questions."""
    for stage in CURRICULA[name]:
        for draw in stage.draws:
            for canvas in draw.canvases:
                picture = render(
                    0,
                    1,
                    domain=draw.domain,
                    canvas=canvas,
                    num_things=draw.num_things,
                    size=draw.size,
                )
                assert picture.things
                assert picture.questions


def test_micro_batches_have_about_the_same_size():
    stage = CURRICULA["whole"][-1]
    for draw in stage.draws:
        for width, height in draw.canvases:
            each = width * height // 28**2 + 8 * stage.questions
            assert stage.work - each < stage.pictures((width, height)) * each <= stage.work


@pytest.mark.slow
def test_weights_of_kinds_of_pictures(folder):
    """Kinds of pictures are drawn by their weights; here a canvas identifies a kind."""
    sides = {112: 1, 140: 6, 168: 3}
    draws = [Draw("scene", ((side, 112),), (1, 1), weight=weight) for side, weight in sides.items()]
    stage = Stage(1, 40, 0, (1, 1), tuple(draws))
    task = BaseTask(folder, [stage], 300, 0, torch.device("cpu"), torch.float32)
    drawn = Counter(task.batch(micro).grids[0][2] * 14 for micro in range(300))
    for side, weight in sides.items():
        assert drawn[side] == pytest.approx(30 * weight, abs=25)


@pytest.mark.slow
def test_half_of_the_batches_have_a_gap_before_questions(folder):
    stage = Stage(1, 40, 1, (1, 1), (Draw("scene", ((112, 112),), (1, 1)),))
    task = BaseTask(folder, [stage], 60, 0, torch.device("cpu"), torch.float32)
    gaps = []
    for rows in (task.batch(micro).rows for micro in range(60)):
        split = rows.layout.branch_start
        gaps.append(int(rows.positions[:, split:].min() - rows.positions[:, :split].max()) - 1)
    assert 20 < gaps.count(0) < 40
    assert min(gaps) == 0
    assert 15 < max(gaps) <= base.GAP


@pytest.mark.slow
def test_a_base_run_of_some_domains(tmp_path):
    """Only these domains are drawn and evaluated, starting in the first stage with them."""
    write_folder(tmp_path, SHAPE, 0, pictures=40)
    options = ["--steps", "1", "--domains", "chart", "--dtype", "float32", "--device", "cpu"]
    assert main(["base", str(tmp_path), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    first = CURRICULA["whole"][1]
    charts = [draw for draw in first.draws if draw.domain == "chart"]
    assert lines[0]["samples"] in {first.pictures(canvas) for canvas in charts[0].canvases}
    assert set(lines[-1]["heldout"]) == {"chart", "chart brief"}


@pytest.mark.slow
def test_a_base_run_starts_from_another(tmp_path, capsys):
    """It takes over weights and tokenizer, and its new head has no gradient to the encoder."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_folder(first, SHAPE, 0, pictures=40)
    options = ["--steps", "1", "--domains", "scene", "--dtype", "float32", "--device", "cpu"]
    assert main(["base", str(first), *options, "--lr", "1e-3"]) == 0
    init = ["base", str(second), *options, "--init", str(first), "--curriculum", "late"]
    assert main([*init, "--lr", "0"]) == 0
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    begun = [json.loads((run / "log.jsonl").read_text().splitlines()[0]) for run in (first, second)]
    assert ["answer" in line for line in begun] == [False, True]
    (stage,) = CURRICULA["late"][:1]
    task = BaseTask(second, [stage], 1, 0, torch.device("cpu"), torch.float32, first)
    batch = task.batch(0)
    visual, _ = task.module["vision"](batch.patches, batch.grids)
    loss, _ = task.module["cell_head"](visual, *batch.targets)
    assert float(loss.detach()) > 1
    assert not torch.autograd.grad(loss, visual)[0].any()
    first.rename(tmp_path / "away")
    assert main([*init, "--lr", "0"]) == 0  # a resumed run does not need the initial checkpoint
    spelled = ["base", str(tmp_path / "spelled"), *options, "--retokenize"]
    assert main([*spelled, "--init", str(second), "--lr", "0"]) == 0
    config = read_config(tmp_path / "spelled" / "config.json")
    assert config.text_config.vocab_size == 384
    assert load(tmp_path / "spelled", device="cpu").decoder.embed_tokens.weight.shape[0] == 384
    assert main(spelled) == 2
    assert "--retokenize needs --init" in capsys.readouterr().err
    third = ["base", str(tmp_path / "third"), *options, "--init"]
    assert main([*third, str(tmp_path / "no")]) == 2
    assert "no is neither a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*third, str(tmp_path / "empty")]) == 1
    assert "empty is not a checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*init, "--shape", "config.json"])
    assert "not allowed with" in capsys.readouterr().err


def test_kinds_of_weight_0_are_not_drawn():
    questions = render(0, 0, domain="scene", canvas=(448, 448), num_things=(6, 6)).questions
    assert {"left", "above"} < {q.kind for q in questions}
    texts = {q.text: q.kind for q in questions}
    kinds = {texts[a.question] for a in draw_questions(questions, 60, random.Random(0), False)}
    assert kinds == {"number", "color", "shape", "exists", "count"}


@pytest.mark.slow
def test_some_answers_are_a_word_between_stars(folder):
    """A quarter of the answers to free-form prompts, and none of those to brief prompts."""
    stage = Stage(1, 1, 8, (1, 1), (Draw("scene", ((168, 168),), (2, 3)),))
    task = BaseTask(folder, [stage], 40, 0, torch.device("cpu"), torch.float32)
    decode = task.processor.tokenizer.decode
    stars = {False: [], True: []}
    for micro in range(40):
        rows = task.batch(micro).rows
        for ids in rows.token_ids[rows.layout.branch_start :].view(8, -1).tolist():
            text = decode(ids, skip_special_tokens=False)
            answer = text.split("assistant\n")[1]
            stars[BRIEF_SUFFIX in text].append(answer.startswith("*"))
            assert answer.count("*") == 2 * answer.startswith("*")
    assert not any(stars[True])
    assert len(stars[True]) > 40
    assert sum(stars[False]) / len(stars[False]) == pytest.approx(WORD_SHARE, abs=0.09)


def test_free_form_and_brief_prompts():
    question = render(0, 0, domain="scene").questions[0]
    free, brief = as_qa(question, False), as_qa(question, True)
    assert (free.question, free.answer) == (question.text, question.answer)
    assert (brief.question, brief.answer) == (question.text + BRIEF_SUFFIX, question.short)


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_files_of_both_layouts_are_the_same_data(tmp_path):
    picture = render(0, 0, domain="scene", canvas=(280, 140))
    picture.image.save(tmp_path / "a.png")
    box = picture.questions[0].boxes[0] if picture.questions[0].boxes else (0.1, 0.2, 0.3, 0.4)
    plain = [{"image": "a.png", "question": "q?", "answer": "It is 7.", "boxes": [box]}] * 20
    pixels = [box[0] * 280, box[1] * 140, box[2] * 280, box[3] * 140]
    cot = [
        {
            "image": "a.png",
            "question": "q?",
            "answer": "It is 7.",
            "width": 280,
            "height": 140,
            "bboxs": [pixels],
            "dataset": "d",
            "split": "train",
        }
    ] * 20
    write_rows(tmp_path / "plain.jsonl", [*plain, {**plain[0], "image": "gone.png"}])
    write_rows(tmp_path / "cot.jsonl", cot)
    one, two = (FileExamples(tmp_path / name, tmp_path, 0) for name in ("plain.jsonl", "cot.jsonl"))
    assert one.missing == [str(tmp_path / "gone.png")]
    assert (one.count, len(one.heldout())) == (18, 2)
    for a, b in zip(one.examples(3), two.examples(3), strict=True):
        assert a.qas[0].boxes[0] == pytest.approx(b.qas[0].boxes[0])
        assert a.image.tobytes() == b.image.tobytes()


def test_short_answers_are_to_the_same_questions():
    long, short = (WorldExamples(("scene",), 2, 3, 0, short=short) for short in (False, True))
    for a, b in zip(long.examples(4), short.examples(4), strict=True):
        assert a.image.tobytes() == b.image.tobytes()
        assert [x.question for x in a.qas] == [x.question for x in b.qas]
        assert [x.short for x in a.qas] == [x.answer for x in b.qas]
        assert a.qas != b.qas


@pytest.mark.slow
def test_brief_prompts_are_the_same_questions():
    free, some, brief = (WorldExamples(("scene",), 1, 3, 0, brief=share) for share in (0, 0.5, 1))
    forms = []
    for micro in range(12):
        (a,), (b,), (c,) = (source.examples(micro) for source in (free, some, brief))
        assert [x.question for x in c.qas] == [x.question + BRIEF_SUFFIX for x in a.qas]
        assert [x.answer for x in c.qas] == [x.short for x in a.qas]
        assert a.image.tobytes() == b.image.tobytes() == c.image.tobytes()
        forms.append((a.qas, c.qas).index(b.qas))
    assert 2 < sum(forms) < 10


def test_an_epoch_visits_every_row_once(tmp_path):
    render(0, 0, domain="scene", canvas=(112, 112)).image.save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": str(i), "answer": "7", "boxes": []} for i in range(30)]
    write_rows(tmp_path / "rows.jsonl", rows)
    file = FileExamples(tmp_path / "rows.jsonl", tmp_path, 0)
    orders = [
        [file.examples(epoch * 27 + i)[0].qas[0].question for i in range(27)] for epoch in range(2)
    ]
    assert sorted(orders[0], key=int) == sorted(orders[1], key=int) == [str(i) for i in range(27)]
    assert orders[0] != orders[1]
    assert {e.qas[0].question for e in file.heldout()} == {"27", "28", "29"}


BAD = {
    "no file": (None, ["--data", "gone.jsonl"], "there is no file gone.jsonl"),
    "no json": ("{", [], "line 1, is not JSON"),
    "no key": ('{"image": "a.png", "question": "q"}', [], "line 1, has no key"),
    "bad box": (
        '{"image": "a.png", "question": "q", "answer": "a", "boxes": [[1, 2]]}',
        [],
        "line 1",
    ),
    "no picture": (
        '{"image": "a.png", "question": "q", "answer": "a", "boxes": []}',
        [],
        "no usable questions; the first missing picture",
    ),
    "no domain": (None, ["--data", "world:zoo"], "unknown domain zoo"),
    "no end": (None, ["--data", "world"], "--steps is required"),
    "short": (None, ["--data", "a.jsonl", "--short"], "leave them out for a file"),
    "share": (None, ["--brief", "2"], "--brief: must be in [0, 1], got '2'"),
    "share of a file": (None, ["--data", "a.jsonl", "--brief", "1"], "leave them out for a file"),
    "token": (None, ["--data", "world", "--steps", "1", "--token", "7%"], "'7%' is 2"),
    "vectors": (
        None,
        ["--data", "world", "--steps", "1", "--le-layers", "1"],
        "le_layers (1,) must be different layers of the model, 0 among them",
    ),
    "layer": (
        None,
        ["--data", "world", "--steps", "1", "--layer", "9"],
        "--layer must be in [1, 6], got 9",
    ),
    "rule": (
        None,
        ["--data", "world", "--threshold", "2"],
        "--threshold: must be in [0, 1], got '2'",
    ),
    "rate": (
        None,
        ["--data", "world", "--token-rate", "-1"],
        "--token-rate: must be in [0, 1], got '-1'",
    ),
    "tap": (None, ["--data", "world", "--steps", "1", "--taps", "9"], "selected_visual_layers"),
    "dtype": (None, ["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(folder, tmp_path, capsys, name):
    content, options, message = BAD[name]
    if content is not None:
        (tmp_path / "data.jsonl").write_text(content + "\n")
        options = ["--data", str(tmp_path / "data.jsonl")]
    command = ["glimpse", str(tmp_path / "run"), "--model", str(folder), "--device", "cpu"]
    assert exit_code(main, [*command, *options]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nanoglimpse: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["glimpse", "run", "--imagine"], ["base", "run", "--imagine"]])
def test_an_unknown_option_is_one_line(capsys, command):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    error = capsys.readouterr().err
    assert error == "nanoglimpse: error: unrecognized arguments: --imagine (see --help)\n"


def test_domains():
    assert domains_of("world") == DOMAINS
    assert domains_of("world:scene,chart") == ("scene", "chart")


@pytest.mark.slow
def test_variants_are_ordinary_weights(folder, tmp_path):
    """The weights of every ablation load and prune."""
    for number, option in enumerate(
        [
            "--no-predictor",
            "--no-visual-condition",
            "--no-location-loss",
            "--no-lm-loss",
            "--log-softmax",
        ]
    ):
        run = tmp_path / str(number)
        options = ["--model", str(folder), "--device", "cpu", "--steps", "1", "--pictures", "1"]
        options += ["--questions", "1", "--size", "16", "--condition", "16", "--layer", "3"]
        options += ["--taps", "4", "2", "1", "--accumulate", "1", "--evaluate-every", "100"]
        assert main(["glimpse", str(run), *options, option]) == 0
        engine = load(folder, glimpse=run / "glimpse", device="cpu", dtype="float32")
        assert engine.glimpse.config.layers == 3
        assert engine.glimpse.config.use_attention_logits == (option != "--log-softmax")
        image = render(0, 0, domain="scene", canvas=(224, 224)).image
        answer = engine.ask(image, "What?", max_new_tokens=1)
        assert answer.importance.shape == (64,)
        if option == "--no-location-loss":
            assert int(answer.kept.sum()) == 7


@pytest.mark.slow
def test_a_glimpse_can_start_as_a_token(folder, tmp_path):
    """The first vector starts as the embedding, and the trained vectors are saved."""
    engine = load(folder, device="cpu", dtype="float32", backend=OPS)
    star = engine.processor.tokenizer.encode("*", add_special_tokens=False).ids
    task = glimpse_task(engine, config=glimpse_config(le_layers=(0,)), initial_token=star[0])
    vectors = task.token()
    assert vectors.shape == (TEXT["num_hidden_layers"], TEXT["hidden_size"])
    torch.testing.assert_close(vectors[0], engine.decoder.embed_tokens.weight[star[0]])
    assert not vectors[1:].any()
    assert glimpse_task(engine).token()[1:].any(1).all()

    run = tmp_path / "run"
    options = ["--model", str(folder), "--device", "cpu", "--steps", "2", "--pictures", "1"]
    options += ["--questions", "1", "--size", "16", "--condition", "16", "--lr", "0.1"]
    options += ["--token", "*", "--le-layers", "0", "--threshold", "0.2"]
    assert main(["glimpse", str(run), *options]) == 0
    trained = load(folder, glimpse=run / "glimpse", device="cpu", dtype="float32").glimpse
    assert (trained.config.le_layers, trained.config.reduce_threshold) == ((0,), 0.2)
    assert not trained.vectors[1:].any()
    assert 1e-3 < (trained.vectors[0] - vectors[0]).abs().max() < 10


@pytest.mark.slow
def test_the_glimpse_token_learns_at_its_own_rate(folder, tmp_path):
    """The first step of Adam changes every weight by the learning rate."""
    options = ["--model", str(folder), "--device", "cpu", "--steps", "1", "--pictures", "1"]
    options += ["--questions", "1", "--size", "16", "--condition", "16", "--accumulate", "1"]
    options += ["--schedule", "trapezoid", "--warmup", "0", "--decay", "1e-9", "--lr", "0.01"]
    moved = {}
    for lr, share in (("0", "1"), ("0.01", "1"), ("0.01", "0.1")):
        run = tmp_path / f"{lr} {share}"
        assert main(["glimpse", str(run), *options, "--lr", lr, "--token-rate", share]) == 0
        moved[lr, share] = read_tensors(run / "glimpse")[1]
    still = moved.pop(("0", "1"))
    for (_, share), tensors in moved.items():
        for name, own in (("le_proj.bias", float(share)), ("attn_fuser.attn_in_proj.bias", 1.0)):
            step = (tensors[name] - still[name]).abs()
            torch.testing.assert_close(step.max(), torch.tensor(0.01 * own), rtol=1e-3, atol=0)


def test_weights_fit_a_module_whose_names_are_known(engine):
    """The loader's table has the exporter's names."""
    task = glimpse_task(engine)
    module = nn.ModuleDict({"predictor": task.predictor})
    assert len(random_tensors(module)) == 2 + 2 * len(TAPS) + len(TAPS) * 12 + 2
