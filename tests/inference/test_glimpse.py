"""GlimpsePrune against a second implementation on transformers' modules, and its properties."""

import dataclasses

import pytest
import torch

from nanoglimpse import Prompt, UsageError, load
from nanoglimpse.methods.context import SelectionRule
from nanoglimpse.weights.glimpse import read_tensors
from tests.helpers import reference
from tests.helpers.tiny import GLIMPSE, chat_ids, patches_of, write_glimpse

# Grids in patches: partial windows on both sides, one window alone, a column of cells.
GRIDS = {
    "partial windows": [(1, 12, 18)],
    "one window": [(1, 8, 8)],
    "thin": [(1, 2, 22)],
    "two images": [(1, 10, 6), (1, 6, 20)],
}


def prompt_of(engine, *parts, seed=0):
    grids = [part for part in parts if not isinstance(part, int)]
    ids = chat_ids(*parts, seed=seed)
    return Prompt.from_tokens(ids, patches_of(grids, seed), grids, config=engine.config)


@pytest.fixture(scope="module")
def hf(tiny_folder):
    # In fp32 its own rounding, which varies with the BLAS, is more of the tolerance than ours.
    return reference.hf_model(tiny_folder).double()


def close(ours, theirs, tolerance=1e-5):
    scale = theirs.abs().max().clamp_min(1.0)
    apart = (ours.to(theirs.dtype) - theirs) / scale
    torch.testing.assert_close(apart, torch.zeros_like(apart), rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attn_fuse_global": False},
        {"use_attention_logits": False},
        {"selected_layers": [1, 3]},
        {"le_layers": [0, 2]},
        {"reduce_layer": 5, "selected_layers": [5]},
        {"reduce_layer": 0, "selected_layers": [0]},
    ],
    ids=[
        "released",
        "windows",
        "log-softmax",
        "two layers",
        "some vectors",
        "last layer",
        "first layer",
    ],
)
def test_every_stage_equals_the_reference(tiny_folder, hf, tmp_path, name, change):
    config = write_glimpse(tmp_path, tiny_folder, **change)
    engine = load(tiny_folder, glimpse=tmp_path, dtype="float32", device="cpu", backend="torch")
    _, tensors = read_tensors(tmp_path)
    grids = GRIDS[name]
    prompt = prompt_of(engine, 5, *grids, 7)
    rule = {"max_ratio": 0.8, "min_tokens": 2}
    ours = engine.prefill(prompt, method="glimpse", trace=True, **rule)
    theirs = reference.run(
        hf, tensors, config, prompt.token_ids, prompt.patches, grids, new_tokens=12, **rule
    )
    for stage in ("visual", "taps", "glimpse_logits", "importance", "hidden", "logits"):
        close(getattr(ours, stage), getattr(theirs, stage))
    assert torch.equal(ours.kept, theirs.kept)
    assert 0 < int(ours.kept.sum()) < len(ours.kept), "the case prunes nothing or everything"
    assert torch.equal(ours.positions, theirs.positions)
    for layer, (k, v) in enumerate(zip(theirs.keys, theirs.values, strict=True)):
        own_k, own_v = ours.cache.layer(layer)
        close(own_k, k)
        close(own_v, v)
    assert list(engine.decode(ours, 12, ignore_eos=True)) == theirs.tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threshold", "max_ratio", "min_tokens"),
    [(0.5, None, 1), (0.5, 0.2, 1), (0.9, 0.02, 0), (1.0, None, 0), (0.99, 0.1, 9), (0.2, 0.5, 3)],
)
def test_rule_options_reach_the_answer(tiny_folder, tiny, hf, threshold, max_ratio, min_tokens):
    _, tensors = read_tensors(tiny_folder / "glimpse")
    rule = {"threshold": threshold, "max_ratio": max_ratio, "min_tokens": min_tokens}
    grids = [(1, 12, 18)]
    prompt = prompt_of(tiny, 4, *grids, 6, seed=3)
    ours = tiny.prefill(prompt, **rule)
    theirs = reference.run(
        hf, tensors, GLIMPSE, prompt.token_ids, prompt.patches, grids, new_tokens=6, **rule
    )
    assert torch.equal(ours.kept, theirs.kept)
    close(ours.logits, theirs.logits)
    assert list(tiny.decode(ours, 6, ignore_eos=True)) == theirs.tokens


P = [0.9, 0.1, 0.6, 0.5, 0.8, 0.55]
# importance in probabilities, then the rule, then the mask that the paper's code gives (3.6)
SELECTIONS = [
    ("threshold is strict", P, {}, [1, 0, 1, 0, 1, 1]),
    ("cap not reached", P, {"max_ratio": 0.7}, [1, 0, 1, 0, 1, 1]),
    ("cap keeps exactly int(ratio N)", P, {"max_ratio": 0.5}, [1, 0, 1, 0, 1, 0]),
    ("cap rounds down", P, {"max_ratio": 0.34}, [1, 0, 0, 0, 1, 0]),
    ("cap of nothing, minimum one", P, {"max_ratio": 0.1}, [1, 0, 0, 0, 0, 0]),
    ("cap of nothing, no minimum", P, {"max_ratio": 0.1, "min_tokens": 0}, [0] * 6),
    ("minimum beats cap", P, {"max_ratio": 0.2, "min_tokens": 3}, [1, 0, 1, 0, 1, 0]),
    ("minimum joins", P, {"threshold": 0.85, "min_tokens": 2}, [1, 0, 0, 0, 1, 0]),
    ("minimum above N", P, {"threshold": 0.85, "min_tokens": 99}, [1] * 6),
    ("no minimum", [0.1] * 6, {"min_tokens": None}, [0] * 6),
    ("ties go to the first", [0.7] * 6, {"max_ratio": 0.5}, [1, 1, 1, 0, 0, 0]),
    (
        "anchors come last",
        [0.1] * 6,
        {"anchors": ("tl", "br"), "min_tokens": 0},
        [1, 0, 0, 0, 0, 1],
    ),
    ("anchors exceed the cap", P, {"max_ratio": 0.2, "anchors": ("bl", "tr")}, [1, 0, 1, 1, 0, 0]),
]


@pytest.mark.parametrize(
    ("probabilities", "rule", "mask"), [s[1:] for s in SELECTIONS], ids=[s[0] for s in SELECTIONS]
)
def test_selection_table(probabilities, rule, mask):
    importance = torch.tensor(probabilities, dtype=torch.float64).logit()
    kept = SelectionRule(**rule)(importance.float(), [(2, 3)])
    assert kept.int().tolist() == mask


def test_selection_pools_images_and_anchors_each():
    importance = torch.tensor([9.0, -9, -9, -9, 8, 7, -9, -9, -9, -9])
    rule = SelectionRule(max_ratio=0.2, anchors=("br",))
    kept = rule(importance, [(2, 2), (2, 3)])
    assert kept.nonzero().flatten().tolist() == [0, 3, 4, 9]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pdrop", "vscan"])
def test_corners_of_the_weights_are_not_for_methods_that_look_again(tiny_folder, tmp_path, method):
    write_glimpse(tmp_path, tiny_folder, anchor_positions=["br"])
    engine = load(tiny_folder, glimpse=tmp_path, dtype="float32", device="cpu")
    prompt = prompt_of(engine, 5, (1, 12, 18), 7)
    plain = load(tiny_folder, dtype="float32", device="cpu")
    kept = engine.prefill(prompt, method, max_ratio=0.3).kept
    assert torch.equal(kept, plain.prefill(prompt, method, max_ratio=0.3).kept)
    assert bool(engine.prefill(prompt, "random", max_ratio=0.1).kept[-1])


def test_selection_of_nothing():
    assert SelectionRule(max_ratio=0.5)(torch.empty(0), []).shape == (0,)


@pytest.mark.parametrize(
    "rule",
    [
        {"threshold": 1.5},
        {"max_ratio": -0.1},
        {"max_ratio": 2},
        {"min_tokens": -1},
        {"anchors": "x"},
    ],
)
def test_selection_refuses_nonsense(rule):
    with pytest.raises(UsageError):
        SelectionRule(**rule)


def test_keep_all_equals_dense(tiny):
    prompt = prompt_of(tiny, 3, (1, 12, 18), 5)
    dense = tiny.prefill(prompt, method="dense")
    everything = tiny.prefill(prompt, method="glimpse", min_tokens=10**6)
    assert bool(everything.kept.all())
    close(everything.logits, dense.logits)
    for layer in range(6):
        for ours, theirs in zip(
            everything.cache.layer(layer), dense.cache.layer(layer), strict=True
        ):
            close(ours, theirs)
    assert list(tiny.decode(everything, 8, True)) == list(tiny.decode(dense, 8, True))


def test_every_layer_of_the_cache_holds_the_same_rows(tiny):
    prompt = prompt_of(tiny, 3, (1, 12, 18), 5)
    prefill = tiny.prefill(prompt)
    rows = len(prompt) - len(prefill.kept) + int(prefill.kept.sum())
    assert rows < len(prompt)
    assert [len(prefill.cache.layer(layer)[0]) for layer in range(6)] == [rows] * 6
    assert prefill.positions.shape == (3, rows)
    assert int(prefill.cache.next_position) == int(prompt.positions.max()) + 1


@pytest.mark.slow
def test_prompt_rows_do_not_see_the_glimpse_row(tiny_folder):
    """Bit for bit: other glimpse vectors, the same prompt."""
    engine = load(tiny_folder, dtype="float32", device="cpu")
    prompt = prompt_of(engine, 3, (1, 12, 18), 5)
    before = engine.prefill(prompt, trace=True).hidden
    engine.glimpse.vectors = torch.nn.Parameter(torch.randn_like(engine.glimpse.vectors))
    assert torch.equal(engine.prefill(prompt, trace=True).hidden, before)


@pytest.mark.slow
def test_a_second_call_begins_anew(tiny):
    """The official code keeps state on the model and needs a reset before every call (3.15)."""
    prompt, other = prompt_of(tiny, 3, (1, 12, 18), 5), prompt_of(tiny, 8, (1, 6, 6), 2, seed=5)
    first = list(tiny.decode(tiny.prefill(prompt), 10, True))
    tiny.prefill(other)
    prefill = tiny.prefill(prompt)
    assert list(tiny.decode(prefill, 10, True)) == first
    assert list(tiny.decode(prefill, 10, True)) == first, "the same prefill, decoded twice"


def test_text_only_prompts_pass_through(tiny):
    prompt = prompt_of(tiny, 9)
    pruned, dense = (tiny.prefill(prompt, method=name) for name in ("glimpse", "dense"))
    close(pruned.logits, dense.logits)
    assert pruned.kept.shape == (0,)
    assert dataclasses.astuple(pruned.budgets) == (1.0, 1.0, 1.0)
    assert list(tiny.decode(pruned, 6, True)) == list(tiny.decode(dense, 6, True))


def test_nothing_kept_still_answers(tiny):
    prompt = prompt_of(tiny, 3, (1, 12, 18), 5)
    prefill = tiny.prefill(prompt, threshold=1.0, min_tokens=0)
    assert int(prefill.kept.sum()) == 0
    assert len(list(tiny.decode(prefill, 5, True))) == 5


def test_videos_may_be_left_whole(tiny):
    """As in the official code (3.14, 11): only the tokens of images can go."""
    video, image = (3, 8, 10, "video"), (1, 12, 8)
    ids = chat_ids(4, video, 3, image, 6)
    grids = [video[:3], image]
    prompt = Prompt.from_tokens(ids, patches_of(grids), grids, 0.5, config=tiny.config)
    prefill = tiny.prefill(prompt, max_ratio=0.1, prune_videos=False)
    of_video, of_image = prefill.kept.split([60, 24])
    assert bool(of_video.all())
    assert int(of_image.sum()) == 2


def test_budgets_are_those_of_the_closed_form(tiny):
    """methods 1.5: input 1, prefill (K + (L-K) ρ) / L, decode-KV ρ."""
    prefill = tiny.prefill(prompt_of(tiny, 3, (1, 12, 18), 5), max_ratio=0.3)
    ratio = float(prefill.kept.float().mean())
    assert dataclasses.astuple(prefill.budgets) == pytest.approx((1, (4 + 2 * ratio) / 6, ratio))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["glimpse", "dense"])
def test_a_batch_equals_each_prompt_alone(tiny, method):
    """The official code decodes all rows of a batch at the last one's position (3.15)."""
    prompts = [
        prompt_of(tiny, 3, (1, 12, 18), 5, seed=1),
        prompt_of(tiny, 11, seed=2),
        prompt_of(tiny, 2, (1, 10, 6), 1, (1, 6, 20), 9, seed=3),
        prompt_of(tiny, 6, (1, 4, 4), 2, seed=4),
    ]
    together = tiny.prefill_many(prompts, method, max_new_tokens=16)
    alone = [tiny.prefill(prompt, method) for prompt in prompts]
    assert torch.equal(together.kept, torch.cat([one.kept for one in alone]))
    for number, one in enumerate(alone):
        close(together.logits[number], one.logits)
        for layer in range(6):
            for ours, theirs in zip(
                together.cache.layer(layer, number), one.cache.layer(layer), strict=True
            ):
                close(ours, theirs)
    steps = list(tiny.decode_many(together, 16, ignore_eos=True))
    for number, one in enumerate(alone):
        assert [step[number] for step in steps] == list(tiny.decode(one, 16, ignore_eos=True))


@pytest.mark.slow
def test_log_probabilities_are_those_of_each_prompt(tiny_folder, tmp_path):
    """Of all images of a prompt together, and whatever else is in the batch."""
    write_glimpse(tmp_path, tiny_folder, use_attention_logits=False)
    engine = load(tiny_folder, glimpse=tmp_path, dtype="float32", device="cpu")
    prompts = [
        prompt_of(engine, 3, (1, 12, 18), 5, seed=1),
        prompt_of(engine, 11, seed=2),
        prompt_of(engine, 2, (1, 10, 6), 1, (1, 6, 20), 9, seed=3),
    ]
    together = engine.prefill_many(prompts)
    alone = [engine.prefill(prompt) for prompt in prompts]
    close(together.importance, torch.cat([one.importance for one in alone]))
    last = alone[2]
    with torch.inference_mode():
        predictor = engine.glimpse.predictor
        conditions = predictor.condition(last.taps)
        higher = predictor(last.glimpse_logits + 9, conditions, prompts[2].grids, [len(last.kept)])
    close(higher, last.importance)


@pytest.mark.slow
def test_gradients_flow_after_inference(tiny_folder):
    """The modules that infer also train; what inference has cached must not stand in the way."""
    engine = load(tiny_folder, dtype="float32", device="cpu", backend="torch")
    grid = (1, 12, 18)
    prompt = prompt_of(engine, 3, grid, 5)
    prefill = engine.prefill(prompt)
    patches = prompt.patches.clone().requires_grad_()
    visual, taps = engine.vision(patches, [grid], (4, 2, 1))
    predictor = engine.glimpse.predictor.requires_grad_(True)
    conditions = predictor.condition(taps)
    importance = predictor(prefill.glimpse_logits.clone(), conditions, [grid], [len(prefill.kept)])
    torch.testing.assert_close(importance, prefill.importance.clone())
    (importance.sum() + visual.square().sum()).backward()
    assert float(patches.grad.abs().sum()) > 0
    assert all(float(p.grad.abs().sum()) > 0 for p in predictor.parameters())
