"""Quantised and packed matrices, alone and in a model, against the dense ones they represent."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanoglimpse import Prompt, UsageError, load
from nanoglimpse.config import read_config
from nanoglimpse.kernels.quantize import (
    _OPERATIONS,
    GROUP,
    MAX_INT8_ROWS,
    MODES,
    check_supported,
    quantize,
    quantize_levels,
)
from nanoglimpse.kernels.reference.dequantize import dequantize as unpack
from nanoglimpse.kernels.reference.table import CPU, TORCH
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.layers import Linear
from nanoglimpse.weights.checkpoint import Checkpoint
from nanoglimpse.weights.fingerprint import fingerprint
from nanoglimpse.weights.mapping import Part, parts
from tests.helpers.prompts import QUESTION, SCENE
from tests.helpers.tiny import chat_ids, config_dict, patches_of, write_checkpoint
from tests.weights.test_weights import write_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Operations that read quantised matrices in the layout of the kernels.
OURS = replace(TORCH, dequantize=lambda *args: unpack(*args))
GRID = (1, 12, 18)
# The largest rounding error, half a step, as a share of the largest weight of the row or group.
STEP = {"int8": 0.5 / 127, "int4": 1 / 15}
# A sum in fp32 may be wrong by this share of the magnitudes of its terms, whatever the BLAS.
UNIT = torch.finfo(torch.float32).eps / 2


def dequantize(matrix):
    """The fp32 matrix [out, in] that `Levels` represent."""
    q, scales = matrix.q.float(), matrix.scales.float()
    if scales.ndim == 1:
        return q * scales[:, None]
    scale, zero = scales.transpose(0, 1).unsqueeze(-2).unbind(-1)  # [out, in / 64, 1] each
    return ((q.unflatten(1, (-1, GROUP)) - 8) * scale + zero).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, MAX_INT8_ROWS + 7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ops", [CPU, OURS], ids=["cpu", "kernels"])
def test_a_product_is_that_of_the_matrix_it_represents(ops, mode, rows, dtype):
    """Both norms of the error are at most twice those of a dense product, or a rounding UNIT."""
    weight, bias = torch.randn(80, 3 * GROUP).to(dtype), torch.randn(80).to(dtype)
    x = torch.randn(2 * rows, 3 * GROUP).to(dtype)[::2]
    plain = dequantize(quantize_levels(weight, mode))
    packed, matmul = quantize(weight, mode, ops)
    exact = x.double() @ plain.double().T + bias.double()
    ours, theirs = (
        (out.double() - exact).norm(dim=-1)
        for out in (matmul(x, packed, bias), F.linear(x, plain.to(dtype), bias))
    )
    rounding = (UNIT * x.abs().double() @ plain.abs().double().T).norm(dim=-1)
    assert float(ours.norm()) <= max(2 * float(theirs.norm()), float(rounding.norm()))
    assert float(ours.max()) <= max(2 * float(theirs.max()), float(rounding.max()))


@pytest.mark.parametrize("mode", MODES)
def test_levels_are_the_nearest(mode):
    weight = torch.randn(48, 4 * GROUP) * torch.logspace(-2, 1, 48)[:, None]
    error = (dequantize(quantize_levels(weight, mode)) - weight).abs()
    groups = 1 if mode == "int8" else 4
    largest = weight.abs().unflatten(1, (groups, -1)).amax(-1, keepdim=True)
    assert bool((error.unflatten(1, (groups, -1)) <= 1.001 * STEP[mode] * largest).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_weights_are_kept(mode, value):
    weight = torch.full((16, GROUP), value)
    torch.testing.assert_close(dequantize(quantize_levels(weight, mode)), weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ops", [CPU, OURS], ids=["cpu", "kernels"])
def test_chunks_make_the_whole(ops, mode, monkeypatch):
    weight = torch.randn(208, 2 * GROUP)
    whole, product = quantize(weight, mode, ops)
    monkeypatch.setattr("nanoglimpse.kernels.quantize.CHUNK_ROWS", 64)
    piecewise, other = quantize(weight, mode, ops)
    assert torch.equal(piecewise, whole)
    assert torch.equal(other.scales, product.scales)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("mode", MODES)
def test_the_layout_of_the_kernels_holds_the_levels(mode, groups):
    """Bit by bit; an odd last group shares its bytes with nothing."""
    weight = torch.randn(48, groups * GROUP)
    packed, matmul = quantize(weight, mode, OURS)
    exact = dequantize(quantize_levels(weight, mode))
    assert torch.equal(unpack(packed, matmul.scales, groups * GROUP), exact)
    assert packed.nbytes == 48 * GROUP * (groups if mode == "int8" else -(-groups // 2))


CONFIG = config_dict(
    hidden_size=64, out_hidden_size=64, intermediate_size=128, num_attention_heads=8, vocab_size=144
)


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def folder(request, tmp_path_factory):
    """A tiny model whose matrices consist of whole groups."""
    place = tmp_path_factory.mktemp("groups")
    write_checkpoint(place, CONFIG | {"tie_word_embeddings": request.param})
    return place


def matrices(decoder):
    return {n: m for n, m in decoder.named_modules() if isinstance(m, Linear)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_that_of_the_matrices_it_represents(folder, mode):
    ours = load(folder, dtype="float32", device="cpu", quantize=mode)
    plain = load(folder, dtype="float32", device="cpu")
    if plain.decoder.lm_head is None:
        plain.decoder.lm_head = Linear(64, 144, bias=False).requires_grad_(False)
        plain.decoder.lm_head.weight.copy_(plain.decoder.embed_tokens.weight)
    for layer in matrices(plain.decoder).values():
        layer.weight.copy_(dequantize(quantize_levels(layer.weight, mode)))
    assert all(layer.is_packed for layer in matrices(ours.decoder).values())
    prompt = ours_prompt(ours)
    one, other = ours.prefill(prompt, "dense"), plain.prefill(prompt, "dense")
    scale = other.logits.abs().max()
    torch.testing.assert_close(one.logits / scale, other.logits / scale, rtol=0, atol=2e-5)
    assert list(ours.decode(one, 12, True)) == list(plain.decode(other, 12, True))


def ours_prompt(engine):
    return Prompt.from_tokens(
        chat_ids(4, GRID, 6), patches_of([GRID]), [GRID], config=engine.config
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_quantised_logits_stay_close(nano, mode):
    """With trained weights the logits are close to exact ones, and the answer is the same."""
    few = load("nano", dtype="float32", device="cpu", quantize=mode)
    half = load("nano", dtype="bfloat16", device="cpu")
    prompt = nano.prompt(SCENE, QUESTION)
    exact = nano.prefill(prompt, "dense").logits
    errors = {
        name: float((engine.prefill(prompt, "dense").logits.float() - exact).norm() / exact.norm())
        for name, engine in {"bf16": half, mode: few}.items()
    }
    assert errors[mode] < {"int8": 0.02, "int4": 0.2}[mode]
    tokens = (list(e.decode(e.prefill(prompt, "dense"), 12)) for e in (few, nano))
    assert next(tokens) == next(tokens)


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_is_merged_before_quantisation(folder, mode, tmp_path):
    adapter = tmp_path / "adapter"
    write_adapter(adapter, width=64, down=128)
    merged = load(folder, dtype="float32", device="cpu", adapter=adapter)
    few = load(folder, dtype="float32", device="cpu", adapter=adapter, quantize=mode)
    for name, layer in matrices(merged.decoder).items():
        packed, matmul = quantize(layer.weight, mode, CPU)
        own = few.decoder.get_submodule(name)
        assert torch.equal(own.weight, packed)
        assert torch.equal(own.scales, matmul.scales)


def test_matrices_are_quantised_while_loading(folder, monkeypatch):
    """At no time are more matrices dense than those of one layer."""
    dense, most = set(), []

    def quantize_one(self, name, weight, mode):
        dense.discard(f"decoder.{name}")
        return whole(self, name, weight, mode)

    def read(self):
        for file, name, tensor in plain(self):
            dense.add(table[name].name)
            most.append(sum("layers" in name and "weight" in name for name in dense))
            yield file, name, tensor

    whole, plain = Decoder.quantize, Checkpoint.__iter__
    monkeypatch.setattr(Decoder, "quantize", quantize_one)
    monkeypatch.setattr(Checkpoint, "__iter__", read)
    with torch.device("meta"):
        model = Decoder(read_config(folder / "config.json"), TORCH)
    table = defaultdict(lambda: Part("", 0, 0), parts(torch.nn.ModuleDict({"decoder": model})))
    engine = load(folder, dtype="bfloat16", device="cpu", quantize="int4")
    assert 0 < max(most) <= 6
    layer = engine.decoder.layers[0].mlp.gate_up
    assert layer.weight.numel() * layer.weight.element_size() == 2 * 128 * 64 // 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "int3"}, "quantize must be one of int8, int4, got 'int3'"),
        ({"quantize": "int4"}, "whole groups, multiples of 16 × 64; layers.0.mlp.down is 48 × 72"),
        ({"quantize": "int8"}, "whole groups"),
    ],
)
def test_a_model_that_cannot_be_quantised(tiny_folder, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        load(tiny_folder, device="cpu", **options)
    assert "\n" not in str(caught.value)


def test_operations_that_are_missing(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(UsageError, match="int4 on cuda needs backend triton"):
        check_supported("int4", cuda, TORCH)
    check_supported("int4", cuda, OURS)
    monkeypatch.setitem(_OPERATIONS, "int8", ("_weight_int7pack_mm",))
    with pytest.raises(UsageError, match="does not have on cpu"):
        check_supported("int8", cpu, CPU)
    check_supported("int8", cpu, OURS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_model_on_kernels_answers_as_with_torch(folder, mode):
    """Every product of a step reads quantised matrices itself; the head is one of them."""
    pytest.importorskip("triton")
    ours = load(folder, dtype="float32", device=DEVICE, quantize=mode, backend="triton")
    plain = load(folder, dtype="float32", device="cpu", quantize=mode)
    prompt = ours_prompt(plain)
    one, other = (engine.prefill(prompt, "dense") for engine in (ours, plain))
    scale = other.logits.abs().max()
    torch.testing.assert_close(one.logits.cpu() / scale, other.logits / scale, rtol=0, atol=2e-5)
    asked = []
    for layer in matrices(ours.decoder).values():
        assert layer.matmul.dequantize is not None
        counted = lambda *args: asked.append(args) or unpack(*args)  # noqa: E731
        layer.matmul = replace(layer.matmul, dequantize=counted)
    assert list(ours.decode(one, 4, True)) == list(plain.decode(other, 4, True))
    assert not asked


def test_large_matrices_of_the_decoder_are_packed(folder, monkeypatch):
    """Reading only some outputs of a packed matrix gives the same result."""
    dense = load(folder, dtype="float32", device="cpu")
    assert not any(layer.is_packed for layer in matrices(dense.decoder).values())
    monkeypatch.setattr("nanoglimpse.model.decoder.LARGE", 64 * 128 * 4)
    packed = load(folder, dtype="float32", device="cpu")
    if not packed.vision.patch_embed.is_packed:
        pytest.skip("this CPU has no layout of its own")
    own = {name: layer.is_packed for name, layer in matrices(packed.decoder).items()}
    assert own["layers.2.mlp.gate_up"]
    assert not own["layers.2.o"]
    prompt = ours_prompt(packed)
    ours, theirs = (engine.prefill(prompt, "dense").logits for engine in (packed, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_packed_beside_the_table(tmp_path, monkeypatch):
    """The fingerprint in a session file is the same with a packed head."""
    write_checkpoint(tmp_path, CONFIG | {"tie_word_embeddings": True})
    dense = load(tmp_path, dtype="float32", device="cpu")
    assert dense.decoder.lm_head is None
    monkeypatch.setattr("nanoglimpse.model.decoder.LARGE", 144 * 64 * 4)
    packed = load(tmp_path, dtype="float32", device="cpu")
    if not packed.vision.patch_embed.is_packed:
        pytest.skip("this CPU has no layout of its own")
    assert packed.decoder.lm_head.is_packed
    assert torch.equal(packed.decoder.embed_tokens.weight, dense.decoder.embed_tokens.weight)
    prompt = ours_prompt(packed)
    ours, theirs = (engine.prefill(prompt, "dense").logits for engine in (packed, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert fingerprint(packed.model) == fingerprint(dense.model)
