"""Every way to ask on a phantom GPU: the CPU's answers, no device left out, nothing copied slowly.

Lists of questions, files of sessions, videos, sampling and quantised matrices. `test_phantom.py`
has a single prefill and its answer.
"""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from nanoglimpse import Prompt, Sampling, Video, load
from nanoglimpse.inference import cuda_graph
from nanoglimpse.inference.scheduler import Scheduler
from tests.helpers import phantom
from tests.helpers.prompts import QUESTION, SCENE
from tests.helpers.tiny import chat_ids, config_dict, patches_of, write_checkpoint

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")

DEVICE = "cuda:1"
IMAGES = ((1, 8, 12), (1, 4, 14))
CLIP = (3, 6, 8, "video")
# Text, images of several sizes, videos, and neither.
LAYOUTS = (
    (3, IMAGES[0], 6),
    (9,),
    (2, IMAGES[1], 1, (1, 8, 10), 4),
    (5, CLIP, 8),
    (40,),
    (1, (1, 6, 6), 2, CLIP, 3, (1, 12, 4), 1),
)
DRAWN = Sampling(temperature=1.5, top_p=0.9, top_k=60, repetition_penalty=1.3, seed=3)


@pytest.fixture
def ledger(monkeypatch, tiny):
    monkeypatch.setattr(cuda_graph, "CAPACITY", 96)
    return phantom.install(monkeypatch)


def prompt_of(engine, layout, seed=0):
    """A prompt of lengths of text and of grids; "video" ends the grid of a video."""
    grids = [part for part in layout if not isinstance(part, int)]
    patches, ids = patches_of([g[:3] for g in grids], seed), chat_ids(*layout, seed=len(layout))
    return Prompt.from_tokens(ids, patches, [g[:3] for g in grids], 0.5, config=engine.config)


def asked_in_layouts(engine, monkeypatch):
    """The engine, asked in layouts instead of pictures and text; answers end where they differ."""
    monkeypatch.setattr(engine, "prompt", lambda images, layout: prompt_of(engine, layout))
    monkeypatch.setattr(engine.processor, "decode", lambda ids: " ".join(map(str, ids)))
    engine.model = replace(engine.model, eos_token_id=frozenset(range(0, 130, 7)))
    return engine


def told(answers):
    return [(a.token_ids, a.finish_reason, a.kept.tolist(), a.grids) for a in answers]


BATCHES = {
    "glimpse": {},
    "later": {"method": "pdrop", "max_ratio": 0.75, "kv_drop": "later"},
    "drawn": {"sampling": DRAWN},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "fused") for name in BATCHES), ("drawn", "torch")]
)
def test_lists_are_answered_as_on_the_cpu(ledger, monkeypatch, tiny_folder, name, backend):
    """Rows change hands as answers end; a step waits for its tokens alone."""
    options = {"max_new_tokens": 9, "max_batch_tokens": 170} | BATCHES[name]
    queries = [([], layout) for layout in LAYOUTS]
    cpu = asked_in_layouts(load(tiny_folder, device="cpu", dtype="float32"), monkeypatch)
    expected = told(cpu.ask_many(queries, **options))
    engine = phantom.engine_on(DEVICE, tiny_folder, dtype="float32", backend=backend)
    asked_in_layouts(engine, monkeypatch)
    step, waits = Scheduler._step, []

    def watched(self):
        before, ended = len(ledger.waits), step(self)
        waits.append(len(ledger.waits) - before)
        return ended

    monkeypatch.setattr(Scheduler, "_step", watched)
    with phantom.Mode():
        ledger.clear()
        answers = engine.ask_many(queries, **options)
        assert not ledger.pageable, ledger.pageable
        assert told(answers) == expected
    assert len({len(answer.token_ids) for answer in answers}) > 2
    assert set(waits) == {1}


def visuals():
    """Pictures of several sizes and a video, alone and together."""
    scene = Image.open(SCENE)
    small, tall = scene.resize((112, 84)), scene.resize((84, 168))
    clip = Video([scene.resize((112, 84)).rotate(angle) for angle in (0, 90, 180)])
    return [scene, tall, [small, tall], clip, [small, clip, tall]]


@pytest.mark.slow
def test_pictures_and_videos_are_read_as_on_the_cpu(ledger, nano):
    """Pixels travel as bytes and are normalised there."""
    queries, options = [(visual, QUESTION) for visual in visuals()], {"max_new_tokens": 4}
    expected = told(nano.ask_many(queries, max_batch_tokens=700, **options))
    engine = phantom.engine_on(DEVICE, "nano", dtype="float32", backend="fused")
    with phantom.Mode():
        ledger.clear()
        answers = engine.ask_many(queries, max_batch_tokens=700, **options)
        assert not ledger.pageable, ledger.pageable
        assert told(answers) == expected
        assert told([engine.ask(*queries[-1], **options)]) == expected[-1:]
        assert not ledger.pageable, ledger.pageable


SESSIONS = {
    "glimpse": {"threshold": 0.4},
    "glimpse, later": {"method": "glimpse", "threshold": 0.4, "kv_drop": "later"},
    "dense": {"method": "dense"},
    "vscan": {"method": "vscan", "max_ratio": 0.5},
    "random, later": {"method": "random", "max_ratio": 0.8, "kv_drop": "later", "seed": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "fused") for name in SESSIONS), ("random, later", "torch")]
)
def test_sessions_travel_between_devices(ledger, tiny_folder, tiny, tmp_path, name, backend):
    """A file of either device is a session of the other, and goes on with more pictures."""
    options = SESSIONS[name]

    def answers(engine, session):
        told = []
        for length in (5, 9):
            ledger.clear()
            prefill = session.prefill(prompt_of(engine, (length,)), max_new_tokens=3)
            told.append([*engine.decode(prefill, 3, ignore_eos=True, sampling=DRAWN, ahead=7)])
            assert not ledger.pageable, ledger.pageable
            # The counts of each decision, the first token, and the others.
            assert len(ledger.waits) <= len(session.pruning.layers) + 2, ledger.waits
            told.append(prefill.kept.tolist())
        return told

    def used(engine, theirs, own):
        """Answers before it is saved, loaded from the other device, and with more pictures."""
        session = engine.session(prompt_of(engine, (4, IMAGES[0], CLIP)), **options)
        told = answers(engine, session)
        session.save(own)
        for one in (engine.load_session(own), *([engine.load_session(theirs)] if theirs else [])):
            assert answers(engine, one) == told
            one.add(prompt_of(engine, ((1, 6, 8),), seed=3))
            more = answers(engine, one)
        return told, more

    ours, theirs = tmp_path / "phantom", tmp_path / "cpu"
    expected = used(tiny, None, theirs)
    engine = phantom.engine_on(DEVICE, tiny_folder, dtype="float32", backend=backend)
    with phantom.Mode():
        assert used(engine, theirs, ours) == expected
    again = tiny.load_session(ours)
    assert answers(tiny, again) == expected[0]


@pytest.fixture(scope="module")
def groups_folder(tmp_path_factory):
    """A tiny model whose matrices consist of whole groups of 64 columns."""
    folder = tmp_path_factory.mktemp("groups")
    sizes = {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_attention_heads": 8, "num_hidden_layers": 3, "vocab_size": 144}
    write_checkpoint(folder, config_dict(**sizes))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "kernels"), [("int8", ()), ("int4", ()), ("int4", ("skinny_linear", "dequantize"))]
)
def test_quantised_matrices_answer_as_on_the_cpu(ledger, groups_folder, mode, kernels):
    """Quantised on the device; their products by the references, and by kernels that run."""
    loading = {"dtype": "float32", "quantize": mode}
    cpu = load(groups_folder, device="cpu", **loading)
    ops, layouts = phantom.fused(*kernels), LAYOUTS[: 1 if kernels else 3]
    engine = phantom.engine_on(DEVICE, groups_folder, backend=ops, **loading)

    def answers(engine):
        prompts = [prompt_of(engine, layout) for layout in layouts]
        ledger.clear()
        prefill = engine.prefill_many(prompts, "random", max_ratio=0.5, max_new_tokens=3)
        steps = list(engine.decode_many(prefill, 3, ignore_eos=True, ahead=7))
        assert not ledger.pageable, ledger.pageable
        assert len(ledger.waits) <= 3, ledger.waits  # survivors, first tokens, the others
        return steps, prefill.kept.tolist()

    expected = answers(cpu)
    with phantom.Mode():
        assert answers(engine) == expected
    launched = ledger.names()
    for name in ("skinny_linear", "dequantize"):
        assert launched[f"_{name}_kernel" if name in kernels else name], launched
