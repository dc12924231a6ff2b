"""Pruning with its Triton kernels from end to end: results as with torch, in few launches.

Without a GPU they run in Triton's interpreter. The operations around pruning alone have kernels
here, so that it is fast enough.
"""

import sys
from dataclasses import replace

import pytest
import torch

from nanoglimpse import Prompt, load
from nanoglimpse.kernels.backends import select
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.methods.context import LayerAttention
from tests.helpers.tiny import chat_ids, patches_of, write_glimpse

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = select("triton", DEVICE)
PRUNING = {name: getattr(TRITON, name) for name in ("rope_append", "row_logits", "gather")}
BACKENDS = {"torch": TORCH, "kernels": replace(TORCH, rotate=TRITON.rotate, **PRUNING)}
# Rows of text, and grids of images and videos; the last one asks about no picture.
PROMPTS = {
    "image": [(3, (1, 12, 18), 5)],
    "video": [(4, (3, 8, 10, "video"), 3, (1, 8, 6), 6)],
    "ragged": [
        (3, (1, 12, 18), 5),
        (2, (1, 10, 6), 1, (1, 6, 20), 9),
        (6, (3, 4, 4, "video"), 2),
        (11,),
    ],
}


@pytest.fixture(scope="module")
def engines(tiny_folder):
    return {
        name: load(tiny_folder, dtype="float32", device=DEVICE.type, backend=ops)
        for name, ops in BACKENDS.items()
    }


def prompts_of(engine, name):
    prompts = []
    for seed, parts in enumerate(PROMPTS[name]):
        grids = [part[:3] for part in parts if not isinstance(part, int)]
        ids = chat_ids(*parts, seed=seed)
        patches = patches_of(grids, seed) if grids else None
        prompts.append(Prompt.from_tokens(ids, patches, grids, config=engine.config))
    return prompts


def same(ours, expected):
    """Importance up to rounding, and where it is apart from the threshold all that follows."""
    if expected.importance is not None:
        torch.testing.assert_close(ours.importance, expected.importance, rtol=1e-4, atol=1e-5)
    if expected.glimpse_logits is not None:
        apart = (expected.importance.sigmoid() - 0.5).abs()
        assert float(apart.min()) > 1e-5, "the case cannot tell rounding from a fault"
        pair = (ours.glimpse_logits, expected.glimpse_logits)
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.kept, expected.kept)
    assert torch.equal(ours.positions, expected.positions)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for layer in range(6):
        for sequence in range(len(torch.atleast_2d(expected.logits))):
            for own, truth in zip(
                ours.cache.layer(layer, sequence),
                expected.cache.layer(layer, sequence),
                strict=True,
            ):
                torch.testing.assert_close(own, truth, rtol=1e-4, atol=1e-5)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kv_drop", ["all", "later"])
@pytest.mark.parametrize("method", ["glimpse", "attention"])
def test_pruning_is_that_of_torch(engines, name, kv_drop, method):
    """Inside layer K with kernels, and after its end with torch, which a trace waits for."""
    told = {"kv_drop": kv_drop} | ({"max_ratio": 0.8} if method == "attention" else {})
    ours, expected = (
        engine.prefill_many(prompts_of(engine, name), method, max_new_tokens=3, trace=trace, **told)
        for engine, trace in ((engines["kernels"], False), (engines["torch"], True))
    )
    assert same(ours, expected)
    assert 0 < int(ours.kept.sum()) < len(ours.kept)
    # The steps after it read headroom that pruning has left behind each prompt.
    steps = [
        [*engine.decode_many(prefill, 3, ignore_eos=True)]
        for engine, prefill in ((engines["kernels"], ours), (engines["torch"], expected))
    ]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_several_layers_are_scored(tiny_folder, tmp_path):
    """The last one while it is written, the other from its cached keys."""
    write_glimpse(tmp_path, tiny_folder, selected_layers=[1, 3])
    engines = [
        load(tiny_folder, glimpse=tmp_path, dtype="float32", device=DEVICE.type, backend=ops)
        for ops in BACKENDS.values()
    ]
    expected, ours = (
        engine.prefill_many(prompts_of(engine, "ragged"), trace=trace)
        for engine, trace in zip(engines, (True, False), strict=True)
    )
    assert same(ours, expected)


@pytest.mark.slow
def test_a_further_question_is_that_of_torch(engines):
    """The keys of the picture are cached; all keys are scored in one launch."""
    prefills = []
    for engine in (engines["kernels"], engines["torch"]):
        (prompt,) = prompts_of(engine, "video")
        session = engine.session(prompt)
        prefills.append([session.prefill([*chat_ids(n, seed=n), 7, 8]) for n in (5, 1, 9)])
    for ours, expected in zip(*prefills, strict=True):
        assert same(ours, expected)


@pytest.mark.slow
def test_a_trace_is_that_of_torch(engines):
    ours, expected = (
        engines[name].prefill_many(prompts_of(engines[name], "ragged"), trace=True)
        for name in ("kernels", "torch")
    )
    assert same(ours, expected)
    torch.testing.assert_close(ours.hidden, expected.hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "ragged"])
def test_scores_on_the_way_are_those_of_the_cached_keys(engines, name, monkeypatch):
    """The selection reads the same logits whether keys are scored when written or afterwards."""
    logits, looks = LayerAttention.logits, []

    def look(self, rows):
        assert self.scores is not None
        cached = replace(self, scores=None)
        looks.append((logits(self, rows), logits(cached, rows)))
        # Other rows than those that were scored are scored when they are asked for.
        assert torch.equal(logits(self, rows - 1), logits(cached, rows - 1))
        return looks[-1][0]

    monkeypatch.setattr(LayerAttention, "logits", look)
    for engine in engines.values():
        engine.prefill_many(prompts_of(engine, name))
    assert len(looks) == 2
    for written, cached in looks:
        torch.testing.assert_close(written, cached, rtol=1e-6, atol=1e-6)


@pytest.fixture
def launched(monkeypatch):
    """The names of launched kernels, and products, in order."""
    names = []
    for name, module in list(sys.modules.items()):
        if name.startswith("nanoglimpse.kernels.triton_ops.") and hasattr(module, "launch"):

            def launch(kernel, grid, *args, run=module.launch, **options):
                names.append(kernel.fn.__name__.strip("_"))
                return run(kernel, grid, *args, **options)

            monkeypatch.setattr(module, "launch", launch)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "ragged"])
def test_launches_between_the_last_keys_and_the_tail(engines, name, launched, monkeypatch):
    """One writes and scores the keys of layer K, and one attends and gathers."""
    engine = engines["kernels"]
    choose = engine.model.glimpse_weights.predictor.forward
    block = engine.decoder.layers[3]
    product, output = block.qkv.slice, block.output
    monkeypatch.setattr(
        block.qkv, "slice", lambda *args: launched.append("product") or product(*args)
    )
    monkeypatch.setattr(block, "output", lambda *args: launched.append("tail") or output(*args))
    monkeypatch.setattr(
        engine.model.glimpse_weights.predictor,
        "forward",
        lambda *args: launched.append("predictor") or choose(*args),
    )
    engine.prefill_many(prompts_of(engine, name))
    stretch = launched[: launched.index("tail")]
    # The q of the probes, then keys and values of all rows.
    first = stretch.index("product")
    assert stretch[first : first + 4] == ["product", "rope_kernel", "product", "rope_kernel"]
    predictor = stretch.index("predictor", first)
    assert predictor == first + 4
    # The predictor's own rotations are launches, too.
    last = len(stretch) - stretch[::-1].index("product") - 1
    assert set(stretch[predictor + 1 : last]) <= {"rope_kernel"}
    # The q of the survivors.
    assert stretch[last:] == ["product", "rope_kernel", "attention_kernel"]


@pytest.mark.slow
def test_cached_keys_are_scored_in_one_launch(engines, launched):
    """Of a session's prefix, and of a batch whose layer has run to its end."""
    engine = engines["kernels"]
    (prompt,) = prompts_of(engine, "image")
    session = engine.session(prompt)
    scored = []
    ops = engine.model.ops
    for block in engine.decoder.layers:

        def count(*args, run=ops.row_logits):
            before = len(launched)
            out = run(*args)
            scored.append(len(launched) - before)
            return out

        block.ops = replace(ops, row_logits=count)
    try:
        session.prefill([*chat_ids(5), 7, 8])
        engine.prefill_many(prompts_of(engine, "ragged"), trace=True)
    finally:
        for block in engine.decoder.layers:
            block.ops = ops
    assert scored == [1, 1]
