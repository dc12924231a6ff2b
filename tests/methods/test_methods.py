"""Pruning methods: what they keep, and that the engine does with it what it should."""

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nanoglimpse import Prompt, UsageError, load
from nanoglimpse.config import parse_config
from nanoglimpse.inputs.prompt import PackedBatch
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.methods import METHODS
from nanoglimpse.methods.base import Needs, PruningMethod
from nanoglimpse.methods.cdpruner import conditional
from nanoglimpse.methods.context import Decision
from nanoglimpse.methods.divprune import diverse
from nanoglimpse.methods.evs import changes, clips
from nanoglimpse.methods.options import Pruning
from nanoglimpse.methods.polymorphic import condense, likeness
from nanoglimpse.methods.prumerge import gain
from nanoglimpse.methods.similarity import density_peaks, nearest, unit
from nanoglimpse.methods.sparsevlm import leading, pull, recycle
from nanoglimpse.methods.tome import match
from nanoglimpse.methods.visionzip import merge
from nanoglimpse.methods.vispruner import thin_out
from nanoglimpse.methods.vscan import average, of_windows
from nanoglimpse.model.rope import mrope
from nanoglimpse.model.vision import BlockStats, window_layout
from tests.helpers import reference
from tests.helpers.tiny import chat_ids, config_dict, patches_of

GRIDS = [(1, 12, 18), (1, 8, 10)]
TEXT_CONFIG = parse_config(config_dict(), "tiny").text_config
CAPPED = [name for name, method in METHODS.items() if method.budget == "cap"]


@pytest.fixture(scope="module")
def engine(tiny_folder):
    return load(tiny_folder, dtype="float32", device="cpu")


def prompt_of(engine, *parts, seed=0):
    grids = [part for part in parts if not isinstance(part, int)]
    ids = chat_ids(*parts, seed=seed)
    return Prompt.from_tokens(ids, patches_of(grids, seed), grids, config=engine.config)


def cap(name, ratio):
    """A cap for a method that has one."""
    return {} if METHODS[name].budget == "fixed" else {"max_ratio": ratio}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CAPPED, "pdrop"])
def test_keeping_all_is_dense(engine, name):
    """To the bit: the same rows go through the same products."""
    prompt = prompt_of(engine, 3, *GRIDS, 6)
    dense, all_kept = engine.prefill(prompt, "dense"), engine.prefill(prompt, name, max_ratio=1)
    assert bool(all_kept.kept.all())
    assert torch.equal(all_kept.logits, dense.logits)
    assert list(engine.decode(all_kept, 6)) == list(engine.decode(dense, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CAPPED if name != "evs"])
@pytest.mark.parametrize("ratio", [0.05, 1 / 9, 0.5])
def test_the_budget_is_met(engine, name, ratio):
    prompt = prompt_of(engine, 3, *GRIDS, 6)
    prefill = engine.prefill(prompt, name, max_ratio=ratio)
    total, kept = len(prefill.kept), int(prefill.kept.sum())
    assert prefill.budgets.decode_kv_ratio == pytest.approx(kept / total)
    if len(METHODS[name].layers(engine.model)) > 1:
        assert ratio * total - 2 <= kept <= max(ratio * total, 2)
        return
    depth, (stop,) = engine.config.text_config.num_hidden_layers, METHODS[name].layers(engine.model)
    assert kept == int(ratio * total)
    expected = (stop + (depth - stop) * kept / total) / depth
    assert prefill.budgets.prefill_ratio == pytest.approx(expected)


BY_IMAGE = ["visionzip", "vispruner", "divprune", "cdpruner", "tome", "prumerge", "prumerge+"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_IMAGE)
@pytest.mark.parametrize("sizes", [(1, 9, 2), (2, 30, 1), (30, 6)], ids=str)
@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_pictures_together_stay_within_the_cap(engine, name, sizes, ratio):
    """However small some are; and what an earlier one keeps does not depend on a later one."""
    grids = [(1, 2, 2 * size) for size in sizes]
    seen, whole = 0, engine.prefill(prompt_of(engine, 3, *grids, 6), name, max_ratio=ratio).kept
    for count, size in enumerate(sizes, 1):
        seen += size
        kept = engine.prefill(prompt_of(engine, 3, *grids[:count], 6), name, max_ratio=ratio).kept
        assert len(kept) == seen
        assert int(kept.sum()) <= max(int(ratio * seen), 1)
        assert BY_IMAGE.index(name) > 4 or int(kept.sum()) == max(int(ratio * seen), 1)
        if name != "cdpruner":  # which reads the question
            assert torch.equal(kept, whole[:seen])


def test_a_cap_that_changes_nothing_is_refused(engine):
    for name in ("dense", "oracle", "nothing", "vtw"):
        with pytest.raises(UsageError, match=rf"\(--max-ratio\) caps method {name}; leave it out"):
            Pruning(name, max_ratio=0.1)
    with pytest.raises(UsageError, match="caps method dense"):
        Pruning(max_ratio=0.1).resolve(replace(engine.model, glimpse=None))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_each_prompt_alone(engine, name):
    prompts = [
        prompt_of(engine, 4, GRIDS[0], 5),
        prompt_of(engine, 7, seed=1),
        prompt_of(engine, 1, *GRIDS, 2, seed=2),
    ]
    masks = [torch.arange(sum(h * w // 4 for _, h, w in p.grids)) % 5 == 0 for p in prompts]
    together = engine.prefill_many(prompts, name, evidence=masks, seed=[3, 4, 5], **cap(name, 0.3))
    alone = [
        engine.prefill(p, name, evidence=[m], seed=seed, **cap(name, 0.3))
        for p, m, seed in zip(prompts, masks, (3, 4, 5), strict=True)
    ]
    assert torch.equal(together.kept, torch.cat([one.kept for one in alone]))
    tokens = zip(*engine.decode_many(together, 8, ignore_eos=True), strict=True)
    for answer, one in zip(tokens, alone, strict=True):
        assert list(answer) == list(engine.decode(one, 8, ignore_eos=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("fastv", 2), ("attention", 4)])
def test_attention_methods_rank_as_transformers_attends(tiny_folder, engine, name, layer):
    """The last prompt token's softmax row in the last layer that runs on everything."""
    grid = GRIDS[0]
    prompt = prompt_of(engine, 5, grid, 9)
    model = reference.hf_model(tiny_folder)
    model.set_attn_implementation("eager")
    ids = prompt.token_ids[None]
    with torch.no_grad():
        out = model(
            input_ids=ids,
            pixel_values=prompt.patches,
            image_grid_thw=torch.tensor([grid]),
            mm_token_type_ids=(ids == engine.config.image_token_id).int(),
            output_attentions=True,
        )
    received = out.attentions[layer - 1][0, :, -1].mean(0)[prompt.visual]
    count = int(0.2 * len(received))
    expected = torch.zeros_like(received, dtype=torch.bool)
    expected[received.argsort(descending=True)[:count]] = True
    assert METHODS[name].layers(engine.model) == (layer,)
    assert torch.equal(engine.prefill(prompt, name, max_ratio=0.2).kept, expected)


@pytest.mark.slow
def test_random_is_drawn_by_the_seed(engine):
    prompt = prompt_of(engine, 3, GRIDS[0], 6)
    one, same, other = (
        engine.prefill(prompt, "random", max_ratio=0.4, seed=seed).kept for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    counts = sum(
        engine.prefill(prompt, "random", max_ratio=0.5, seed=seed).kept.long() for seed in range(60)
    )
    assert int(counts.min()) >= 12
    assert int(counts.max()) <= 48


@pytest.mark.slow
def test_the_oracle_keeps_the_evidence(engine):
    prompt = prompt_of(engine, 3, GRIDS[0], 6)
    mask = torch.arange(54) % 7 == 2
    assert torch.equal(engine.prefill(prompt, "oracle", evidence=[mask]).kept, mask)
    with pytest.raises(UsageError, match="oracle needs the evidence"):
        engine.prefill(prompt, "oracle")


@pytest.mark.parametrize("name", CAPPED)
def test_a_share_has_to_be_given(engine, name):
    with pytest.raises(UsageError, match=f"{re.escape(name)} keeps a share.*max_ratio"):
        engine.prefill(prompt_of(engine, 3, GRIDS[0], 6), name)


class Staged(PruningMethod):
    """Before the decoder, after two layers and after four; each time other tokens go."""

    name, about, budget = "staged", "for this test", "adaptive"

    def __init__(self, inside):
        self.inside = inside

    def layers(self, model):
        return (0, 2, 4)

    def needs(self, model):
        return Needs(attention=(3,), hidden=not self.inside, question=True)

    def choose(self, context):
        count = len(context.visual)
        assert context.taps.shape[1] == count == len(context.batch.visual_rows)
        if 3 in context.layers:
            rows = context.query_rows
            assert len(context.layers[3].logits(rows)) == len(context.batch.token_ids)
        return Decision(torch.arange(count) % 3 != 1)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
@pytest.mark.parametrize("kv_drop", ["all", "later"])
def test_a_method_may_look_several_times(engine, kv_drop, inside):
    """Against layers that run one by one, each with keys and values of its own."""
    prompt = prompt_of(engine, 4, *GRIDS, 5)
    ours = engine.prefill(prompt, Staged(inside), kv_drop=kv_drop)
    batch = PackedBatch.pack([prompt], engine.config, engine.device)
    decoder, text, layers = engine.decoder, engine.config.text_config, []
    with torch.inference_mode():
        hidden = decoder.embed_tokens(batch.token_ids)
        hidden[batch.visual_rows] = ours.visual
        rows = torch.arange(len(hidden))
        visual = prompt.visual.clone()
        for layer in range(len(decoder.layers)):
            if layer in (0, 2, 4):
                stays = torch.ones(len(rows), dtype=torch.bool)
                stays[visual] = torch.arange(int(visual.sum())) % 3 != 1
                rows, visual, hidden = rows[stays], visual[stays], hidden[stays]
            rope = mrope(prompt.positions[:, rows], text)
            size, ops = (range(1), [len(rows)]), engine.model.ops
            cache = KVCache(text, *size, batch.next_position, hidden, ops)
            kv = cache.reserve([len(rows)]).layer(0)
            hidden = decoder.layers[layer](hidden, rope, kv, Segments([len(rows)]), None)
            layers.append((rows, *cache.layer(0)))
        logits = decoder.logits(hidden[-1:])
        torch.testing.assert_close(ours.logits, logits[0])
        held = [
            (k, v) if kv_drop == "later" else (k[torch.isin(had, rows)], v[torch.isin(had, rows)])
            for had, k, v in layers
        ]
        for layer, (k, v) in enumerate(held):
            torch.testing.assert_close(ours.cache.layer(layer)[0], k)
            torch.testing.assert_close(ours.cache.layer(layer)[1], v)
        tokens = []
        for step in range(6):
            tokens.append(int(logits.argmax()))
            logits = _step(engine, tokens[-1], batch.next_position + step, held)
    assert list(engine.decode(ours, 6, ignore_eos=True)) == tokens
    assert list(engine.decode(ours, 300, ignore_eos=True))[:6] == tokens
    assert torch.equal(ours.positions, prompt.positions[:, rows])
    total = int(prompt.visual.sum())
    left = [total]
    for _ in range(3):
        left.append(left[-1] - len(range(1, left[-1], 3)))
    assert int(ours.kept.sum()) == left[3]
    expected = (2 * left[1] + 2 * left[2] + 2 * left[3]) / 6 / total
    assert ours.budgets.prefill_ratio == pytest.approx(expected)
    assert ours.budgets.input_ratio == pytest.approx(left[1] / total)
    cached = expected if kv_drop == "later" else left[3] / total
    assert ours.budgets.decode_kv_ratio == pytest.approx(cached)


INSIDE = ["attention", "fastv", "glimpse", "nothing", "oracle", "random", "vtw"]


@pytest.mark.slow
@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("kv_drop", ["all", "later"])
def test_pruning_inside_a_layer_is_pruning_after_it(engine, monkeypatch, name, kv_drop):
    """Bit for bit, in a batch; and only what survives goes through the rest of the layer."""
    prompts = [prompt_of(engine, 4, GRIDS[0], 5), prompt_of(engine, 1, *GRIDS, 2, seed=2)]
    masks = [torch.arange(sum(h * w // 4 for _, h, w in p.grids)) % 5 == 0 for p in prompts]
    options = {"evidence": masks, "kv_drop": kv_drop, "seed": 3} | cap(name, 0.8)
    rows = []
    (stop,) = METHODS[name].layers(engine.model)
    mlp = engine.decoder.layers[stop - 1].mlp
    hook = mlp.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    inside = engine.prefill_many(prompts, name, **options)
    needs = METHODS[name].needs
    waits = {"needs": lambda self, model: replace(needs(model), hidden=True)}
    monkeypatch.setattr(type(METHODS[name]), "needs", waits["needs"])
    after = engine.prefill_many(prompts, name, **options)
    hook.remove()
    total, left = sum(map(len, prompts)), inside.positions.shape[1]
    assert rows == [left, total + (len(prompts) if name == "glimpse" else 0)]
    assert left < total
    assert torch.equal(inside.kept, after.kept)
    assert torch.equal(inside.logits, after.logits)
    for layer in range(6):
        for sequence in range(2):
            for ours, theirs in zip(
                inside.cache.layer(layer, sequence), after.cache.layer(layer, sequence), strict=True
            ):
                assert torch.equal(ours, theirs)


def _step(engine, token, position, held):
    """One token through all layers by plain softmax; its keys and values join `held`."""
    rope = mrope(position.expand(3, -1), engine.config.text_config)
    hidden = engine.decoder.embed_tokens(torch.tensor([token]))
    for layer, block in enumerate(engine.decoder.layers):
        q, k, v = block.project(hidden, rope)
        keys, values = (torch.cat(pair) for pair in zip(held[layer], (k, v), strict=True))
        held[layer] = (keys, values)
        groups = q.shape[1] // k.shape[1]
        out = []
        for head in range(q.shape[1]):
            weights = (keys[:, head // groups] @ q[0, head] * block.head_dim**-0.5).softmax(0)
            out.append(weights @ values[:, head // groups])
        hidden = block.output(hidden, torch.cat(out)[None])
    return engine.decoder.logits(hidden)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["fastv", "attention", "random", "pdrop", "sparsevlm", "sparsevlm+", "vscan", "polymorphic"],
)
@pytest.mark.parametrize("ratio", [0.75, 0.9])
def test_a_budget_is_met_where_lower_layers_keep_all(engine, name, ratio):
    prompt = prompt_of(engine, 3, *GRIDS, 6)
    prefill = engine.prefill(prompt, name, max_ratio=ratio, kv_drop="later")
    budgets = prefill.budgets
    assert ratio - 4 / len(prefill.kept) < budgets.decode_kv_ratio <= ratio
    assert budgets.prefill_ratio == budgets.decode_kv_ratio
    answers = engine.prefill_many([prompt, prompt], name, max_ratio=ratio, kv_drop="later")
    tokens = list(zip(*engine.decode_many(answers, 5, ignore_eos=True), strict=True))
    assert list(tokens[0]) == list(tokens[1]) == list(engine.decode(prefill, 5, ignore_eos=True))


@pytest.mark.parametrize("name", ["fastv", "attention", "pdrop"])
def test_a_budget_below_the_floor_is_refused(engine, name):
    with pytest.raises(UsageError, match=f"{name} leaves the cache.*cannot be reached"):
        engine.prefill(prompt_of(engine, 3, GRIDS[0], 6), name, max_ratio=0.2, kv_drop="later")


def test_unknown_kv_drop(engine):
    with pytest.raises(UsageError, match="kv_drop must be one of all, later, got 'some'"):
        engine.prefill(prompt_of(engine, 3, GRIDS[0], 6), kv_drop="some")


@pytest.mark.parametrize("kv_drop", ["all", "later"])
def test_the_glimpse_leaves_no_trace(engine, kv_drop):
    """In no layer of the cache, whatever lower layers keep."""
    prompt = prompt_of(engine, 3, GRIDS[0], 6)
    prefill = engine.prefill(prompt, "glimpse", max_ratio=0.8, kv_drop=kv_drop)
    dense = engine.prefill(prompt, "dense")
    stays = torch.ones(len(prompt), dtype=torch.bool)
    if kv_drop == "all":
        stays[prompt.visual] = prefill.kept
    for layer in range(4):
        for ours, theirs in zip(prefill.cache.layer(layer), dense.cache.layer(layer), strict=True):
            torch.testing.assert_close(ours, theirs[stays])


def test_a_pyramid_falls_to_its_cap(engine):
    prompt = prompt_of(engine, 3, *GRIDS, 6)
    total = len(engine.prefill(prompt, "dense").kept)
    for cap, final in ((None, 1 / 8), (0.3, 0.3)):
        prefill = engine.prefill(prompt, "pdrop", max_ratio=cap)
        counts = [total]
        for stage in (1, 2, 3):
            share = final ** (stage / 3) / final ** ((stage - 1) / 3)
            counts.append(int(share * counts[-1]))
        assert METHODS["pdrop"].layers(engine.model) == (2, 3, 4)
        assert int(prefill.kept.sum()) == counts[3]
        processed = 2 * counts[0] + counts[1] + counts[2] + 2 * counts[3]
        assert prefill.budgets.prefill_ratio == pytest.approx(processed / 6 / total)


def attentions(tiny_folder, engine, prompt, grid):
    model = reference.hf_model(tiny_folder)
    model.set_attn_implementation("eager")
    ids = prompt.token_ids[None]
    with torch.no_grad():
        return model(
            input_ids=ids,
            pixel_values=prompt.patches,
            image_grid_thw=torch.tensor([grid]),
            mm_token_type_ids=(ids == engine.config.image_token_id).int(),
            output_attentions=True,
        ).attentions


@pytest.mark.slow
def test_a_pyramid_ranks_by_the_next_layer(tiny_folder, engine, monkeypatch):
    """The first stage's order is that of the attention of the layer behind it."""
    prompt = prompt_of(engine, 5, GRIDS[0], 9)
    method = METHODS["pdrop"]
    seen = []
    choose = method.choose

    def first(context):
        decision = choose(context)
        seen.append(decision.kept)
        return decision

    monkeypatch.setattr(type(method), "choose", lambda self, context: first(context))
    engine.prefill(prompt, "pdrop", max_ratio=0.1)
    received = attentions(tiny_folder, engine, prompt, GRIDS[0])[2][0, :, -1].mean(0)
    order = received[prompt.visual].argsort(descending=True)
    expected = torch.zeros(len(order), dtype=torch.bool)
    expected[order[: int(seen[0].sum())]] = True
    assert torch.equal(seen[0], expected)


def test_withdrawing_leaves_text(engine):
    prompt = prompt_of(engine, 3, GRIDS[0], 6)
    prefill = engine.prefill(prompt, "vtw")
    assert METHODS["vtw"].layers(engine.model) == (3,)
    assert not bool(prefill.kept.any())
    assert prefill.budgets.decode_kv_ratio == 0
    assert torch.equal(prefill.positions, prompt.positions[:, ~prompt.visual])


def test_the_watch_sees_blocks_as_the_encoder_runs_them(engine):
    """Against the definition: whole softmax matrices of each image, patch by patch."""
    grids = [(1, 12, 18), (1, 8, 10)]
    patches = patches_of(grids, 3)
    block_stats = BlockStats((1, 4))
    with torch.inference_mode():
        engine.vision(patches, grids, (), block_stats)
        first = 0
        for grid in grids:
            count = grid[1] * grid[2]
            alone = BlockStats((1, 4))
            engine.vision(patches[first : first + count], [grid], (), alone)
            tokens = slice(first // 4, (first + count) // 4)
            for block in (1, 4):
                torch.testing.assert_close(
                    block_stats.received[block][tokens], alone.received[block]
                )
                torch.testing.assert_close(block_stats.keys[block][tokens], alone.keys[block])
                assert float(alone.received[block].sum()) * 4 == pytest.approx(count, rel=1e-4)
            first += count


@pytest.mark.slow
def test_the_watch_reads_what_the_block_attends_with(tiny_folder):
    """Whole matrices of the q and k that each block hands to attention."""
    calls = []

    def spy(q, k, v, segments, *, causal):
        calls.append((q, k))
        return TORCH.attention(q, k, v, segments, causal=causal)

    engine = load(tiny_folder, device="cpu", dtype="float32", backend=replace(TORCH, attention=spy))
    grid, block_stats = (1, 12, 18), BlockStats((1, 4))
    with torch.inference_mode():
        engine.vision(patches_of([grid], 3), [grid], (), block_stats)
    plan = window_layout((grid,), engine.config.vision_config, engine.device)
    for block in (1, 4):
        q, k = calls[block]
        weights = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        received = weights.sum(1).mean(0).view(-1, 4).mean(1)[plan.inverse]
        torch.testing.assert_close(block_stats.received[block], received)
        keys = k.mean(1).view(-1, 4, k.shape[-1]).mean(1)[plan.inverse]
        torch.testing.assert_close(block_stats.keys[block], keys)


def test_nearest_in_tiles(monkeypatch):
    monkeypatch.setattr("nanoglimpse.methods.similarity.TILE", 3)
    x, y = torch.randn(8, 5), torch.randn(6, 5)
    matrix = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    value, index = nearest(x, y)
    torch.testing.assert_close(value, matrix.max(1).values)
    assert torch.equal(index, matrix.argmax(1))
    own = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    own.fill_diagonal_(-2)
    value, index = nearest(x, x, same=True)
    torch.testing.assert_close(value, own.max(1).values)
    assert torch.equal(index, own.argmax(1))


def test_divprune_by_its_definition():
    """The minimum over all chosen taken anew in each step, as in the public code."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    distance = 1 - unit(x) @ unit(x).T
    chosen = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(chosen) < 5:
        far = distance[chosen].min(0).values
        far[chosen] = -1
        chosen.append(int(far.argmax()))
    assert diverse(x, 5).tolist() == chosen


def test_divprune_of_equal_tokens():
    assert sorted(diverse(torch.ones(5, 3), 5).tolist()) == [0, 1, 2, 3, 4]
    assert diverse(torch.ones(1, 3), 1).tolist() == [0]
    assert diverse(torch.ones(5, 3), 0).tolist() == []


@pytest.mark.parametrize("seed", range(8))
def test_cdpruner_is_the_greedy_determinant(seed):
    generator = torch.Generator().manual_seed(seed)
    x, relevance = unit(torch.randn(9, 6, generator=generator)), torch.rand(9, generator=generator)
    r = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = (r[:, None] * (x @ x.T) * r[None]).double()
    chosen: list[int] = []
    for _ in range(4):
        gains = {
            i: float(kernel[[*chosen, i]][:, [*chosen, i]].det())
            for i in range(9)
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.get))
    assert conditional(x, relevance, 4).tolist() == chosen


def test_cdpruner_of_equal_tokens():
    assert sorted(conditional(unit(torch.ones(4, 2)), torch.ones(4), 4).tolist()) == [0, 1, 2, 3]


def test_visionzip_merges_into_the_most_alike():
    keys = torch.tensor([[1.0, 0], [0, 1], [1, 0.1], [0.9, 0], [0.1, 1]])
    values = torch.tensor([[1.0], [10.0], [2.0], [4.0], [20.0]])
    merge(values, keys, torch.tensor([0, 1]), torch.tensor([2, 3, 4]))
    assert values.flatten().tolist() == [1 + 3, 10 + 20, 2, 4, 20]


def test_vispruner_thins_out_the_alike():
    """Of [a, b, a', c, d]: the even places a, a', d against the odd ones b = a', c."""
    features = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0.01], [0, 0, 1], [1, 0, 1]])
    assert thin_out(features, torch.arange(5), 4).tolist() == [4, 0, 1, 3]
    assert len(thin_out(torch.randn(41, 3), torch.arange(41), 3)) == 3
    assert thin_out(features, torch.arange(5), 0).tolist() == []


@pytest.mark.parametrize(("name", "expected"), [("prumerge", [3]), ("prumerge+", [0, 3, 4, 8])])
def test_prumerge_counts_outliers(name, expected):
    """One of twelve stands out; "+" adds every ⌊12 / 3⌋-th."""
    attention = torch.full((12,), 0.05)
    attention[3] = 0.45
    chosen = METHODS[name].standing_out(attention)
    assert sorted(chosen.tolist()) == expected
    assert chosen[0] == 3  # so that a cap keeps it
    assert METHODS["prumerge"].standing_out(torch.full((5,), 0.2)).tolist() == [0]


def test_prumerge_outliers_lie_beyond_the_whiskers():
    """Quartiles 2 and 4: 6.5 is high, but only 8 is beyond 4 + 1.5 · 2."""
    attention = torch.tensor([1.0, 2, 2, 3, 3, 4, 4, 6.5, 8])
    assert METHODS["prumerge"].standing_out(attention).tolist() == [8]


def test_prumerge_gains_by_attention():
    keys = torch.tensor([[1.0, 0], [1, 0.1], [0, 1]])
    values, attention = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([0.5, 0.3, 0.2])
    gain(values, keys, attention, torch.tensor([0]))
    assert values.flatten().tolist() == [pytest.approx(1 + 3 + 20), 10, 100]


def test_tome_merges_pairs_by_weight():
    keys = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1.0], [-1, 0]])
    values = torch.tensor([[1.0], [3.0], [5.0], [9.0], [7.0]])
    left = match(values, keys.clone(), 3)
    assert left.tolist() == [1, 3, 4]
    assert values[left].flatten().tolist() == [2, 7, 7]
    values = torch.randn(13, 2)
    mass = values.sum(0)
    left = match(merged := values.clone(), torch.randn(13, 4), 1)
    torch.testing.assert_close(merged[left[0]] * 13, mass)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 2, 14)], ids=["one token", "one row"])
def test_degenerate_pictures(engine, name, grid):
    prompt = prompt_of(engine, 3, grid, 4)
    count = grid[1] * grid[2] // 4
    mask = [torch.ones(count, dtype=torch.bool)]
    prefill = engine.prefill(prompt, name, evidence=mask, **cap(name, 0.2))
    assert len(prefill.kept) == count
    assert len(list(engine.decode(prefill, 3, ignore_eos=True))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_equal_tokens(engine, name):
    prompt = prompt_of(engine, 3, (1, 8, 8), 4)
    same = Prompt.from_tokens(
        prompt.token_ids, torch.zeros_like(prompt.patches), prompt.grids, config=engine.config
    )
    prefill = engine.prefill(same, name, evidence=[torch.arange(16) < 4], **cap(name, 0.25))
    assert int(prefill.kept.sum()) <= 16
    assert bool(torch.isfinite(prefill.logits).all())


def test_vscan_windows():
    """An 8 × 5 grid has two windows, the fifth column belongs to both; each gives its best."""
    score = torch.arange(40.0)
    assert sorted(of_windows(score, 8, 5, 4).tolist()) == [18, 19, 38, 39]
    assert sorted(of_windows(score, 8, 5, 3).tolist()) == [19, 38, 39]
    assert of_windows(torch.tensor([1.0, 3, 2]), 1, 3, 2).tolist() == [1, 2]
    assert len(of_windows(score, 8, 5, 39)) == 39


def test_vscan_averages():
    values = torch.tensor([[1.0, 0], [0, 1], [3, 0], [0, 5], [5, 0]])
    average(values, torch.tensor([0, 1]))
    assert values[:2].tolist() == [[3, 0], [0, 3]]


def test_vscan_has_two_stages(engine):
    prompt = prompt_of(engine, 3, GRIDS[0], 6)
    budgets = engine.prefill(prompt, "vscan", max_ratio=0.2).budgets
    assert METHODS["vscan"].layers(engine.model) == (0, 3)
    assert budgets.input_ratio == pytest.approx(int(0.6 * 54) / 54)
    assert budgets.prefill_ratio == pytest.approx((32 + 10) / 2 / 54)


def test_density_peaks():
    """Two heaps and a stray point: the heaps' densest points are centres of two clusters."""
    x = torch.tensor([[0.0, 0], [0.1, 0], [0.2, 0], [5, 5], [5.1, 5], [5.2, 5], [2, 2]])
    centres, member = density_peaks(x, 2)
    heaps = [{0, 1, 2}, {3, 4, 5}]
    assert {next(i for i, heap in enumerate(heaps) if c in heap) for c in centres.tolist()} == {
        0,
        1,
    }
    assert len({int(member[i]) for i in (0, 1, 2)}) == len({int(member[i]) for i in (3, 4, 5)}) == 1
    assert int(member[0]) != int(member[3])


def test_density_peaks_in_tiles(monkeypatch):
    """The same in tiles as at once, down to ties, and as loops over the definition say."""
    x, clusters = torch.randn(61, 5), 7
    x[40:44], x[50:53] = x[3], x[50].clone()
    centres, member = density_peaks(x, clusters)
    monkeypatch.setattr("nanoglimpse.methods.similarity.TILE", 16)
    again = density_peaks(x, clusters)
    assert torch.equal(again[0], centres)
    assert torch.equal(again[1], member)
    distance = [[math.dist(a, b) / 5**0.5 for b in x.tolist()] for a in x.tolist()]
    near = [sum(d * d for d in sorted(row)[:clusters]) / clusters for row in distance]
    density = [math.exp(-value) for value in near]
    widest = max(map(max, distance))
    peaks = []
    for i, row in enumerate(distance):
        denser = [d for j, d in enumerate(row) if (-density[j], j) < (-density[i], i)]
        peaks.append(density[i] * min(denser, default=widest))
    distinct = sorted(range(61), key=lambda i: -peaks[i])[:clusters]
    assert set(centres.tolist()) == set(distinct)


def test_recycling_counts_and_means():
    """Of 30 tokens 12 stay: 18 go, 6 of them come back as one mean of one cluster."""
    generator = torch.Generator().manual_seed(4)
    values, score = torch.randn(30, 3, generator=generator), torch.arange(30.0)
    before, own = values.clone(), torch.arange(30)
    chosen = recycle(values, own, score, 12)
    assert len(chosen.unique()) == 12
    assert sorted(chosen.tolist())[1:] == list(range(19, 30))
    (centre,) = set(chosen.tolist()) - set(range(19, 30))
    assert 13 <= centre <= 18
    torch.testing.assert_close(values[centre], before[13:19].mean(0))
    changed = (values != before).any(1).nonzero().flatten().tolist()
    assert changed == [centre]
    assert torch.equal(recycle(values, own, score, 30), own)


def test_sparsevlm_rates_by_the_question(engine):
    """Raters by their definition, and the first stage by attention of whole matrices."""
    prompt = prompt_of(engine, 5, GRIDS[0], 9)
    method, looks = METHODS["sparsevlm"], []

    class Spy(PruningMethod):
        name, about = "spy", ""
        layers, needs, stage_ratio = method.layers, method.needs, method.stage_ratio

        def choose(self, context):
            looks.append(context)
            return method.choose(context)

    engine.prefill(prompt, Spy(), max_ratio=0.2)
    context = looks[0]
    last = int(prompt.visual.nonzero()[-1])
    assert context.question(0).tolist() == list(range(last + 2, len(prompt)))
    text = engine.decoder.embed_tokens(prompt.token_ids[last + 2 :])
    shares = [
        sum(float(s) for s in column)
        for column in zip(*[(v @ text.T).softmax(0) for v in context.vision.visual], strict=True)
    ]
    mean = sum(shares) / len(shares)
    expected = [last + 2 + i for i, s in enumerate(shares) if s >= mean]
    assert method.raters(context, 0, context.vision.visual).tolist() == expected
    assert [len(one.visual) for one in looks] == [
        54,
        int(0.2 * 300 / 110 * 54),
        int(0.2 * 200 / 110 * 54),
    ]


def test_rotation_alone_pulls_by_distance():
    """The product of rotated rows of ones, by its definition and as the mean of cosines."""
    rope = mrope(torch.tensor([[0, 3, 3], [0, 3, 4], [0, 5, 2]]), TEXT_CONFIG)
    ones = TORCH.rotate(torch.ones(3, 1, 8), rope)[:, 0]
    ours = pull(rope, torch.tensor(0), torch.arange(3))
    torch.testing.assert_close(ours, ones @ ones[0] / 8)
    steps = [1000 ** (-j / 4) for j in range(4)]
    turns = zip((3, 4, 2, 2), steps, strict=True)  # one frequency in time, one in height
    assert float(ours[0]) == pytest.approx(1)
    assert float(ours[2]) == pytest.approx(sum(math.cos(n * step) for n, step in turns) / 4)


def test_leading_heads_are_the_half_that_looks_most():
    """Of the sums 5, 6, 2 and 7 the second and the last lead."""
    score = torch.tensor([[4.0, 1, 1, 0], [1, 5, 1, 7]])
    assert leading(score).tolist() == [0.5, 6]
    assert leading(score[:, :1]).tolist() == [4, 1]


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm+"])
def test_sparsevlm_without_a_question(engine, name):
    """Nobody rates: the first tokens stay, as many as may."""
    kept = engine.prefill(prompt_of(engine, 4, GRIDS[0]), name, max_ratio=0.25).kept
    assert int(kept.sum()) == 13


@pytest.mark.slow
def test_sparsevlm_plus_by_its_definition(tiny_folder, engine, monkeypatch):
    """Whole matrices of transformers over cosines of distances; what stays is as it was."""
    prompt, method, seen = prompt_of(engine, 5, GRIDS[0], 9), METHODS["sparsevlm+"], []
    choose = type(method).choose

    def watched(self, context):
        seen.append((context, choose(self, context)))
        return seen[-1][1]

    monkeypatch.setattr(type(method), "choose", watched)
    prefill = engine.prefill(prompt, "sparsevlm+", max_ratio=0.3)
    assert [len(context.visual) for context, _ in seen] == [
        54,
        int(0.3 * 300 / 118 * 54),
        int(0.3 * 200 / 118 * 54),
    ]
    assert int(prefill.kept.sum()) == int(0.3 * 54)
    context, decision = seen[0]
    (stop, *_), visual = method.layers(engine.model), prompt.visual
    weights = attentions(tiny_folder, engine, prompt, GRIDS[0])[stop - 1][0]
    ones = TORCH.rotate(torch.ones(len(prompt), 1, 8), mrope(prompt.positions, TEXT_CONFIG))[:, 0]
    raters = method.raters(context, 0, context.vision.visual)
    assert 1 < len(raters) < 9
    score = (weights / (ones @ ones.T))[:, raters][:, :, visual].sum(1)
    heads = score.sum(1).argsort(descending=True)[:3]
    order = score[heads].mean(0).argsort(descending=True)
    expected = torch.zeros(54, dtype=torch.bool)
    expected[order[: len(seen[1][0].visual)]] = True
    assert torch.equal(decision.kept, expected)
    rows = context.batch.visual_rows[decision.kept]
    assert torch.equal(decision.values, context.hidden[rows])


@pytest.mark.slow
def test_attention_of_chosen_rows_is_causal_and_of_one_prompt(tiny_folder, engine):
    """Rows of the second prompt of a batch, against whole matrices of that prompt alone."""
    prompts = [prompt_of(engine, 4, seed=1), prompt_of(engine, 5, GRIDS[0], 9)]
    looks = []

    class Spy(PruningMethod):
        name, about, budget = "spy", "", "adaptive"

        def layers(self, model):
            return (2,)

        def needs(self, model):
            return Needs(attention=(1,))

        def choose(self, context):
            looks.extend(context.layers[1].attention(torch.tensor([8, 20, 66]), 1))
            return Decision(torch.ones(54, dtype=torch.bool))

    engine.prefill_many(prompts, Spy())
    expected = attentions(tiny_folder, engine, prompts[1], GRIDS[0])[1][0]
    for row, weights in zip((4, 16, 62), looks, strict=True):
        torch.testing.assert_close(weights.T, expected[:, row, : row + 1])


def test_changes_are_those_of_one_place():
    """Two places, three pairs of frames: 1 − cosine to the pair before, the first above all."""
    x = torch.tensor([[1.0, 0], [0, 2], [1, 0], [2, 0], [0, 3], [-1, 0]])
    torch.testing.assert_close(changes(x, 3), torch.tensor([255.0, 255, 0, 1, 1, 2]))


def clip_of(engine, *parts, still=False):
    """A prompt of parts, 4-tuples being videos; all frames alike if `still`."""
    grids = [part[:3] for part in parts if not isinstance(part, int)]
    patches = patches_of(grids)
    if still:
        patches = patches[:32].repeat(len(patches) // 32, 1)
    return Prompt.from_tokens(chat_ids(*parts), patches, grids, 1.0, config=engine.config)


def test_evs_keeps_the_first_frames_and_what_changes(engine, monkeypatch):
    """Of 3 · 8 tokens: the first 8, then the most changed of the whole clip."""
    changed = torch.tensor([255.0] * 8 + [0, 1, 0, 0, 0, 0, 0, 0] + [0, 0, 3, 0, 0, 0, 0, 2])
    monkeypatch.setattr("nanoglimpse.methods.evs.changes", lambda x, frames: changed)
    prompt = clip_of(engine, 2, (3, 4, 8, "video"), 5)
    kept = [
        engine.prefill(prompt, "evs", max_ratio=ratio).kept.nonzero().flatten().tolist()
        for ratio in (0.01, 10 / 24, 12 / 24)
    ]
    first = list(range(8))
    assert kept == [first, [*first, 18, 23], [*first, 8, 9, 18, 23]]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (((3, 4, 8, "video"), (1, 4, 8), (1, 4, 8)), [(24, 3), (16, 2)]),
        (((1, 4, 8), (3, 4, 8, "video"), (1, 4, 8)), [(8, 1), (24, 3), (8, 1)]),
        (((1, 4, 8), (1, 8, 4), (1, 8, 4)), [(8, 1), (16, 2)]),
        (((2, 4, 8, "video"), (2, 4, 8, "video")), [(16, 2), (16, 2)]),
        ((9,), []),
    ],
    ids=str,
)
def test_neighbouring_pictures_of_one_size_are_a_clip(engine, monkeypatch, parts, expected):
    seen = []

    def watched(context):
        found = list(clips(context))
        seen.extend((own.stop - own.start, frames) for own, frames in found)
        return found

    monkeypatch.setattr("nanoglimpse.methods.evs.clips", watched)
    prefill = engine.prefill(clip_of(engine, 2, *parts, 5), "evs", max_ratio=0.1)
    assert seen == expected
    assert int(prefill.kept.sum()) == sum(count // frames for count, frames in expected)


def test_evs_of_frames_that_are_alike(engine):
    prompt = clip_of(engine, 2, (4, 4, 8, "video"), 5, still=True)
    kept = engine.prefill(prompt, "evs", max_ratio=0.5).kept
    assert int(kept.sum()) == 16
    assert bool(kept[:8].all())


def test_likeness_by_hand():
    """Text 0 is liked by one of two tokens, text 1 by none: text 0 alone rates."""
    seen, text = torch.tensor([[2.0, 0], [0, 0]]), torch.tensor([[3.0, 0], [0, 1], [0, -1]])
    raised = math.exp(6 / 2**0.5)
    expected = torch.tensor([raised / (raised + 2), 1 / 3])
    torch.testing.assert_close(likeness(seen, text), expected)
    assert likeness(seen, text[:0]).tolist() == [0, 0]


def test_condensing_counts_and_means():
    """Of 30 tokens 12 stay: the best 10, and two means of all others."""
    values, score = torch.randn(30, 3), torch.arange(30.0)
    before = values.clone()
    chosen = condense(values, score, 12)
    assert len(chosen.unique()) == 12
    assert sorted(chosen.tolist())[2:] == list(range(20, 30))
    centres = sorted(set(chosen.tolist()) - set(range(20, 30)))
    _, member = density_peaks(before[:20], 2)
    means = {tuple((before[:20][member == i].mean(0) * 1e4).round().tolist()) for i in (0, 1)}
    assert {tuple((values[c] * 1e4).round().tolist()) for c in centres} == means
    assert torch.equal(values[20:], before[20:])
    assert condense(values, score, 30).tolist() == list(range(30))
    assert condense(values, score, 1).tolist() == [29]


def test_polymorphic_goes_on_with_means(engine, monkeypatch):
    """What a stage in the decoder makes of the rows that stay reaches the layers behind it."""
    factor = 1.0

    def scaled(values, score, allowed):
        values *= factor
        return torch.arange(min(allowed, len(values)))

    monkeypatch.setattr("nanoglimpse.methods.polymorphic.condense", scaled)
    monkeypatch.setattr(type(METHODS["polymorphic"]), "layers", lambda self, model: [1, 2, 3, 4])
    monkeypatch.setattr(
        type(METHODS["polymorphic"]), "choose", lambda self, context: self._by_text(context, 0.5)
    )
    prompt = prompt_of(engine, 3, (1, 8, 10), 6)
    same = engine.prefill(prompt, "polymorphic", max_ratio=0.5).logits
    factor = 0.0
    assert not torch.equal(engine.prefill(prompt, "polymorphic", max_ratio=0.5).logits, same)


def test_polymorphic_falls_by_equal_shares(engine):
    """Twice the mean first; each later stage leaves the same share of the one before."""
    method, depth = METHODS["polymorphic"], engine.config.text_config.num_hidden_layers
    assert method.layers(engine.model) == [0, 1, 2, 3]
    levels = method.levels(engine.model)
    assert [a / b for a, b in pairwise(levels)] == pytest.approx([levels[2]] * 3)
    held = levels[0] + levels[1] + levels[2] + 3 * levels[3]
    assert levels[0] == pytest.approx(2 * held / depth)
    prompt = prompt_of(engine, 3, (1, 16, 16), 6)
    prefill = engine.prefill(prompt, "polymorphic", max_ratio=0.25, kv_drop="later")
    assert prefill.budgets.input_ratio == pytest.approx(0.5, abs=1 / 64)
    assert prefill.budgets.decode_kv_ratio == pytest.approx(0.25, abs=2 / 64)
    assert prefill.budgets.prefill_ratio == prefill.budgets.decode_kv_ratio


BEFORE = ["visionzip", "vispruner", "divprune", "cdpruner", "tome", "prumerge", "prumerge+"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BEFORE)
def test_pruning_before_the_decoder_is_a_shorter_prompt(tiny_folder, engine, monkeypatch, name):
    """As transformers reads the embeddings that are left, at the positions that they had."""
    prompt, method, choices = prompt_of(engine, 4, *GRIDS, 5), METHODS[name], []
    choose = type(method).choose

    def watched(self, context):
        choices.append(choose(self, context))
        return choices[-1]

    monkeypatch.setattr(type(method), "choose", watched)
    ours = engine.prefill(prompt, name, max_ratio=0.3)
    (decision,), stays = choices, ~prompt.visual
    assert 0 < int(decision.kept.sum()) < 74
    stays[prompt.visual] = decision.kept
    embeds = engine.decoder.embed_tokens(prompt.token_ids)
    embeds[prompt.visual.nonzero().flatten()[decision.kept]] = (
        ours.visual[decision.kept] if decision.values is None else decision.values
    )
    model = reference.hf_model(tiny_folder)
    with torch.no_grad():
        hidden = model.model.language_model(
            inputs_embeds=embeds[stays][None], position_ids=prompt.positions[:, None, stays]
        ).last_hidden_state
        expected = model.lm_head(hidden[0, -1])
    torch.testing.assert_close(ours.logits, expected, rtol=1e-4, atol=1e-4)


LAYOUTS = {
    "picture first": (GRIDS[0], 6),
    "picture last": (4, GRIDS[0]),
    "text between": (3, GRIDS[1], 2, GRIDS[0], 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("parts", LAYOUTS.values(), ids=LAYOUTS)
def test_positions_are_kept_wherever_pictures_stand(engine, name, parts):
    prompt = prompt_of(engine, *parts)
    evidence = [torch.arange(int(prompt.visual.sum())) % 4 == 0]
    prefill = engine.prefill(prompt, name, evidence=evidence, **cap(name, 0.3))
    stays = ~prompt.visual
    stays[prompt.visual] = prefill.kept
    assert torch.equal(prefill.positions, prompt.positions[:, stays])
    assert prefill.cache.next_position.tolist() == [int(prompt.positions.max()) + 1]
    assert prefill.cache.lengths == [int(stays.sum())]


# Shares that 0.3 of 74 visual tokens make of each layer's, by hand from the papers' schedules.
SCHEDULES = {
    "fastv": [74] * 2 + [22] * 4,
    "attention": [74] * 4 + [22] * 2,
    "random": [74] * 4 + [22] * 2,
    "nothing": [74] * 4 + [0] * 2,
    "vtw": [74] * 3 + [0] * 3,
    "divprune": [16 + 6] * 6,
    "sparsevlm": [74] + [int(0.3 * 300 / 110 * 74)] + [int(0.3 * 200 / 110 * 74)] + [22] * 3,
    "sparsevlm+": [74] + [int(0.3 * 300 / 118 * 74)] + [int(0.3 * 200 / 118 * 74)] + [22] * 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_hand(engine, name):
    """What each layer of six processes, and what decoding finds in the caches."""
    prompt, counts = prompt_of(engine, 3, *GRIDS, 6), SCHEDULES[name]
    prefill = engine.prefill(prompt, name, **cap(name, 0.3))
    assert [one for (one,) in prefill.processed] == counts
    assert prefill.budgets.prefill_ratio == pytest.approx(sum(counts) / 6 / 74)
    assert prefill.budgets.decode_kv_ratio == pytest.approx(counts[-1] / 74)
    held = [len(prefill.cache.layer(layer)[0]) for layer in range(6)]
    assert held == [len(prompt) - 74 + counts[-1]] * 6
    if METHODS[name].budget == "cap":
        return
    later = engine.prefill(prompt, name, kv_drop="later")
    held = [len(later.cache.layer(layer)[0]) for layer in range(6)]
    assert held == [len(prompt) - 74 + count for count in counts]
