"""Matrices of 8 and 4 bits: against the plain matrices that they stand for, and while loading."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nanoglimpse import Prompt, UsageError, load
from nanoglimpse.config import read_config
from nanoglimpse.decoder import Decoder
from nanoglimpse.kernels import quantized
from nanoglimpse.kernels.linear import linear, pack
from nanoglimpse.kernels.ops import TORCH
from nanoglimpse.kernels.quantized import GROUP, KINDS, PRODUCTS, dequantize, levels, quantize
from nanoglimpse.layers import Linear
from nanoglimpse.session_file import fingerprint
from nanoglimpse.weights import checkpoint
from nanoglimpse.weights.names import Part, canonical, parts

from .examples import QUESTION, SCENE
from .test_weights import write_adapter
from .tiny import chat_ids, config_dict, patches_of, write_checkpoint

GRID = (1, 12, 18)
# Largest error of a level, as a share of the largest weight of its row or group: half a step.
STEP = {"int8": 0.5 / 127, "int4": 1 / 15}
# Of fp32. A sum may be wrong by this share of its terms' magnitudes, whatever a BLAS reaches.
UNIT = torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, quantized.FEW_ROWS + 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_matrix_it_stands_for(kind, rows, dtype):
    """Both norms of the error, each at most twice a dense product's in that dtype, or a UNIT."""
    weight, bias = torch.randn(80, 3 * GROUP).to(dtype), torch.randn(80).to(dtype)
    x = torch.randn(2 * rows, 3 * GROUP).to(dtype)[::2]
    plain = dequantize(levels(weight, kind))
    packed, scales = quantize(weight, kind)
    exact = x.double() @ plain.double().T + bias.double()
    ours, theirs = (
        (out.double() - exact).norm(dim=-1)
        for out in (PRODUCTS[kind](x, packed, bias, scales), F.linear(x, plain.to(dtype), bias))
    )
    rounding = (UNIT * x.abs().double() @ plain.abs().double().T).norm(dim=-1)
    assert float(ours.norm()) <= max(2 * float(theirs.norm()), float(rounding.norm()))
    assert float(ours.max()) <= max(2 * float(theirs.max()), float(rounding.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_the_nearest(kind):
    weight = torch.randn(48, 4 * GROUP) * torch.logspace(-2, 1, 48)[:, None]
    error = (dequantize(levels(weight, kind)) - weight).abs()
    groups = 1 if kind == "int8" else 4
    largest = weight.abs().unflatten(1, (groups, -1)).amax(-1, keepdim=True)
    assert bool((error.unflatten(1, (groups, -1)) <= 1.001 * STEP[kind] * largest).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_weights_are_kept(kind, value):
    weight = torch.full((16, GROUP), value)
    torch.testing.assert_close(dequantize(levels(weight, kind)), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_whole(kind, monkeypatch):
    weight = torch.randn(208, 2 * GROUP)
    whole = quantize(weight, kind)
    monkeypatch.setattr(quantized, "CHUNK", 64)
    for piece, own in zip(quantize(weight, kind), whole, strict=True):
        assert torch.equal(piece, own)


CONFIG = config_dict(
    hidden_size=64, out_hidden_size=64, intermediate_size=128, num_attention_heads=8, vocab_size=144
)


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def folder(request, tmp_path_factory):
    """A tiny model whose matrices are whole groups."""
    place = tmp_path_factory.mktemp("groups")
    write_checkpoint(place, CONFIG | {"tie_word_embeddings": request.param})
    return place


def matrices(decoder):
    return {n: m for n, m in decoder.named_modules() if isinstance(m, Linear)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_that_of_the_matrices_it_stands_for(folder, kind):
    ours = load(folder, dtype="float32", device="cpu", quantize=kind)
    plain = load(folder, dtype="float32", device="cpu")
    if plain.decoder.lm_head is None:
        plain.decoder.lm_head = Linear(64, 144, bias=False).requires_grad_(False)
        plain.decoder.lm_head.weight.copy_(plain.decoder.embed_tokens.weight)
    for layer in matrices(plain.decoder).values():
        layer.weight.copy_(dequantize(levels(layer.weight, kind)))
    assert all(layer.opaque for layer in matrices(ours.decoder).values())
    prompt = ours_prompt(ours)
    one, other = ours.prefill(prompt, "dense"), plain.prefill(prompt, "dense")
    scale = other.logits.abs().max()
    torch.testing.assert_close(one.logits / scale, other.logits / scale, rtol=0, atol=2e-5)
    assert list(ours.decode(one, 12, True)) == list(plain.decode(other, 12, True))


def ours_prompt(engine):
    return Prompt.from_tokens(
        chat_ids(4, GRID, 6), patches_of([GRID]), [GRID], config=engine.config
    )


@pytest.mark.parametrize("kind", KINDS)
def test_few_bits_stay_near_bf16(nano, kind):
    """On trained weights: the error of logits beside that of bf16, and the same answer."""
    few = load("nano", dtype="float32", device="cpu", quantize=kind)
    half = load("nano", dtype="bfloat16", device="cpu")
    prompt = nano.prompt(SCENE, QUESTION)
    exact = nano.prefill(prompt, "dense").logits
    errors = {
        name: float((engine.prefill(prompt, "dense").logits.float() - exact).norm() / exact.norm())
        for name, engine in {"bf16": half, kind: few}.items()
    }
    assert errors[kind] < {"int8": 0.02, "int4": 0.2}[kind]
    tokens = (list(e.decode(e.prefill(prompt, "dense"), 12)) for e in (few, nano))
    assert next(tokens) == next(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_before(folder, kind, tmp_path):
    adapter = tmp_path / "adapter"
    write_adapter(adapter, width=64, down=128)
    merged = load(folder, dtype="float32", device="cpu", adapter=adapter)
    few = load(folder, dtype="float32", device="cpu", adapter=adapter, quantize=kind)
    for name, layer in matrices(merged.decoder).items():
        packed, scales = quantize(layer.weight, kind)
        own = few.decoder.get_submodule(name)
        assert torch.equal(own.weight, packed)
        assert torch.equal(own.scales, scales)


def test_matrices_are_quantised_while_others_are_still_to_be_read(folder, monkeypatch):
    """At no time is more dense than the matrices of one layer."""
    dense, most = set(), []

    def quantize_one(self, name, weight, kind):
        dense.discard(f"decoder.{name}")
        return whole(self, name, weight, kind)

    def put(target, tensor, what):
        dense.add(table[canonical(what.split("'")[1])].name)
        most.append(sum("layers" in name and "weight" in name for name in dense))
        return plain(target, tensor, what)

    whole, plain = Decoder.quantize, checkpoint.put
    monkeypatch.setattr(Decoder, "quantize", quantize_one)
    monkeypatch.setattr(checkpoint, "put", put)
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
        ({"quantize": "int3"}, "unknown quantize 'int3'; use int8 or int4"),
        ({"quantize": "int4"}, "whole groups, multiples of 16 × 64; layers.0.mlp.down is 48 × 72"),
        ({"quantize": "int8"}, "whole groups"),
    ],
)
def test_what_cannot_be_quantised(tiny_folder, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        load(tiny_folder, device="cpu", **options)
    assert "\n" not in str(caught.value)


def test_operations_that_are_missing(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(UsageError, match="does not have on xpu"):
        quantized.check("int4", torch.device("xpu"), torch.bfloat16)
    monkeypatch.setitem(quantized._OPERATIONS, ("int8", "cpu"), ("_weight_int7pack_mm",))
    with pytest.raises(UsageError, match="does not have on cpu"):
        quantized.check("int8", cpu, torch.float32)
    asked = []
    monkeypatch.setattr(quantized, "_exists", lambda *name: asked.append(name) or True)
    quantized.check("int4", cuda, torch.bfloat16)
    assert asked == [("_convert_weight_to_int4pack", "CUDA"), ("_weight_int4pack_mm", "CUDA")]
    with pytest.raises(UsageError, match="int4 computes in bfloat16 on cuda"):
        quantized.check("int4", cuda, torch.float16)


def test_int4_fits_what_a_gpu_takes():
    """Shapes and types, which torch checks without one; and the order of two in a byte."""
    with FakeTensorMode():
        pairs = torch.empty(80, 3 * GROUP // 2, dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, quantized.INNER_TILES)
        assert packed.nbytes == pairs.nbytes
        x = torch.empty(5, 3 * GROUP, dtype=torch.bfloat16, device="cuda")
        scales = torch.empty(3, 80, 2, dtype=torch.bfloat16, device="cuda")
        assert PRODUCTS["int4"](x, packed, None, scales).shape == (5, 80)
    q = torch.randint(0, 16, (6, 8), dtype=torch.int32)
    both = quantized.pairs(q).int()
    assert torch.equal(torch.stack((both // 16, both % 16), -1).flatten(1), q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_on_a_gpu(kind):
    weight, x = torch.randn(80, 2 * GROUP).bfloat16(), torch.randn(5, 2 * GROUP).bfloat16()
    plain = dequantize(levels(weight, kind))
    packed, scales = quantize(weight.cuda(), kind)
    ours = PRODUCTS[kind](x.cuda(), packed, None, scales).cpu()
    torch.testing.assert_close(ours.float(), x.float() @ plain.T, rtol=0.02, atol=0.1)


def test_large_matrices_of_the_decoder_are_packed(folder, monkeypatch):
    """And what reads a part of their outputs gets the same."""
    dense = load(folder, dtype="float32", device="cpu")
    assert not any(layer.opaque for layer in matrices(dense.decoder).values())
    monkeypatch.setattr("nanoglimpse.decoder.LARGE", 64 * 128 * 4)
    packed = load(folder, dtype="float32", device="cpu")
    if not packed.vision.patch_embed.opaque:
        pytest.skip("this CPU has no layout of its own")
    own = {name: layer.opaque for name, layer in matrices(packed.decoder).items()}
    assert own["layers.2.mlp.gate_up"]
    assert not own["layers.2.o"]
    prompt = ours_prompt(packed)
    ours, theirs = (engine.prefill(prompt, "dense").logits for engine in (packed, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_table_that_is_the_head_is_packed_beside_it(tmp_path, monkeypatch):
    """And a session's file does not mind."""
    write_checkpoint(tmp_path, CONFIG | {"tie_word_embeddings": True})
    dense = load(tmp_path, dtype="float32", device="cpu")
    assert dense.decoder.lm_head is None
    monkeypatch.setattr("nanoglimpse.decoder.LARGE", 144 * 64 * 4)
    packed = load(tmp_path, dtype="float32", device="cpu")
    if not packed.vision.patch_embed.opaque:
        pytest.skip("this CPU has no layout of its own")
    assert packed.decoder.lm_head.opaque
    assert torch.equal(packed.decoder.embed_tokens.weight, dense.decoder.embed_tokens.weight)
    prompt = ours_prompt(packed)
    ours, theirs = (engine.prefill(prompt, "dense").logits for engine in (packed, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert fingerprint(packed) == fingerprint(dense)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_of_few_rows(rows, dtype):
    weight, bias = torch.randn(300, 200).to(dtype), torch.randn(300).to(dtype)
    x = torch.randn(rows, 200).to(dtype)
    ours = linear(x, pack(nn.Parameter(weight, requires_grad=False)), bias)
    theirs = F.linear(x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert ours.shape == exact.shape
    errors = [(out.double() - exact).norm() for out in (ours, theirs)]
    rounding = (UNIT * x.abs().double() @ weight.abs().double().T).norm()
    assert errors[0] <= max(2 * errors[1], rounding)
