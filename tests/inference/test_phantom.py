"""The engine on a phantom GPU: the CPU's answers, and how often the host waits for them."""

from dataclasses import replace

import pytest
import torch

from nanoglimpse import Prompt
from nanoglimpse.benchmark.models import CONFIGS
from nanoglimpse.config import read_config
from nanoglimpse.inference import cuda_graph
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.methods import METHODS
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.vision import VisionBlock
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


@pytest.fixture(params=["torch", "fused"])
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
def test_kernels_wait_as_little(ledger, tiny_folder, tiny):
    """The kernels themselves, in the interpreter: launchers copy and wait for nothing either."""
    options = {"method": "glimpse", "max_ratio": 0.5}
    engine = phantom.engine_on(DEVICE, tiny_folder, dtype="float32", backend="auto")
    expected = answers(tiny, options, prompts(tiny)[0], count=2)
    with phantom.Mode():
        asked = prompts(engine)[0]
        ledger.clear()
        prefill = engine.prefill_many([asked], max_new_tokens=2, **options)
        steps = list(engine.decode_many(prefill, 2, ignore_eos=True))
        assert len(ledger.waits) == 3, ledger.waits  # the survivors and two tokens
        assert (steps, prefill.kept.tolist()) == expected


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
        asked = prompts(engine)[:2]
        ledger.clear()
        assert answers(engine, options, *asked, count=2) == expected
    assert not ledger.pageable, ledger.pageable


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


def empty(*shape, dtype=torch.bfloat16):
    """A phantom without values, for what depends on sizes alone."""
    return phantom.Phantom(torch.empty(shape, dtype=dtype, device="meta"), torch.device(DEVICE))


def tables(rows, width):
    return Rope(*(empty(rows, 1, width, dtype=torch.float32) for _ in range(2)))


def outside(ledger):
    """Bytes outside of products and attention."""
    apart = ("mm", "addmm", "attention")
    return sum(launch.nbytes for launch in ledger.launches if launch.name not in apart)


@pytest.fixture(params=["3b", "7b"])
def released(request, ledger):
    """Configuration and first decoder layer of a released checkpoint, without values."""
    config, ops = read_config(CONFIGS / f"qwen2.5-vl-{request.param}.json"), phantom.fused()
    config = replace(config, text_config=replace(config.text_config, num_hidden_layers=1))
    with torch.device("meta"):
        decoder = Decoder(config, ops).to(torch.bfloat16)
    phantom.move(decoder, torch.device(DEVICE))
    decoder.pack(ops)
    return config, decoder, ops


def cache_of(config, rows, ops):
    like, position = empty(0), empty(1, dtype=torch.int64)
    return KVCache(config.text_config, range(1), [rows], position, like, ops)


def test_a_decode_step_launches_six_a_layer(released, ledger):
    config, decoder, ops = released
    text, cache = config.text_config, cache_of(config, 64, ops)
    with phantom.Mode():
        kv = cache.reserve([1])
        ledger.clear()
        decoder.layers[0].decode(empty(1, text.hidden_size), tables(1, text.head_dim), kv.layer(0))
    assert sum(ledger.names().values()) == 6, ledger.names()


def test_bytes_of_a_prefill_layer(released, ledger):
    """At 5,064 rows: 1.1 GB for 7B."""
    config, decoder, ops = released
    text, cache, rows = config.text_config, cache_of(config, 5064, ops), 5064
    with phantom.Mode():
        kv, segments = cache.reserve([rows]).layer(0), Segments([rows], "cpu")
        ledger.clear()
        decoder.layers[0](empty(rows, text.hidden_size), tables(rows, 128), kv, segments, None)
    assert 0 < outside(ledger) <= 1.1e9, ledger.launches


def test_bytes_of_a_vision_block(released, ledger):
    """At 20,000 patches."""
    config, _, ops = released
    vision, rows = config.vision_config, 20_000
    with torch.device("meta"):
        block = VisionBlock(vision, ops).to(torch.bfloat16)
    phantom.move(block, torch.device(DEVICE))
    with phantom.Mode():
        ledger.clear()
        block(empty(rows, vision.hidden_size), tables(rows, vision.head_dim), Segments([rows]))
    assert 0 < outside(ledger) <= 1.2e9, ledger.launches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_torch_in_any_layout_and_without_cudnn(ledger, tiny_folder, dtype):
    """Kernels of a GPU return [B, S, H, D] in memory for some dtypes; cuDNN plans every length."""
    seen = set()

    def transposed(out):
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    ledger.fake_attention = transposed
    engine = phantom.engine_on(DEVICE, tiny_folder, dtype=dtype, backend="torch")
    with phantom.Mode():
        answers(engine, {"method": "glimpse", "max_ratio": 0.5}, *prompts(engine))
    assert seen == {False}


def test_devices_do_not_mix(ledger):
    one, two = (phantom.Phantom(torch.ones(3), torch.device("cuda", i)) for i in (0, 1))
    with pytest.raises(RuntimeError, match=r"cuda:0.*cuda:1"):
        one + two
    with pytest.raises(RuntimeError, match="cpu and cuda"):
        one + torch.ones(3)
    with phantom.Mode():
        assert TORCH.swiglu(torch.ones(2, device=DEVICE)).device == torch.device(DEVICE)
