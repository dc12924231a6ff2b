"""Before the first answer: operations are checked, and decode steps captured."""

from dataclasses import replace

import pytest
import torch

from nanoglimpse import load
from nanoglimpse.inference import cuda_graph, scheduler, warm_up
from nanoglimpse.inference.cuda_graph import DecodeGraph, DecodeGraphPool
from nanoglimpse.kernels.reference.table import REFERENCES, TORCH
from nanoglimpse.methods.options import Pruning, resolve
from tests.helpers import phantom
from tests.helpers.prompts import QUESTION, SCENE

NAMES = {reference.__name__ for reference in REFERENCES}


def wrapped(name):
    return lambda *args, **options: getattr(TORCH, name)(*args, **options)


def table(**changes):
    """Operations that are all other functions than the references, and equal to them."""
    return replace(TORCH, graph_safe=True, **{name: wrapped(name) for name in NAMES} | changes)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(warm_up, "SIDES", (112, 56))


def asked(engine):
    answer = engine.ask(SCENE, QUESTION, max_new_tokens=4)
    return answer.token_ids, answer.kept.tolist()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_every_operation_is_checked(nano, quantize):
    """At the model's sizes, also those that only a session, a batch or int8 calls."""
    engine = load("nano", dtype="float32", device="cpu", backend=table(), quantize=quantize)
    checks = engine.warm_up(batches=(1, 3))
    # Dense matrices are multiplied by torch's own product, which no table has.
    expected = NAMES - {"linear"} - ({"dequantize"} if quantize is None else set())
    assert {check.name for check in checks} == expected
    assert not [check for check in checks if check.fault]
    assert {check.name for check in checks if check.calls == 1} <= {
        "row_logits",
        "attention_colsum",
    }
    if quantize is None:
        assert asked(engine) == asked(nano)


@pytest.mark.slow
def test_what_is_wrong_is_not_used(nano):
    ops = table(swiglu=lambda x: TORCH.swiglu(x) * 1.01)
    engine = load("nano", dtype="float32", device="cpu", backend=ops)
    before = engine.ask(SCENE, QUESTION, max_new_tokens=1)
    (fault,) = [check for check in engine.warm_up() if check.fault]
    assert fault.name == "swiglu"
    assert engine.model.ops.swiglu is TORCH.swiglu
    assert engine.model.ops.rms_norm is ops.rms_norm
    assert not engine.model.ops.graph_safe
    assert asked(engine) == asked(nano)
    after = engine.ask(SCENE, QUESTION, max_new_tokens=1)
    assert not torch.equal(before.importance, after.importance)


def test_an_interrupted_check_leaves_no_watched_operation(monkeypatch):
    ops = table()
    engine = load("nano", dtype="float32", device="cpu", backend=ops)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_up, "rehearse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.warm_up()
    assert engine.decoder.norm.ops == ops


def test_references_need_no_check(tiny):
    assert tiny.warm_up() == []


@pytest.mark.slow
def test_any_pruning_can_be_warmed_up(nano):
    """Methods that a session cannot serve, and several stages."""
    for method in ("cdpruner", "pdrop", "dense"):
        pruning = resolve(
            nano.model, Pruning(method, max_ratio=None if method == "dense" else 0.5), {}
        )
        parts = (nano.model, nano.processor, nano.prefill_many, pruning, (1,))
        warm_up.rehearse(*parts)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
def test_no_answer_captures_after_a_warm_up(monkeypatch):
    pytest.importorskip("triton")
    phantom.install(monkeypatch)
    monkeypatch.setattr(cuda_graph, "CAPACITY", 96)
    captures, capture = [], cuda_graph.capture_cuda

    def counted(step, device):
        captures.append(device)
        return capture(step, device)

    monkeypatch.setattr(cuda_graph, "capture_cuda", counted)
    engine = phantom.engine_on("cuda:1", "nano", dtype="float32", backend="fused")
    with phantom.Mode():
        checks = engine.warm_up(batches=(1, 2), rows=90)
        assert checks
        assert not [check for check in checks if check.fault]
        assert [graph.batch for graph in engine.graphs.idle] == [1, 2]
        assert len(captures) == 2
        prompt = engine.prompt(SCENE, QUESTION)
        for count in (2, 1, 2):
            prefill = engine.prefill_many([prompt] * count, max_ratio=0.1, max_new_tokens=3)
            assert max(prefill.cache.lengths) <= 87
            list(engine.decode_many(prefill, 3, ignore_eos=True))
    assert len(captures) == 2


@pytest.mark.slow
def test_batches_decode_captured(nano, monkeypatch):
    """Sequences come and go, in a memory of their own; a graph serves up to so many of them."""
    monkeypatch.setattr(scheduler, "EAGER_STEPS", 2)
    built, replays, build, replay = [], [], DecodeGraph.__init__, DecodeGraph.__call__

    def noted(self, model, cache, batch, capture):
        build(self, model, cache, batch, capture)
        built.append(batch)

    def counted(self, token_ids):
        replays.append(len(token_ids))
        return replay(self, token_ids)

    questions = [QUESTION, "What is red?", "How many circles are there?", "Why?", QUESTION] * 2
    queries = [([], text) if text == "Why?" else (SCENE, text) for text in questions]
    options = {"max_new_tokens": 12, "max_batch_tokens": 500, "ignore_eos": True}
    expected = [answer.token_ids for answer in nano.ask_many(queries, **options)]
    monkeypatch.setattr(DecodeGraph, "__init__", noted)
    monkeypatch.setattr(DecodeGraph, "__call__", counted)
    graphs = DecodeGraphPool(nano.model, lambda step, device: step)
    monkeypatch.setattr(nano, "graphs", graphs)
    assert [answer.token_ids for answer in nano.ask_many(queries, **options)] == expected
    assert len(replays) > 10
    assert len(set(replays)) > 1
    assert len(built) == len(set(built))
    assert all(size & (size - 1) == 0 for size in built)
