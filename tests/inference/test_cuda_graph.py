"""Decode steps that count on the device, as they come and as a GPU would replay them."""

import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanoglimpse import Prompt, Sampling, load
from nanoglimpse.inference import cuda_graph as graph
from nanoglimpse.inference.cuda_graph import DecodeGraphPool, capture_cuda
from nanoglimpse.inference.decode import decode_steps
from nanoglimpse.kernels.backends import select
from tests.helpers.tiny import chat_ids, config_dict, patches_of, write_checkpoint

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPTS = ((5, (1, 8, 12), 9), (3, (1, 16, 4), 20), (12,))


def as_it_comes(step, device):
    return step


def prompt_of(engine, *parts):
    grids = [part for part in parts if not isinstance(part, int)]
    return Prompt.from_tokens(
        chat_ids(*parts), patches_of(grids) if grids else None, grids, config=engine.config
    )


def prefill(engine, *prompts, room=24, **options):
    options = {"method": "glimpse", "max_ratio": 0.5} | options
    return engine.prefill_many(
        [prompt_of(engine, *parts) for parts in prompts], max_new_tokens=room, **options
    )


CAPACITY = 96


def steps(engine, cache, count):
    return decode_steps(engine.model, engine.graphs, cache, count)


@pytest.fixture(scope="module", params=["torch", "triton"])
def loaded(request, tiny_folder):
    """Plain torch and eager; and of a backend, its decode steps graphs."""
    eager, engine = (
        load(tiny_folder, dtype="float32", device=str(DEVICE), backend=backend)
        for backend in ("torch", request.param)
    )
    if engine.graphs is None:
        engine.graphs = DecodeGraphPool(engine.model, as_it_comes)
    return eager, engine


@pytest.fixture
def engines(loaded, monkeypatch):
    """Both without graphs yet, and these small."""
    monkeypatch.setattr(graph, "CAPACITY", CAPACITY)
    loaded[1].graphs.idle = []
    return loaded


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.slow
def test_a_graph_says_what_eager_steps_say(engines, count):
    eager, engine = engines
    read = prefill(eager, *PROMPTS[:count])
    expected, ours = ([*e.decode_many(read, 4, ignore_eos=True)] for e in engines)
    assert ours == expected
    assert len({tokens[0] for tokens in ours}) > 1
    assert len(engine.graphs.idle) == 1
    # The same logits, step by step, where each has its own position and length.
    both = steps(eager, read.rewind(2), 2), steps(engine, read.cache, 2)
    with torch.inference_mode(), both[0] as step, both[1] as replay:
        for tokens in torch.tensor(ours[:2], device=DEVICE):
            torch.testing.assert_close(replay(tokens), step(tokens), rtol=1e-5, atol=1e-5)


def storage(own):
    memory = own.cache.cache
    buffers = (memory.k, memory.v, own.token_ids, own.cache.lengths)
    return [x.data_ptr() for x in buffers]


@pytest.mark.slow
@pytest.mark.parametrize("loaded", ["torch"], indirect=True)
def test_one_graph_serves_all_questions(engines):
    eager, engine = engines
    for parts in (PROMPTS[0], PROMPTS[2], PROMPTS[1]):
        expected, ours = ([*e.decode_many(prefill(eager, parts), 6, True)] for e in engines)
        assert ours == expected
        (own,) = engine.graphs.idle
        assert own.capacity == CAPACITY
        before = storage(own)
    [*engine.decode_many(prefill(engine, PROMPTS[0]), 6, True)]
    assert engine.graphs.idle == [own]
    assert storage(own) == before
    # Another batch, and a longer prompt, need others; the larger one then serves both lengths.
    [*engine.decode_many(prefill(engine, *PROMPTS[:2]), 2, True)]
    long = prefill(engine, (CAPACITY - 10,), method="dense", max_ratio=None)
    expected, ours = ([*e.decode_many(long, 12, True)] for e in engines)
    assert ours == expected
    assert [(g.batch, g.capacity) for g in engine.graphs.idle] == [(2, CAPACITY), (1, 2 * CAPACITY)]
    [*engine.decode_many(prefill(engine, PROMPTS[0]), 6, True)]
    assert engine.graphs.idle[-1].capacity == 2 * CAPACITY


@pytest.mark.parametrize("loaded", ["torch"], indirect=True)
def test_answers_side_by_side_do_not_share_a_graph(engines):
    eager, engine = engines
    expected = [[*eager.decode_many(prefill(eager, p), 5, True)] for p in PROMPTS[:2]]
    running = [engine.decode_many(prefill(engine, p), 5, True) for p in PROMPTS[:2]]
    assert [list(pair) for pair in zip(*running, strict=True)] == [
        list(pair) for pair in zip(*expected, strict=True)
    ]
    assert len(engine.graphs.idle) == 2
    # One that is left gives its graph back.
    left = engine.decode_many(prefill(engine, PROMPTS[0]), 5, True)
    next(left), next(left)
    assert len(engine.graphs.idle) == 1
    left.close()
    assert len(engine.graphs.idle) == 2


@pytest.mark.parametrize("loaded", ["torch"], indirect=True)
def test_layers_with_rows_of_their_own_are_decoded_eagerly(engines):
    options = {"method": "fastv", "max_ratio": 0.5, "kv_drop": "later"}
    expected, ours = ([*e.decode_many(prefill(e, PROMPTS[0], **options), 4)] for e in engines)
    assert ours == expected
    assert engines[1].graphs.idle == []


SYNCHRONISING = ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class Operations(TorchDispatchMode):
    """Counts what a GPU would launch: operations that are neither views nor allocations."""

    FREE = ("empty", "detach", "alias", "view", "slice", "select", "split", "unbind", "transpose")
    FREE += ("expand", "unsqueeze", "as_strided", "squeeze", "narrow", "t", "permute", "reshape")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.strip("_")
        if not name.removeprefix("new_").removesuffix("_like").startswith(self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def watched(monkeypatch):
    """Refuses to ask the device for a value, and counts launches."""
    launched = []

    def refuse(name):
        def asked(*_):
            raise AssertionError(f"{name} waits for the device")

        return asked

    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("nanoglimpse.kernels.triton_ops.") and hasattr(module, "launch"):

                def launch(kernel, grid, *args, **options):
                    launched.append(kernel)

                patch.setattr(module, "launch", launch)
        for name in SYNCHRONISING:
            patch.setattr(torch.Tensor, name, refuse(name))
        with torch.inference_mode(), Operations() as operations:
            yield launched, operations.names


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts with kernels left out")
def test_a_step_asks_nothing_and_launches_six_a_layer(tmp_path, monkeypatch):
    counts = []
    for depth in (3, 6):
        folder = tmp_path / str(depth)
        write_checkpoint(folder, config_dict(num_hidden_layers=depth))
        plain, engine = (
            load(folder, dtype="float32", device="cpu", backend=name)
            for name in ("torch", "triton")
        )
        read = plain.prefill_many([prompt_of(plain, *PROMPTS[0])], "dense", max_new_tokens=5)
        graphs = DecodeGraphPool(engine.model, as_it_comes)
        with torch.inference_mode(), graphs.acquire(read.cache, 5) as step:
            tokens = torch.tensor([3])
            step(tokens)  # tables that are made once
            with watched(monkeypatch) as (launched, operations):
                step(tokens)
        counts.append(len(launched) + len(operations))
    assert len(launched) == 6 * 6 + 1
    assert counts[1] - counts[0] == 6 * 3


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1, 3, 20])
def test_running_ahead_changes_no_token(tiny, ahead):
    read = prefill(tiny, *PROMPTS)
    eager = [*tiny.decode_many(read, 11, ignore_eos=True)]
    assert [*tiny.decode_many(read, 11, ignore_eos=True, ahead=ahead)] == eager
    drawn = Sampling(temperature=1.0, seed=3)
    expected = [*tiny.decode_many(read, 11, sampling=drawn)]
    assert [*tiny.decode_many(read, 11, sampling=drawn, ahead=ahead)] == expected


def test_running_ahead_stops_when_all_have_ended(tiny, monkeypatch):
    read, steps = prefill(tiny, PROMPTS[0]), []
    said = [*tiny.decode(read, 12, ignore_eos=True)]
    end = said[4]
    monkeypatch.setattr(tiny, "model", replace(tiny.model, eos_token_id=frozenset({end})))
    step = tiny.decoder.step
    monkeypatch.setattr(tiny.decoder, "step", lambda *args: steps.append(1) or step(*args))
    stop = said.index(end) + 1
    assert [*tiny.decode(read, 12, ahead=3)] == said[:stop]
    # The first token alone, then four at a time.
    assert len(steps) == -(-(stop - 1) // 4) * 4


class Recorder:
    """Stands in for torch.cuda and notes the order of things."""

    def __init__(self):
        self.said = []

    def CUDAGraph(self):
        self.said.append("graph")
        return self

    def replay(self):
        self.said.append("replay")

    def Stream(self, device):
        self.said.append(f"stream of {device}")
        return self

    def current_stream(self):
        return self

    def wait_stream(self, other):
        self.said.append("wait")

    @contextmanager
    def _inside(self, name):
        self.said.append(name)
        yield
        self.said.append("end")

    def device(self, device):
        return self._inside(str(device))

    def stream(self, stream):
        return self._inside("aside")

    def graph(self, graph, stream):
        return self._inside("capture aside" if stream is self else "capture elsewhere")


def test_a_step_runs_aside_before_it_is_captured(monkeypatch):
    cuda = Recorder()
    monkeypatch.setattr(torch, "cuda", cuda)
    run = capture_cuda(lambda: cuda.said.append("step"), torch.device("cuda:1"))
    aside = ["cuda:1", "stream of cuda:1", "wait", "aside", "step", "end", "wait"]
    assert cuda.said == [*aside, "graph", "capture aside", "step", "end", "end"]
    run()
    assert cuda.said[-1] == "replay"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.gpu
def test_replaying_allocates_nothing(tiny_folder):
    engine = load(tiny_folder, device="cuda", backend="triton")
    assert engine.graphs is not None
    tokens = torch.tensor([3], device=DEVICE)
    with torch.inference_mode(), steps(engine, prefill(engine, PROMPTS[0]).rewind(9), 9) as step:
        step(tokens)
        before = torch.cuda.memory_stats()
        for _ in range(5):
            step(tokens)
        after = torch.cuda.memory_stats()
    for name in ("allocation.all.allocated", "segment.all.allocated"):
        assert after[name] == before[name]


def test_which_engine_has_graphs(tiny, monkeypatch):
    """Those on a GPU whose kernels take lengths from the device."""
    assert tiny.graphs is None
    assert select("triton", DEVICE).graph_safe
    assert not select("torch", DEVICE).graph_safe
    assert not select("auto", torch.device("cpu")).graph_safe
