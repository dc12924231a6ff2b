"""Sessions: the same answers as without one, from pictures that have been read once."""

import errno
import io
import json
import os
import pty
import select
import signal
import sys
from dataclasses import replace
from itertools import zip_longest

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nanoglimpse import NanoglimpseError, Prompt, UsageError, files, load
from nanoglimpse import flops as cost
from nanoglimpse.cli import ask as generate
from nanoglimpse.cli import chat
from nanoglimpse.inference.session import Session
from nanoglimpse.inference.session_file import fingerprint
from nanoglimpse.kernels.backends import select as backend_ops
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.methods import METHODS
from nanoglimpse.methods.base import Needs, PruningMethod
from nanoglimpse.methods.context import Decision
from nanoglimpse.model.decoder import Block, run_layers
from nanoglimpse.model.rope import mrope
from tests.helpers.commands import exit_code
from tests.helpers.prompts import QUESTION, SCENE
from tests.helpers.prompts import SCENES as PICTURES
from tests.helpers.tiny import EOS, chat_ids, patches_of, write_checkpoint, write_glimpse

GRIDS = [(1, 8, 12), (1, 10, 6)]
HEAD, TAILS = 4, (5, 1, 9, 5, 30)
SCENES = [SCENE, next(path for path in PICTURES if path != SCENE)]
QUESTIONS = (QUESTION, "Which shape has the number 8?", "How many red shapes are there?")


def pictures(engine, grids=GRIDS, head=HEAD, seed=0):
    """What tiny prompts begin with."""
    ids = chat_ids(head, *grids, seed=seed)
    return Prompt.from_tokens(ids, patches_of(grids, seed), grids, config=engine.config)


def tail(number, count=None):
    """Token ids of the question of this number."""
    ids = chat_ids(TAILS[number % len(TAILS)] if count is None else count, seed=50 + number)
    return [*ids, EOS, 7, 8]


def whole(engine, ids, start=None):
    """The prompt that asks without a session."""
    return (start or pictures(engine)).then(Prompt.from_tokens(ids, config=engine.config))


def same(session_prefill, prefill, engine, steps=8):
    """Whether a session's prefill is the fresh one: what stays, where, and every token."""
    a, b = session_prefill, prefill
    assert torch.equal(a.kept, b.kept)
    assert torch.equal(a.positions, b.positions)
    assert a.budgets == b.budgets
    assert (a.cache.num_rows, a.cache.nbytes) == (b.cache.num_rows, b.cache.nbytes)
    for layer in range(engine.config.text_config.num_hidden_layers):
        for own, expected in zip(a.cache.layer(layer), b.cache.layer(layer), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-5)
    tokens = [list(engine.decode(one, steps, ignore_eos=True)) for one in (a, b)]
    assert tokens[0] == tokens[1]
    return True


def options(name):
    return {"method": name} | ({"max_ratio": 0.7} if METHODS[name].budget == "cap" else {})


REUSED = [name for name in METHODS if name not in ("cdpruner", "oracle")]


@pytest.mark.slow
@pytest.mark.parametrize("name", REUSED)
def test_every_method_answers_as_without_a_session(tiny, name):
    """In any order, questions of one row to thirty, a second time as the first."""
    session = tiny.session(pictures(tiny), **options(name))
    for number in (0, 1, 2, 0, 4):
        fresh = tiny.prefill(whole(tiny, tail(number)), **options(name))
        assert same(session.prefill(tail(number)), fresh, tiny)
        assert int(fresh.kept.sum()) > 0 or name in ("nothing", "vtw")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glimpse", "pdrop", "vscan", "divprune"])
def test_rows_may_stay_in_the_layers_that_have_run(tiny, name):
    told = options(name) | {"kv_drop": "later"}
    session = tiny.session(pictures(tiny), **told)
    for number in (0, 1):
        fresh = tiny.prefill(whole(tiny, tail(number)), **told)
        assert same(session.prefill(tail(number)), fresh, tiny)


def test_the_question_decides_what_stays(tiny):
    """Otherwise equal masks above would say nothing."""
    session = tiny.session(pictures(tiny))
    kept = [session.prefill(tail(number)).kept for number in range(4)]
    assert len({tuple(mask.tolist()) for mask in kept}) > 1


def test_importance_logits_and_the_traced_state_are_the_same(tiny):
    session = tiny.session(pictures(tiny))
    a = session.prefill(tail(2), trace=True)
    b = tiny.prefill(whole(tiny, tail(2)), trace=True)
    for name in ("visual", "taps", "glimpse_logits", "importance", "hidden"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-5)


def test_evidence_is_given_with_the_question(tiny):
    session, prompt = tiny.session(pictures(tiny), "oracle"), whole(tiny, tail(0))
    for mask in torch.rand(2, int(prompt.visual.sum())) > 0.5:
        fresh = tiny.prefill(prompt, "oracle", evidence=[mask])
        assert same(session.prefill(tail(0), evidence=mask), fresh, tiny)
        assert torch.equal(fresh.kept, mask)
    with pytest.raises(UsageError, match="needs the evidence"):
        session.prefill(tail(0))


def test_a_session_without_pictures(tiny):
    start = Prompt.from_tokens(chat_ids(3), config=tiny.config)
    session = tiny.session(start)
    for number in (0, 1):
        fresh = tiny.prefill(whole(tiny, tail(number), start))
        assert same(session.prefill(tail(number)), fresh, tiny)


@pytest.mark.slow
def test_the_kernels_read_behind_a_prefix(tiny, monkeypatch):
    """Rows written to the cache's room, and queries fewer than keys, in a layer's launches."""
    pytest.importorskip("triton")
    prefix, count = tiny.session(pictures(tiny, [(1, 4, 4)])).prefix, 3
    hidden, position = torch.randn(count, 48), prefix.batch.next_position
    rope = mrope(position + torch.arange(count).expand(3, -1), tiny.config.text_config)
    made = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(tiny.decoder.layers[0], "ops", backend_ops(backend, tiny.device))
        cache = prefix.writable(position, count)
        first = cache.lengths[0]
        kv, segments = cache.reserve([count]), Segments(cache.lengths)
        queries = Queries(Segments([count]), torch.arange(first, first + count))
        place = (rope, kv, segments, range(1))
        with torch.inference_mode():
            out, _ = run_layers(tiny.decoder, hidden, *place, queries=queries)
            made.append((out, cache.layer(0)[0].clone(), cache.layer(0)[1].clone()))
    for own, expected in zip(*made, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_pictures_are_read_once(tiny, monkeypatch):
    """By the vision encoder and by the layers below K; a question brings its own rows."""
    rows, seen = [], []
    forward, vision = Block.forward, tiny.vision.forward
    below = {id(block) for block in tiny.decoder.layers[: tiny.glimpse.config.layers]}

    def counted(self, x, *a):
        if id(self) in below:
            rows.append(len(x))
        return forward(self, x, *a)

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(
        type(tiny.vision), "__call__", lambda self, *a: seen.append(1) or vision(*a)
    )
    session = tiny.session(pictures(tiny))
    layers, start = tiny.glimpse.config.layers, len(pictures(tiny))
    assert (rows, len(seen)) == ([start] * layers, 1)
    for number in (0, 2):
        rows.clear()
        session.prefill(tail(number))
        assert rows == [len(tail(number)) + 1] * layers  # and the glimpse
    assert len(seen) == 1


def test_what_the_predictor_makes_of_a_picture_is_made_once(tiny):
    """Until another picture comes; the bytes of the session have it."""
    made, session = [], tiny.session(pictures(tiny))
    linear = tiny.glimpse.predictor.cond_in_projs[0]
    hook = linear.register_forward_hook(lambda *_: made.append(1))
    try:
        before = session.bytes
        for number in (0, 1, 2):
            session.prefill(tail(number))
        assert len(made) == 1
        held = sum(tensor.nbytes for tensor in session.vision.conditions[tiny.glimpse.predictor])
        assert session.bytes == before + held > before
        session.add(pictures(tiny, [(1, 6, 6)], head=1))
        session.prefill(tail(0))
        assert len(made) == 2
    finally:
        hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glimpse", "dense", "divprune"])
def test_questions_leave_the_prefix_as_it_is(tiny, name):
    session = tiny.session(pictures(tiny), **options(name))
    prefix = session.prefix
    rows = slice(prefix.num_rows)
    before = prefix.cache.k[:, rows].clone(), prefix.cache.v[:, rows].clone(), prefix.hidden.clone()
    prefills = [session.prefill(tail(number)) for number in range(3)]
    for prefill in prefills:
        list(tiny.decode(prefill, 4, ignore_eos=True))
    after = prefix.cache.k[:, rows], prefix.cache.v[:, rows], prefix.hidden
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glimpse", "dense"])
def test_a_question_longer_than_the_room_behind_the_prefix(tiny, name):
    session = tiny.session(pictures(tiny), name)
    for count in (3, 400, 3, 500):
        fresh = tiny.prefill(whole(tiny, tail(count, count)), name)
        assert same(session.prefill(tail(count, count)), fresh, tiny, steps=3)


class Biased(PruningMethod):
    """Reads before the decoder what it is given a function for."""

    name, about, budget = "biased", "test", "adaptive"

    def __init__(self, read, question=False):
        self.read, self.question = read, question

    def layers(self, model):
        return (0,)

    def needs(self, model):
        return Needs(hidden=True, question=self.question)

    def choose(self, context):
        self.read(context)
        kept = ~context.prunable
        kept[::2] = True
        return Decision(kept, context.visual[:, 0])


OF_THE_QUESTION = {
    "question": lambda context: context.question(0),
    "hidden": lambda context: context.hidden.norm(dim=-1),
    "query rows": lambda context: context.query_rows == 3,
    "ids": lambda context: context.batch.token_ids.tolist(),
    "counts": lambda context: sum(context.batch.counts),
    "positions": lambda context: context.batch.positions + 1,
    "evidence": lambda context: context.evidence,
}


@pytest.mark.slow
@pytest.mark.parametrize("read", OF_THE_QUESTION.values(), ids=OF_THE_QUESTION)
def test_a_choice_by_the_question_before_the_decoder_is_refused(tiny, read):
    """Whatever it reads and whoever wrote the method: it must say so, and then has no session."""
    for run in (tiny.session, lambda *a: tiny.prefill(whole(tiny, tail(0)), a[1])):
        with pytest.raises(UsageError, match="needs say question=True") as error:
            run(pictures(tiny), Biased(read))
        assert "\n" not in str(error.value)
    said = Biased(read, question=True)
    assert int(tiny.prefill(whole(tiny, tail(0)), said).kept.sum()) > 0
    with pytest.raises(UsageError, match="method biased looks at the question") as error:
        tiny.session(pictures(tiny), said)
    assert "\n" not in str(error.value)


def test_a_method_of_ones_own_is_reused(tiny, tmp_path):
    method = Biased(lambda context: context.visual.norm())
    session = tiny.session(pictures(tiny), method)
    fresh = tiny.prefill(whole(tiny, tail(0)), method)
    prefill = session.prefill(tail(0))
    assert same(prefill, fresh, tiny)
    assert torch.equal(prefill.importance, fresh.importance)
    with pytest.raises(UsageError, match="a session with method biased cannot be saved"):
        session.save(tmp_path / "session")
    assert list(tmp_path.iterdir()) == []


class Inward(PruningMethod):
    """Reads a layer for a row of the pictures, not of the question."""

    name, about, budget = "inward", "test", "adaptive"

    def layers(self, model):
        return (3,)

    def needs(self, model):
        return Needs(attention=(1,))

    def choose(self, look):
        logits = look.layers[1].logits(look.batch.visual_rows[-1:])[look.batch.visual_rows]
        return Decision(logits.mean(1) > logits.mean(), logits.mean(1))


def test_a_method_may_read_rows_of_the_prefix(tiny):
    session = tiny.session(pictures(tiny), Inward())
    prefill, fresh = session.prefill(tail(0)), tiny.prefill(whole(tiny, tail(0)), Inward())
    assert same(prefill, fresh, tiny)
    torch.testing.assert_close(prefill.importance, fresh.importance, rtol=1e-4, atol=1e-5)


def test_cdpruner_is_refused(tiny):
    with pytest.raises(UsageError, match="method cdpruner looks at the question"):
        tiny.session(pictures(tiny), "cdpruner", max_ratio=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glimpse", "dense", "vscan", "divprune", "sparsevlm"])
def test_pictures_are_added(tiny, name):
    """As if they had been there; the layers read the new ones alone, but for a new choice."""
    session = tiny.session(pictures(tiny), **options(name))
    session.prefill(tail(1))
    start = pictures(tiny)
    for seed, grid in ((3, (1, 6, 8)), (4, (1, 4, 4))):
        more = pictures(tiny, [grid], head=0, seed=seed)
        session.add(more)
        start = start.then(more)
        for number in (0, 2):
            fresh = tiny.prefill(whole(tiny, tail(number), start), **options(name))
            assert same(session.prefill(tail(number)), fresh, tiny)


def test_adding_reads_the_new_rows_alone(tiny, monkeypatch):
    session = tiny.session(pictures(tiny))
    rows, forward = [], Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, x, *a: rows.append(len(x)) or forward(self, x, *a)
    )
    more = pictures(tiny, [(1, 6, 8)], head=0, seed=3)
    session.add(more)
    assert rows == [len(more)] * tiny.glimpse.config.layers


@pytest.mark.slow
def test_sessions_and_questions_do_not_mix(tiny):
    """Answers of two sessions and of none, token by token in turn."""
    starts = [pictures(tiny, seed=seed) for seed in (1, 2)]
    sessions = [tiny.session(start, name) for start in starts for name in ("glimpse", "dense")]
    alone, running = [], []
    for start in starts:
        for name in ("glimpse", "dense"):
            for number in (0, 2):
                fresh = tiny.prefill(whole(tiny, tail(number), start), name)
                alone.append(list(tiny.decode(fresh, 10, ignore_eos=True)))
    for session in sessions:
        running += [session.prefill(tail(number)) for number in (0, 2)]
    streams = [tiny.decode(prefill, 10, ignore_eos=True) for prefill in running]
    said = list(zip(*zip_longest(*streams), strict=True))
    assert [list(tokens) for tokens in said] == alone


def failing(engine, monkeypatch, after):
    """Makes attention of the decoder fail for want of memory when called so often."""
    calls = iter(range(10**6))

    def attention(*args, **kwargs):
        if next(calls) >= after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return TORCH.attention(*args, **kwargs)

    for block in engine.decoder.layers:
        monkeypatch.setattr(block, "ops", replace(block.ops, attention=attention))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glimpse", "dense"])
@pytest.mark.parametrize("after", [0, 2])
def test_running_out_of_memory_spoils_nothing(tiny, name, after):
    """While a session begins, while it is asked, while it is added to."""
    session, more = tiny.session(pictures(tiny), name), pictures(tiny, [(1, 6, 8)], 0, seed=3)
    for attempt in (
        lambda: tiny.session(pictures(tiny), name),
        lambda: session.prefill(tail(4)),
        lambda: session.add(more),
    ):
        with pytest.MonkeyPatch.context() as patch:
            failing(tiny, patch, after)
            with pytest.raises(torch.OutOfMemoryError):
                attempt()
        fresh = tiny.prefill(whole(tiny, tail(0)), name)
        assert same(session.prefill(tail(0)), fresh, tiny)


def test_what_is_refused(tiny):
    session = tiny.session(pictures(tiny))
    with pytest.raises(UsageError, match="must be text"):
        session.prefill(pictures(tiny, [(1, 4, 4)]))
    with pytest.raises(UsageError, match="4 placeholders"):
        session.prefill(chat_ids((1, 4, 4), 3))
    with pytest.raises(UsageError, match="exceed the context of 2000"):
        session.prefill(tail(0, 1900))
    with pytest.raises(UsageError, match="exceed the context of 2000"):
        tiny.session(pictures(tiny, head=2000))
    with pytest.raises(UsageError, match="exceed the context of 2000"):
        session.add(pictures(tiny, head=1950))
    with pytest.raises(UsageError, match="kv_drop must be one of"):
        tiny.session(pictures(tiny), kv_drop="never")
    with pytest.raises(UsageError, match="no tokenizer"):
        session.ask("What?")
    fresh = tiny.prefill(whole(tiny, tail(0)))
    assert same(session.prefill(tail(0)), fresh, tiny)


def test_bytes_are_those_of_what_is_held(tiny):
    """Keys and values of K layers, and two states of every row; no pixels."""
    session = tiny.session(pictures(tiny))
    rows, visual = len(pictures(tiny)), sum(h * w for _, h, w in GRIDS) // 4
    cache = 2 * 4 * (rows + 256) * 2 * 8 * 4
    states, seen = 2 * rows * 48 * 4, visual * (48 + 3 * 24) * 4
    assert session.bytes == cache + states + seen + rows * (1 + 3) * 8
    assert session.prompt.patches.nbytes == 0
    assert tiny.session(pictures(tiny), "dense").bytes > session.bytes - states


def test_flops_of_a_session_are_those_of_a_prompt(tiny):
    """Dense, prefix and question together take what the prompt does; pruned, the rest less."""
    text, session = tiny.config.text_config, tiny.session(pictures(tiny), "dense")
    rows = cost.RowCounts.of(session.prefill(tail(2)))
    prefix, question = cost.session_prefix(session), cost.session_question(session, rows)
    assert cost.decoder(text, prefix + question) == cost.decoder(text, rows.prefill())
    pruned = tiny.session(pictures(tiny))
    rows = cost.RowCounts.of(pruned.prefill(tail(2)))
    question = cost.session_question(pruned, rows)
    assert cost.session_prefix(pruned) == prefix[:4]
    before, new = len(pictures(tiny)), len(tail(2)) + 1  # a glimpse behind them
    shared = (new, new, new * before + new * (new + 1) // 2, before)
    assert question == [shared] * 4 + rows.prefill()[4:]
    assert cost.decoder(text, question) < cost.decoder(text, rows.prefill())


# ---- files


def told(name):
    return options(name) | {"seed": 3, "threshold": 0.4}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glimpse", "dense", "vscan", "prumerge", "sparsevlm", "random"])
def test_a_saved_session_answers_the_same(tiny, tiny_folder, tmp_path, name):
    """On another engine of the same weights, whose backend lays some of them out otherwise."""
    path = tmp_path / "new" / "folder" / "s.safetensors"
    session = tiny.session(pictures(tiny), **told(name))
    session.prefill(tail(1))
    session.save(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    other = load(tiny_folder, dtype="float32", device="cpu", backend="torch")
    again = other.load_session(path)
    assert (again.pruning, again.data.seed) == (session.pruning, 3)
    for number in (0, 4):
        assert same(again.prefill(tail(number)), session.prefill(tail(number)), tiny)
    more = pictures(tiny, [(1, 6, 8)], head=0, seed=3)
    session.add(more)
    again.add(more)
    assert same(again.prefill(tail(0)), session.prefill(tail(0)), tiny)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "s.safetensors"
    tiny.session(pictures(tiny)).save(path)
    return path


def rewritten(saved, path, change, **metadata):
    """The saved session with its tensors changed."""
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = file.metadata()
    change(tensors)
    save_file(tensors, path, known | metadata)


@pytest.mark.slow
def test_a_session_is_refused_by_other_weights(saved, tmp_path):
    """Of model or glimpse, even if a single matrix of the vision encoder differs."""
    folder = tmp_path / "model"
    write_checkpoint(folder, seed=5)
    write_glimpse(folder / "glimpse", folder)
    with pytest.raises(NanoglimpseError, match="other weights") as error:
        load(folder, dtype="float32").load_session(saved)
    assert "\n" not in str(error.value)
    write_checkpoint(folder)
    assert load(folder, dtype="float32").load_session(saved)
    write_glimpse(folder / "glimpse", folder, seed=6)
    with pytest.raises(NanoglimpseError, match="other weights"):
        load(folder, dtype="float32").load_session(saved)
    with pytest.raises(NanoglimpseError, match=r"made in float32, .* loaded in bfloat16"):
        load(folder, dtype="bfloat16").load_session(saved)
    write_glimpse(folder / "glimpse", folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["visual.blocks.3.attn.qkv.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NanoglimpseError, match="other weights"):
        load(folder, dtype="float32").load_session(saved)


@pytest.mark.slow
def test_the_fingerprint_does_not_depend_on_the_backend(tiny, tiny_folder):
    assert fingerprint(load(tiny_folder, dtype="float32", backend="torch").model) == fingerprint(
        tiny.model
    )


BROKEN = {
    "cut": lambda saved, path: path.write_bytes(saved.read_bytes()[:5000]),
    "text": lambda saved, path: path.write_text("no session"),
    "empty": lambda saved, path: path.write_bytes(b""),
    "missing tensor": lambda saved, path: rewritten(saved, path, lambda t: t.pop("taps")),
    "missing keys": lambda saved, path: rewritten(saved, path, lambda t: t.pop("kept")),
    "another tensor": lambda saved, path: rewritten(
        saved, path, lambda t: t.update(more=torch.ones(1))
    ),
    "shape": lambda saved, path: rewritten(
        saved, path, lambda t: t.update(hidden=t["hidden"][:-1].clone())
    ),
    "ids": lambda saved, path: rewritten(saved, path, lambda t: t["token_ids"].add_(99)),
    "told": lambda saved, path: rewritten(saved, path, lambda t: None, told="{"),
    "another file": lambda saved, path: save_file({"x": torch.ones(1)}, path),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_line(tiny, saved, tmp_path, case):
    path = tmp_path / "s.safetensors"
    BROKEN[case](saved, path)
    with pytest.raises(NanoglimpseError, match="not a session") as error:
        tiny.load_session(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tiny, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="there is no session"):
            tiny.load_session(path)


def test_a_full_disk_leaves_the_old_file(tiny, saved, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"old")

    def fail(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", fail)
    with pytest.raises(NanoglimpseError, match="No space left"):
        tiny.session(pictures(tiny)).save(path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


# ---- conversations, on the embedded checkpoint


def template(*turns, picture="", system="You are a helpful assistant."):
    """Qwen's chat template, user and assistant by turns."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for number, turn in enumerate(turns):
        role = ("user", "assistant")[number % 2]
        text += f"<|im_start|>{role}\n{picture if not number else ''}{turn}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def test_a_conversation_has_the_chat_layout(nano):
    pads = "<|vision_start|>" + "<|image_pad|>" * 64 + "<|vision_end|>"
    prompt = nano.prompt(SCENES[1], "\nIs it?", history=[("What?", "A <b>."), ("Why?", "\nSo.")])
    expected = template("What?", "A <b>.", "Why?", "\nSo.", "\nIs it?", picture=pads)
    tokenizer = nano.processor.tokenizer
    tokenizer.encode_special_tokens = False
    try:
        assert prompt.token_ids.tolist() == tokenizer.encode(expected).ids
    finally:
        tokenizer.encode_special_tokens = True


@pytest.mark.slow
def test_a_question_about_pictures_equals_a_fresh_one(nano):
    """Several pictures, a system prompt, limits of their size."""
    layout = {"system": "Answer.", "max_pixels": 50176}
    session = nano.session(SCENES, **layout)
    for question in (*QUESTIONS, QUESTIONS[0]):
        fresh = nano.ask(SCENES, question, prompt_options=layout)
        answer = session.ask(question)
        assert answer.token_ids == fresh.token_ids
        assert torch.equal(answer.kept, fresh.kept)
        assert answer.grids == fresh.grids
        assert answer.stats.kv_bytes == fresh.stats.kv_bytes
    assert session.turns == []
    assert "".join(session.stream(QUESTIONS[0])) == session.ask(QUESTIONS[0]).text


@pytest.mark.slow
def test_text_before_a_question_is_encoded_with_it_where_there_is_no_picture(nano):
    session = nano.session([])
    for question in ("\n\nWhat is red?", "What is red?"):
        assert session.ask(question).token_ids == nano.ask([], question).token_ids
    session.add(SCENES[1])
    assert session.ask("Is it?").token_ids == nano.ask(SCENES[1], "Is it?").token_ids


@pytest.mark.slow
@pytest.mark.parametrize("method", ["glimpse", "dense", "sparsevlm"])
def test_a_conversation_equals_fresh_prompts(nano, method):
    """Every turn sees all earlier ones, and chooses anew among all visual tokens."""
    rule = options(method)
    session, history, found = nano.session(SCENES[1], **rule), [], []
    for number, question in enumerate(QUESTIONS):
        layout = {"history": list(history)}
        pictures = SCENES[1:]
        if number == 2:
            session.add(SCENES[0])
            pictures = [SCENES[1], SCENES[0]]
        fresh = nano.ask(pictures, question, prompt_options=layout, **rule)
        answer = session.chat(question)
        assert answer.token_ids == fresh.token_ids
        assert torch.equal(answer.kept, fresh.kept)
        history.append((question, answer.text))
        found.append(answer.importance)
        assert session.turns == history
    if method == "glimpse":
        assert len(found[2]) == len(found[1]) + 256
        assert float((found[0] - found[1]).abs().max()) > 0.1
    session.reset()
    assert session.turns == []
    alone = nano.ask([SCENES[1], SCENES[0]], QUESTIONS[0], **rule)
    assert session.chat(QUESTIONS[0]).token_ids == alone.token_ids


def test_methods_that_rate_by_the_question_rate_by_the_last_one(nano):
    """Not by the first of the conversation, which stands behind the pictures."""
    prompt = nano.prompt(SCENES[1], "Why is it?", history=[("What?", "That.")])
    asked = []

    class Spy(Biased):
        def choose(self, context):
            asked.extend(context.batch.token_ids[context.question(0)].tolist())
            return super().choose(context)

    nano.prefill(prompt, Spy(lambda context: None, question=True))
    text = nano.processor.decode(asked)
    assert text.endswith("Why is it?")
    assert "What" not in text
    assert "That" not in text


@pytest.mark.slow
def test_a_stopped_answer_enters_the_conversation_as_far_as_it_went(nano):
    session = nano.session(SCENES[0])
    stream = session.stream(QUESTIONS[0], follow_up=True)
    assert session.turns == []
    said = next(iter(stream))
    assert session.turns == [(QUESTIONS[0], said)]
    answer = session.chat(QUESTIONS[1])
    layout = {"history": [(QUESTIONS[0], said)]}
    assert answer.token_ids == nano.ask(SCENES[0], QUESTIONS[1], prompt_options=layout).token_ids


@pytest.mark.slow
def test_a_question_that_fails_is_no_turn(nano):
    session = nano.session(SCENES[1])
    session.chat(QUESTIONS[0])
    before = session.turns
    with pytest.raises(UsageError):
        session.chat("word " * 5000)
    with pytest.raises(UsageError, match="must be text"):
        session.chat([SCENES[0]])
    with pytest.raises(UsageError, match="no picture"):
        session.add("nope.png")
    assert session.turns == before


@pytest.mark.slow
def test_a_saved_conversation_goes_on(nano, tmp_path):
    session = nano.session(SCENES[1], system="Answer.")
    session.chat(QUESTIONS[0])
    session.save(tmp_path / "s.safetensors")
    again = nano.load_session(tmp_path / "s.safetensors")
    assert again.turns == session.turns
    assert again.chat(QUESTIONS[1]).token_ids == session.chat(QUESTIONS[1]).token_ids
    session.reset()
    session.add(SCENES[0])
    again.reset()
    again.add(SCENES[0])
    fresh = nano.ask([SCENES[1], SCENES[0]], QUESTIONS[0], prompt_options={"system": "Answer."})
    for one in (session, again):
        assert one.ask(QUESTIONS[0]).token_ids == fresh.token_ids


# ---- the command line


def talk(text, *arguments, monkeypatch, capsys):
    """Exit code, stdout and stderr of a chat whose lines come through a pipe."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    code = exit_code(generate.main, ["--chat", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.slow
def test_a_pipe_of_questions(nano, monkeypatch, capsys):
    """Answers alone on stdout, a line each; what was kept on stderr."""
    lines = "\n".join(("/alone", *QUESTIONS[:2], "", QUESTIONS[0]))
    code, out, err = talk(lines, "--image", SCENES[0], monkeypatch=monkeypatch, capsys=capsys)
    answers = [nano.ask(SCENES[0], question) for question in QUESTIONS[:2]]
    assert (code, out) == (0, "".join(f"{answers[i].text}\n" for i in (0, 1, 0)))
    kept = [line.split()[1] for line in err.splitlines() if line.startswith("kept")]
    assert kept == [str(int(answers[i].kept.sum())) for i in (0, 1, 0)]
    drawn = [line.strip() for line in err.splitlines() if line.strip()[:1] >= "\u2800"]
    assert drawn == [line for i in (0, 1, 0) for line in chat.cells(answers[i].kept.view(16, 16))]


@pytest.mark.slow
def test_a_conversation_and_its_commands(nano, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "my overlay.png"
    lines = [QUESTIONS[0], f"/image {SCENES[1]}", QUESTIONS[1], f"/overlay {picture}", "/stats"]
    lines += ["/reset", QUESTIONS[1], "/help"]
    code, out, err = talk(
        "\n".join(lines), "--image", SCENES[0], monkeypatch=monkeypatch, capsys=capsys
    )
    session = nano.session(SCENES[0])
    said = [session.chat(QUESTIONS[0]).text]
    session.add(SCENES[1])
    said.append(session.chat(QUESTIONS[1]).text)
    session.reset()
    said.append(session.chat(QUESTIONS[1]).text)
    assert (code, out) == (0, "\n".join(said) + "\n")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "64 visual tokens" in err
    assert "2 pictures, 2 turns" in err
    assert "budgets" in err
    commands = ("/overlay", "/image", "/save", "/alone", "/reset", "/stats")
    assert all(command in err for command in commands)


@pytest.mark.slow
def test_a_chat_is_saved(nano, tmp_path, monkeypatch, capsys):
    """With what has been said, over what stood there; it goes on where it was."""
    path = tmp_path / "my chat.safetensors"
    path.write_bytes(b"older")
    lines = [QUESTIONS[0], f"/save {path}", QUESTIONS[1]]
    code, out, err = talk(
        "\n".join(lines), "--image", SCENES[1], monkeypatch=monkeypatch, capsys=capsys
    )
    said = out.splitlines()
    assert (code, len(said)) == (0, 2)
    assert f"session     {path}, {path.stat().st_size / 1e6:.2f} MB" in err
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    session = nano.load_session(path)
    assert session.turns == [(QUESTIONS[0], said[0])]
    assert session.chat(QUESTIONS[1]).text == said[1]


@pytest.mark.slow
def test_a_saved_session_is_opened(nano, tmp_path, monkeypatch, capsys):
    """One question by itself, and the conversation from where it was."""
    path = tmp_path / "scene.session"
    session = nano.session(SCENES[1])
    session.chat(QUESTIONS[0])
    session.save(path)
    assert generate.main(["--session", str(path), QUESTIONS[1]]) == 0
    out, err = capsys.readouterr()
    assert out == nano.ask(SCENES[1], QUESTIONS[1]).text + "\n"
    assert "budgets" in err
    lines = [QUESTIONS[1], f"/overlay {tmp_path}/o.png", f"/image {SCENES[0]}"]
    code, out, err = talk(
        "\n".join(lines), "--session", path, "--json", monkeypatch=monkeypatch, capsys=capsys
    )
    answer = json.loads(out)
    assert answer["answer"] == session.chat(QUESTIONS[1]).text
    assert answer["images"] == [None]
    assert code == 2
    assert "error: a saved session has no pixels for an overlay" in err
    assert f"picture     {SCENES[0]}" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", str(SCENES[0])], "--image cannot be combined with --session"),
        (["--max-ratio", "0.1"], "--max-ratio cannot be combined with --session"),
        (["--keep-videos"], "--keep-videos cannot be combined with --session"),
        (["--method", "fastv"], "--method cannot be combined with --session"),
        (["--system", "x"], "--system cannot be combined with --session"),
        (["--batch-file", "x.jsonl"], "--overlay, --chat or --session"),
    ],
)
def test_a_saved_session_is_as_it_was_made(options, message, capsys):
    assert generate.main(["--session", "none", "What?", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_saved_session_is_asked_something(capsys):
    assert generate.main(["--session", "none"]) == 2
    assert "--session needs a question" in capsys.readouterr().err
    assert generate.main(["--session", "none", "What?", "--quiet"]) == 2
    assert "there is no session none" in capsys.readouterr().err


@pytest.mark.slow
def test_errors_are_a_line_and_the_chat_goes_on(nano, tmp_path, monkeypatch, capsys):
    lines = ["/overlay x.png", "/image nope.png", "/image", "/nonsense", "/overlay"]
    lines += ["/save", f"/save {tmp_path}", f"/save {tmp_path}/none/chat"]
    lines += [
        "/save " + "x" * 300,
        "/image a\0b",
        "/overlay " + "a/" * 3000,
        "/image ~no-such-user/x.png",
    ]
    lines += ["word " * 5000, QUESTIONS[0], f"/overlay {tmp_path}"]
    code, out, err = talk(
        "\n".join(lines).encode() + b"\nbad \xff\n",
        *("--image", SCENES[0], "--quiet"),
        monkeypatch=monkeypatch,
        capsys=capsys,
    )
    assert (code, out) == (2, nano.ask(SCENES[0], QUESTIONS[0]).text + "\n")
    words = [
        "needs an answer",
        "no picture nope.png",
        "/image needs",
        "unknown command '/nonsense'",
    ]
    words += ["/overlay needs", "/save needs", "session cannot be written", "there is no folder"]
    words += ["/save: the file must have a name", "/image: the file", "/overlay: the file"]
    words += ["no picture ~no-such-user"]
    words += ["exceed the context", "is a folder", "not valid Unicode"]
    errors = err.splitlines()
    assert len(errors) == len(words)
    for line, word in zip(errors, words, strict=True):
        assert line.startswith("error: ")
        assert word in line


@pytest.mark.slow
@pytest.mark.parametrize("end", ["/quit", " /exit "])
def test_an_unknown_command_does_not_end_the_chat_and_quit_does(end, nano, monkeypatch, capsys):
    lines = f"/\x1b[2J {SCENES[0]}\n/hlep\n{QUESTIONS[0]}\n{end}\n{QUESTIONS[1]}\n/image none\n"
    code, out, err = talk(
        lines.encode(), *("--image", SCENES[0], "--quiet"), monkeypatch=monkeypatch, capsys=capsys
    )
    assert (code, out) == (0, nano.ask(SCENES[0], QUESTIONS[0]).text + "\n")
    first, second = err.splitlines()
    assert first.startswith(r"error: unknown command '/\x1b[2J'")
    assert second.startswith("error: unknown command '/hlep'")


@pytest.mark.slow
def test_no_memory_for_a_question_is_a_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 GB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "prefill", fail)
        code, out, err = talk("What?\nWhy?", "--quiet", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out, err.count("error: not enough memory")) == (1, "", 2)


@pytest.mark.slow
def test_json_is_an_object_a_line(nano, monkeypatch, capsys):
    arguments = ("--image", SCENES[0], "--json", "--max-ratio", 0.05)
    _, out, _ = talk("\n".join(QUESTIONS[:2]), *arguments, monkeypatch=monkeypatch, capsys=capsys)
    first, second = map(json.loads, out.splitlines())
    assert (first["question"], second["question"]) == QUESTIONS[:2]
    assert first["images"] == [str(SCENES[0])]
    assert first["kept_tokens"] <= int(0.05 * 256)
    assert first["answer"] == nano.ask(SCENES[0], QUESTIONS[0], max_ratio=0.05).text


@pytest.mark.slow
def test_a_first_question_and_misuse(nano, monkeypatch, capsys):
    patched = {"monkeypatch": monkeypatch, "capsys": capsys}
    code, out, _ = talk("", QUESTIONS[0], "--image", SCENES[0], **patched)
    assert (code, out) == (0, nano.ask(SCENES[0], QUESTIONS[0]).text + "\n")
    code, out, err = talk("x", "--overlay", "o.png", "--quiet", **patched)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "/overlay FILE" in err
    code, _, err = talk("x", "--method", "cdpruner", "--max-ratio", 0.5, "--quiet", **patched)
    assert (code, err.count("\n")) == (2, 1)
    assert "looks at the question" in err


@pytest.mark.slow
def test_a_reader_that_stops_a_pipe_stops_all(monkeypatch, capsys):
    """Ctrl-C ends a pipe of questions, not only the answer that is running."""

    def stop(self, line):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat.Chat, "do", stop)
        code, _, err = talk("a\nb\n", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, err.count("interrupted")) == (130, 1)


def read_until(terminal, words, seconds=60):
    """What a terminal shows up to some words."""
    shown = b""
    while words not in shown:
        assert select.select([terminal], [], [], seconds)[0], shown
        shown += os.read(terminal, 1)  # what follows them is for the next call
    return shown


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import signal, time\nfrom nanoglimpse.model.decoder import Decoder\n"
        "from nanoglimpse.cli import ask as generate\n"
        # A shell's background jobs, and what they start, ignore it otherwise.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "step = Decoder.step\n"
        "def late(self, *a):\n    time.sleep(0.2)\n    return step(self, *a)\n"
        "Decoder.step = late\n"
        f"raise SystemExit(generate.main(['--chat', '--image', {str(SCENES[1])!r}]))\n"
    )
    child, terminal = pty.fork()
    if not child:
        os.environ["TERM"] = "dumb"
        try:
            os.execv(sys.executable, [sys.executable, str(slow)])
        finally:  # a child that stayed would run the rest of the tests
            os._exit(127)
    read_until(terminal, b"> ")
    os.write(terminal, QUESTIONS[0].encode() + b"\n")
    read_until(terminal, b"\nThe")
    os.kill(child, signal.SIGINT)
    shown = read_until(terminal, b"stopped")
    assert b"Traceback" not in shown
    read_until(terminal, b"> ")
    # Between its prompt and its wait, readline does not see a signal until the next key.
    for _ in range(20):
        os.write(terminal, b"\x03")
        if select.select([terminal], [], [], 1)[0]:
            break
    read_until(terminal, b"> ")
    os.write(terminal, b"/image nope.png\n")
    read_until(terminal, b"error: there is no picture nope.png")
    read_until(terminal, b"> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
