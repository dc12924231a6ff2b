"""Pruning methods: what they keep, and that the engine does with it what it should."""

import pytest
import torch

from nanoglimpse import Prompt, UsageError, load
from nanoglimpse.batch import Batch
from nanoglimpse.cache import Cache
from nanoglimpse.kernels.ops import Packing
from nanoglimpse.methods import METHODS, Choice, Method
from nanoglimpse.rope import mrope

from . import reference
from .tiny import chat_ids, patches_of

GRIDS = [(1, 12, 18), (1, 8, 10)]
CAPPED = [name for name, method in METHODS.items() if method.capped]


@pytest.fixture(scope="module")
def engine(tiny_folder):
    return load(tiny_folder, dtype="float32", device="cpu")


def prompt_of(engine, *parts, seed=0):
    grids = [part for part in parts if not isinstance(part, int)]
    ids = chat_ids(*parts, seed=seed)
    return Prompt.from_tokens(ids, patches_of(grids, seed), grids, config=engine.config)


@pytest.mark.parametrize("name", CAPPED)
def test_keeping_all_is_dense(engine, name):
    prompt = prompt_of(engine, 3, *GRIDS, 6)
    dense, all_kept = engine.prefill(prompt, "dense"), engine.prefill(prompt, name, max_ratio=1)
    assert bool(all_kept.kept.all())
    torch.testing.assert_close(all_kept.logits, dense.logits, rtol=0, atol=1e-5)
    assert list(engine.decode(all_kept, 6)) == list(engine.decode(dense, 6))


@pytest.mark.parametrize("name", CAPPED)
@pytest.mark.parametrize("ratio", [0.05, 1 / 9, 0.5])
def test_the_budget_is_met(engine, name, ratio):
    prompt = prompt_of(engine, 3, *GRIDS, 6)
    prefill = engine.prefill(prompt, name, max_ratio=ratio)
    total = len(prefill.kept)
    depth, (stop,) = engine.config.text_config.num_hidden_layers, METHODS[name].stops(engine)
    kept = int(prefill.kept.sum())
    assert kept == int(ratio * total)
    assert prefill.budgets.decode_kv_ratio == pytest.approx(kept / total)
    expected = (stop + (depth - stop) * kept / total) / depth
    assert prefill.budgets.prefill_ratio == pytest.approx(expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_each_prompt_alone(engine, name):
    prompts = [
        prompt_of(engine, 4, GRIDS[0], 5),
        prompt_of(engine, 7, seed=1),
        prompt_of(engine, 1, *GRIDS, 2, seed=2),
    ]
    masks = [torch.arange(sum(h * w // 4 for _, h, w in p.grids)) % 5 == 0 for p in prompts]
    together = engine.prefill_many(prompts, name, evidence=masks, max_ratio=0.3, seed=[3, 4, 5])
    alone = [
        engine.prefill(p, name, evidence=[m], max_ratio=0.3, seed=seed)
        for p, m, seed in zip(prompts, masks, (3, 4, 5), strict=True)
    ]
    assert torch.equal(together.kept, torch.cat([one.kept for one in alone]))
    tokens = zip(*engine.decode_many(together, 8, ignore_eos=True), strict=True)
    for answer, one in zip(tokens, alone, strict=True):
        assert list(answer) == list(engine.decode(one, 8, ignore_eos=True))


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
    assert METHODS[name].stops(engine) == (layer,)
    assert torch.equal(engine.prefill(prompt, name, max_ratio=0.2).kept, expected)


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


def test_the_oracle_keeps_the_evidence(engine):
    prompt = prompt_of(engine, 3, GRIDS[0], 6)
    mask = torch.arange(54) % 7 == 2
    assert torch.equal(engine.prefill(prompt, "oracle", evidence=[mask]).kept, mask)
    with pytest.raises(UsageError, match="oracle needs the evidence"):
        engine.prefill(prompt, "oracle")


@pytest.mark.parametrize("name", CAPPED)
def test_a_share_has_to_be_given(engine, name):
    with pytest.raises(UsageError, match=f"{name} keeps a share.*max_ratio"):
        engine.prefill(prompt_of(engine, 3, GRIDS[0], 6), name)


class Staged(Method):
    """Before the decoder, after two layers and after four; each time other tokens go."""

    name, about, capped = "staged", "for this test", False

    def stops(self, engine):
        return (0, 2, 4)

    def reads(self, engine):
        return (3,)

    def choose(self, look):
        count = len(look.visual)
        assert look.taps.shape[1] == count == len(look.batch.visual_rows)
        if 3 in look.rows:
            assert len(look.rows[3]) == len(look.batch.token_ids)
        return Choice(torch.arange(count) % 3 != 1)


def test_a_method_may_look_several_times(engine, monkeypatch):
    """Against layers that run one by one, each with a cache of its own."""
    monkeypatch.setitem(METHODS, "staged", Staged())
    prompt = prompt_of(engine, 4, *GRIDS, 5)
    ours = engine.prefill(prompt, "staged")
    batch = Batch.of([prompt], engine.config, engine.device)
    decoder, layers = engine.decoder, []
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
            rope = mrope(prompt.positions[:, rows], engine.config.text_config)
            cache = Cache(
                engine.config.text_config, 1, [len(rows)], batch.next_position, hidden, engine.ops
            )
            own = cache.extend([len(rows)])
            hidden = decoder.layers[layer](hidden, rope, cache, 0, own, Packing([len(rows)]))
            layers.append((rows, *cache.layer(0)))
        logits = decoder.logits(hidden[-1:])[0]
    torch.testing.assert_close(ours.logits, logits)
    for layer, (had, k, v) in enumerate(layers):
        stay = torch.isin(had, rows)
        torch.testing.assert_close(ours.cache.layer(layer)[0], k[stay])
        torch.testing.assert_close(ours.cache.layer(layer)[1], v[stay])
    assert torch.equal(ours.positions, prompt.positions[:, rows])
    total = int(prompt.visual.sum())
    left = [total]
    for _ in range(3):
        left.append(left[-1] - len(range(1, left[-1], 3)))
    assert int(ours.kept.sum()) == left[3]
    expected = (2 * left[1] + 2 * left[2] + 2 * left[3]) / 6 / total
    assert ours.budgets.prefill_ratio == pytest.approx(expected)
    assert ours.budgets.input_ratio == pytest.approx(left[1] / total)
    assert len(list(engine.decode(ours, 5, ignore_eos=True))) == 5
