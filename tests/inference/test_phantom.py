"""The engine on a phantom GPU: the CPU's answers, and how often the host waits for them."""

import pytest
import torch

from nanoglimpse import Prompt
from nanoglimpse.inference import cuda_graph
from nanoglimpse.methods import METHODS
from tests.helpers import phantom
from tests.helpers.tiny import chat_ids, patches_of

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")

GRIDS = ((1, 8, 12), (1, 12, 8))
DEVICE = "cuda:1"


def prompt_of(engine, *parts):
    grids = [part for part in parts if not isinstance(part, int)]
    return Prompt.from_tokens(
        chat_ids(*parts), patches_of(grids) if grids else None, grids, config=engine.config
    )


def answers(engine, options, *prompts, count=5):
    """Tokens of the answers, and the kept visual tokens."""
    prefill = engine.prefill_many(prompts, max_new_tokens=count, **options)
    steps = list(engine.decode_many(prefill, count, ignore_eos=True))
    return steps, prefill.kept.tolist()


@pytest.fixture
def ledger(monkeypatch, tiny):
    monkeypatch.setattr(cuda_graph, "CAPACITY", 96)
    return phantom.install(monkeypatch)


@pytest.fixture(params=["torch", "fused", pytest.param("auto", marks=pytest.mark.slow)])
def engine(request, ledger, tiny_folder):
    return phantom.engine_on(DEVICE, tiny_folder, dtype="float32", backend=request.param)


def prompts(engine):
    return prompt_of(engine, 5, GRIDS[0], 9), prompt_of(engine, 3, *GRIDS, 4), prompt_of(engine, 12)


@pytest.mark.parametrize("drop", ["all", "later"])
def test_answers_are_those_of_the_cpu(engine, tiny, drop):
    options = {"method": "glimpse", "max_ratio": 0.8, "kv_drop": drop}
    for batch in (slice(1), slice(3)):
        expected = answers(tiny, options, *prompts(tiny)[batch])
        with phantom.Mode():
            assert answers(engine, options, *prompts(engine)[batch]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS if name != "oracle"])
def test_every_method_chooses_as_on_the_cpu(ledger, tiny_folder, tiny, method):
    """In plain torch: kernels round differently, and some methods rank by less than that."""
    options = {"method": method}
    if METHODS[method].budget == "cap":
        options["max_ratio"] = 0.6
    engine = phantom.engine_on(DEVICE, tiny_folder, dtype="float32", backend="torch")
    expected = answers(tiny, options, *prompts(tiny)[:2], count=2)
    with phantom.Mode():
        assert answers(engine, options, *prompts(engine)[:2], count=2) == expected


def test_a_session_answers_as_on_the_cpu(engine, ledger, tiny):
    def told(engine):
        session = engine.session(prompt_of(engine, 4, GRIDS[0]), "glimpse", max_ratio=0.5)
        found = []
        for length in (6, 9):
            ledger.clear()
            prefill = session.prefill(prompt_of(engine, length), max_new_tokens=3)
            found.append(list(engine.decode(prefill, 1)))
            assert len(ledger.waits) <= 2, ledger.waits
            assert not ledger.pageable
            found.append(prefill.kept.tolist())
        return found

    expected = told(tiny)
    with phantom.Mode():
        assert told(engine) == expected


@pytest.mark.parametrize("count", [1, 3])
def test_waits_of_a_pruned_prefill(engine, ledger, count):
    """One for the survivors, one for the first token; none between decoded tokens."""
    with phantom.Mode():
        asked = prompts(engine)[:count]
        ledger.clear()
        prefill = engine.prefill_many(asked, method="glimpse", max_ratio=0.5, max_new_tokens=9)
        steps = engine.decode_many(prefill, 9, ignore_eos=True, ahead=7)
        next(steps)
        assert len(ledger.waits) <= 2, ledger.waits
        assert not ledger.pageable, ledger.pageable
        ledger.clear()
        assert len(list(steps)) == 8
        assert len(ledger.waits) == 1, ledger.waits
