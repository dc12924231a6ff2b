"""Asking, streaming, sampling, stopping."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanoglimpse import Engine, Prompt, Sampling, UsageError, load
from nanoglimpse.inference.sampling import Sampler
from nanoglimpse.weights.hub import EMBEDDED
from tests.helpers.prompts import ANSWER, QUESTION, SCENE
from tests.helpers.tiny import chat_ids, patches_of


def prompt_of(engine, *parts, seed=0):
    grids = [part for part in parts if not isinstance(part, int)]
    return Prompt.from_tokens(
        chat_ids(*parts, seed=seed), patches_of(grids, seed), grids, config=engine.config
    )


@pytest.mark.slow
def test_an_answer_carries_what_it_cost(nano):
    answer = nano.ask(SCENE, QUESTION)
    assert answer.text == ANSWER
    assert answer.finish_reason == "eos"
    assert answer.token_ids[-1] in nano.model.eos_token_id
    stats, kept = answer.stats, int(answer.kept.sum())
    assert (stats.method, stats.visual_tokens, stats.kept_tokens) == ("glimpse", 256, kept)
    assert stats.prompt_tokens == len(nano.prompt(SCENE, QUESTION))
    rows = stats.prompt_tokens - 256 + kept
    text = nano.config.text_config
    depth = text.num_hidden_layers
    assert stats.kv_rows == (depth * stats.prompt_tokens, depth * rows)
    per_row = 2 * text.num_key_value_heads * text.head_dim * 4
    assert stats.kv_bytes == (depth * stats.prompt_tokens * per_row, depth * rows * per_row)
    layer = -(-2 * depth // 3)
    stages = ["preprocess", "vision", f"layers < {layer}", "score", "keep", f"layers ≥ {layer}"]
    assert list(stats.timings) == stages
    assert sum(stats.timings.values()) <= stats.first_token
    assert min(stats.timings.values()) > 0
    assert stats.peak_bytes > 1e8
    assert answer.importance.shape == answer.kept.shape == (256,)
    assert answer.grids == ((1, 32, 32),)


@pytest.mark.slow
def test_a_dense_answer_prunes_nothing(nano):
    answer = nano.ask(SCENE, QUESTION, method="dense")
    assert bool(answer.kept.all())
    assert answer.importance is None
    assert answer.stats.kv_rows[0] == answer.stats.kv_rows[1]
    assert list(answer.stats.timings) == ["preprocess", "vision", "layers"]


@pytest.mark.slow
def test_streamed_pieces_make_the_answer(nano):
    stream = nano.stream(SCENE, QUESTION)
    assert stream.answer.text == ""
    assert stream.answer.finish_reason == "stopped"
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == nano.ask(SCENE, QUESTION).text
    assert len(pieces) > 5


@pytest.mark.slow
def test_a_stream_that_is_left_says_what_there_was(nano):
    stream = nano.stream(SCENE, QUESTION)
    for count, _ in enumerate(stream):
        if count == 2:
            break
    assert stream.answer.finish_reason == "stopped"
    assert ANSWER.startswith(stream.answer.text)
    assert stream.answer.text == " ".join(ANSWER.split()[:3])


@pytest.mark.slow
def test_length_ends_an_answer(nano):
    answer = nano.ask(SCENE, QUESTION, max_new_tokens=4)
    assert len(answer.token_ids) == 4
    assert answer.finish_reason == "length"


@pytest.mark.slow
def test_ending_tokens_come_from_the_generation_config(nano):
    said = json.loads((EMBEDDED["nano"] / "generation_config.json").read_text())
    assert nano.model.eos_token_id == {said["eos_token_id"]}
    ended = nano.ask(SCENE, QUESTION)
    longer = nano.ask(SCENE, QUESTION, ignore_eos=True, max_new_tokens=20)
    assert len(longer.token_ids) == 20
    assert longer.token_ids[: len(ended.token_ids)] == ended.token_ids


@pytest.mark.slow
def test_several_pictures_and_text_between(nano):
    answer = nano.ask([], ["A: ", SCENE, " B: ", SCENE, QUESTION], method="dense")
    assert answer.stats.visual_tokens == 512
    assert len(answer.grids) == 2


@pytest.mark.slow
def test_decode_takes_more_tokens_than_the_prefill_made_room_for(tiny):
    """Room is found once, before decoding; nothing is written behind the cache's end."""
    prompt = prompt_of(tiny, 3, (1, 12, 18), 5)
    roomy = tiny.prefill(prompt, max_new_tokens=40)
    narrow = tiny.prefill(prompt, max_new_tokens=2)
    expected = list(tiny.decode(roomy, 40, ignore_eos=True))
    assert list(tiny.decode(narrow, 40, ignore_eos=True)) == expected
    storage = narrow.cache.k.data_ptr()
    assert list(tiny.decode(narrow, 40, ignore_eos=True)) == expected
    assert narrow.cache.k.data_ptr() == storage


def test_decoding_allocates_no_cache(tiny):
    prefill = tiny.prefill(prompt_of(tiny, 3, (1, 12, 18), 5), max_new_tokens=20)
    k, v = prefill.cache.k.data_ptr(), prefill.cache.v.data_ptr()
    list(tiny.decode(prefill, 20, ignore_eos=True))
    assert (prefill.cache.k.data_ptr(), prefill.cache.v.data_ptr()) == (k, v)


def test_decoding_advances_rows_and_position(tiny):
    """Both by one a token that the model has read; the last one chosen is not read."""
    prompt = prompt_of(tiny, 3, (1, 12, 18), 5)
    prefill = tiny.prefill(prompt, max_new_tokens=6)
    rows, position = prefill.cache.length, int(prefill.cache.next_position)
    assert position == int(prompt.positions.max()) + 1
    list(tiny.decode(prefill, 6, ignore_eos=True))
    assert prefill.cache.length.tolist() == [int(rows) + 5]
    assert int(prefill.cache.next_position) == position + 5


def test_rows_behind_the_length_are_never_read(tiny):
    prefill = tiny.prefill(prompt_of(tiny, 3, (1, 12, 18), 5), max_new_tokens=8)
    expected = list(tiny.decode(prefill, 8, ignore_eos=True))
    cache = prefill.rewind(8)
    used = cache.used()
    with torch.inference_mode():
        for tensor in (cache.k, cache.v):
            inside = tensor[:, used].clone()
            tensor.fill_(torch.nan)
            tensor[:, used] = inside
    assert list(tiny.decode(prefill, 8, ignore_eos=True)) == expected


def test_a_sequence_that_ended_is_silent(tiny):
    """In a batch the others go on; the ended one yields None."""
    prompts = [prompt_of(tiny, n, seed=n) for n in (4, 9, 7)]
    prefill = tiny.prefill_many(prompts, max_new_tokens=12)
    free = list(tiny.decode_many(prefill, 12, ignore_eos=True))
    ended = replace(tiny.model, eos_token_id=frozenset({free[3][1]}))
    steps = list(Engine(ended, tiny.processor).decode_many(prefill, 12))
    stop = next(i for i, step in enumerate(free) if step[1] == free[3][1])
    assert [step[1] for step in steps[: stop + 1]] == [step[1] for step in free[: stop + 1]]
    assert all(step[1] is None for step in steps[stop + 1 :])
    assert len(steps) > stop + 1


def test_the_context_is_checked_before_any_work(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "model", replace(tiny.model, vision=None))
    prompt = prompt_of(tiny, 1900)
    with pytest.raises(UsageError, match="1900 tokens and 101 new ones exceed the context of 2000"):
        tiny.prefill(prompt, max_new_tokens=101)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda e, p: e.prefill(p, "magic"),
            "unknown method 'magic'; choose one of dense, glimpse",
        ),
        (lambda e, p: e.prefill(p, max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (lambda e, p: e.prefill_many([]), "no prompt"),
        (lambda e, p: list(e.decode(e.prefill(p), 0)), "max_new_tokens must be at least 1, got 0"),
        (lambda e, p: e.prefill(p, max_ratio=1.5), "max_ratio"),
    ],
)
def test_calls_that_make_no_sense(tiny, call, words):
    with pytest.raises(UsageError, match=words):
        call(tiny, prompt_of(tiny, 5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": []}, "at least one token"),
        ({"ids": [130]}, "token_ids must be in 0 to"),
        ({"ids": [-1, 5]}, "token_ids must be in 0 to"),
        ({"grids": [(1, 4, 6)]}, r"patches must have shape \[24, 1176\], got \[16, 1176\]"),
        ({"patches": None}, "patches"),
        ({"grids": [(1, 3, 4)]}, "whole visual tokens"),
        ({"ids": [120] * 3}, "3 placeholders.*make 4"),
        ({"ids": [120, 120, 121, 120]}, "4 equal placeholders"),
        ({"seconds_per_grid": [1.0]}, "1 values for 0 videos"),
    ],
)
def test_prompts_whose_parts_do_not_fit(tiny, change, words):
    grids = [(1, 4, 4)]
    parts = {"ids": chat_ids(2, *grids, 2), "patches": patches_of(grids), "grids": grids} | change
    ids = parts.pop("ids")
    with pytest.raises(UsageError, match=words):
        Prompt.from_tokens(ids, config=tiny.config, **parts)


def test_glimpse_without_weights_says_where_they_are(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "bare", ignore=lambda *_: ["glimpse"])
    engine = load(tmp_path / "bare", device="cpu")
    prompt = prompt_of(engine, 5)
    assert engine.prefill(prompt).method == "dense"
    with pytest.raises(UsageError, match="ashun989/GlimpsePrune"):
        engine.prefill(prompt, "glimpse")


def hf_probabilities(logits, seen, temperature=1.0, top_k=0, top_p=1.0, penalty=1.0):
    steps = LogitsProcessorList()
    if penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(penalty))
    steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    return steps(seen, logits.clone()).softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 7, "top_p": 0.6},
        {"temperature": 1.0, "penalty": 1.4},
        {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "penalty": 0.8},
    ],
    ids=str,
)
def test_samples_follow_the_distribution_of_transformers(options):
    vocab, draws = 17, 4000
    logits, seen = 2 * torch.randn(1, vocab), torch.tensor([[3, 5, 5, 11]])
    expected = hf_probabilities(logits, seen, **options)[0]
    own = {"repetition_penalty" if k == "penalty" else k: v for k, v in options.items()}
    counts = torch.zeros(vocab)
    for draw in range(draws):
        sampler = Sampler(Sampling(**own, seed=draw), [seen[0]], vocab, seen.device)
        counts[sampler(logits)] += 1
    assert counts[expected == 0].sum() == 0
    # Five standard errors of a binomial share.
    bound = 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9
    assert bool(((counts / draws - expected).abs() <= bound).all())


def test_a_penalty_changes_greedy_choices_and_remembers_them():
    logits = torch.tensor([[2.0, 1.9, 1.8]])
    sampler = Sampler(Sampling(repetition_penalty=1.2), [torch.tensor([2])], 3, torch.device("cpu"))
    assert [int(sampler(logits)) for _ in range(3)] == [0, 1, 0]


@pytest.mark.slow
def test_a_seed_repeats_and_another_does_not(tiny):
    prefill = tiny.prefill(prompt_of(tiny, 6), max_new_tokens=30)
    runs = [
        list(tiny.decode(prefill, 30, True, Sampling(temperature=2.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.slow
def test_a_seeded_batch_draws_as_each_prompt_alone(tiny):
    prompts = [prompt_of(tiny, n, seed=n) for n in (4, 9)]
    sampling = Sampling(temperature=1.5, seed=3)
    steps = list(tiny.decode_many(tiny.prefill_many(prompts), 15, True, sampling))
    for number, prompt in enumerate(prompts):
        alone = list(tiny.decode(tiny.prefill(prompt), 15, True, sampling))
        assert [step[number] for step in steps] == alone


def test_samples_of_a_prompt_differ_and_the_first_is_the_single_answer(tiny):
    prompts = [prompt_of(tiny, n, seed=n) for n in (4, 9)]
    one = Sampling(temperature=1.5, seed=3)
    group = replace(one, samples=8)
    batch = [prompt for prompt in prompts for _ in range(8)]
    steps = list(tiny.decode_many(tiny.prefill_many(batch), 15, True, group))
    replies = list(zip(*steps, strict=True))
    for number, prompt in enumerate(prompts):
        samples = replies[8 * number : 8 * number + 8]
        assert len(set(samples)) == 8
        assert list(samples[0]) == list(tiny.decode(tiny.prefill(prompt), 15, True, one))
        alone = tiny.decode_many(tiny.prefill_many([prompt] * 8), 15, True, group)
        assert samples == list(zip(*alone, strict=True))


def test_samples_need_whole_groups(tiny):
    prefill = tiny.prefill_many([prompt_of(tiny, 4)] * 3)
    with pytest.raises(UsageError, match="3 prompts are not groups of 2 samples"):
        next(tiny.decode_many(prefill, 4, sampling=Sampling(samples=2)))
    with pytest.raises(UsageError, match="decode_many"):
        tiny.answers([], sampling=Sampling(samples=2))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"samples": 0},
    ],
    ids=str,
)
def test_sampling_refuses_nonsense(options):
    with pytest.raises(UsageError):
        Sampling(**options)
