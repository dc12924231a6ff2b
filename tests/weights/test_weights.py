"""Loading: layouts, dtypes, shards, what must be refused, and how much memory it takes."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoglimpse import NanoglimpseError, Prompt, UsageError, load
from nanoglimpse.weights.__main__ import main as export
from nanoglimpse.weights.glimpse import read_tensors
from nanoglimpse.weights.hub import locate
from tests.helpers.tiny import chat_ids, config_dict, patches_of, write_checkpoint, write_glimpse
from tests.test_config import CONFIGS


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def save(folder, tensors):
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def first_logits(engine):
    grid = (1, 12, 18)
    prompt = Prompt.from_tokens(
        chat_ids(3, grid, 5), patches_of([grid]), [grid], config=engine.config
    )
    return engine.prefill(prompt).logits


def parameters(engine):
    modules = {"vision": engine.vision, "decoder": engine.decoder, "glimpse": engine.glimpse}
    return {
        f"{m}.{n}": p.to_dense() if p.is_mkldnn else p
        for m, module in modules.items()
        for n, p in module.named_parameters()
    }


def test_fused_rows_stand_where_they_belong(tiny_folder, tiny):
    tensors = tensors_of(tiny_folder)
    names = [f"model.layers.4.self_attn.{p}_proj.weight" for p in "qkv"]
    expected = torch.cat([tensors[name] for name in names])
    assert torch.equal(tiny.decoder.layers[4].qkv.weight, expected)
    expected = torch.cat([tensors[f"visual.blocks.2.mlp.{p}_proj.bias"] for p in ("gate", "up")])
    assert torch.equal(tiny.vision.blocks[2].mlp.gate_up.bias, expected)


def test_shards_with_an_index_are_the_same_model(folder, tiny):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "a.safetensors": names[::3],
        "b.safetensors": names[1::3],
        "c.safetensors": names[2::3],
    }
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    ours = parameters(load(folder, dtype="float32", device="cpu"))
    for name, parameter in parameters(tiny).items():
        assert torch.equal(ours[name], parameter), name


@pytest.mark.slow
def test_mixed_dtypes_are_cast_one_by_one(folder, tiny):
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    save(folder, {n: t.to(kinds[i % 3]) for i, (n, t) in enumerate(tensors_of(folder).items())})
    engine = load(folder, dtype="float32", device="cpu")
    assert {p.dtype for p in parameters(engine).values()} == {torch.float32}
    torch.testing.assert_close(first_logits(engine), first_logits(tiny), rtol=0.1, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_near_fp32(tiny_folder, tiny, dtype):
    engine = load(tiny_folder, dtype=dtype, device="cpu")
    assert {p.dtype for p in parameters(engine).values()} == {getattr(torch, dtype)}
    ours, exact = first_logits(engine).float(), first_logits(tiny)
    assert (ours - exact).norm() / exact.norm() < 0.1


def test_dtype_auto_takes_fp32_for_a_small_model_on_a_cpu(tiny_folder):
    assert load(tiny_folder, device="cpu").dtype == torch.float32


def break_missing(folder, tensors):
    del tensors["model.layers.2.self_attn.k_proj.bias"]
    save(folder, tensors)


def break_shape(folder, tensors):
    tensors["visual.blocks.1.attn.qkv.weight"] = torch.zeros(72, 25)
    save(folder, tensors)


def break_unknown(folder, tensors):
    save(folder, tensors | {"model.layers.9.extra.weight": torch.zeros(2)})


def break_corrupt(folder, tensors):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def break_header(folder, tensors):
    (folder / "model.safetensors").write_bytes(b"garbage, not a header at all")


def break_file(folder, tensors):
    (folder / "model.safetensors").unlink()


def break_index(folder, tensors):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def break_shard(folder, tensors):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    break_missing: r"1 tensors are missing, the first is 'model.layers.2.self_attn.k_proj.bias'",
    break_shape: r"'visual.blocks.1.attn.qkv.weight' has shape \[72, 25\].*needs \[72, 24\]",
    break_unknown: r"'model.layers.9.extra.weight' has no place",
    break_corrupt: "corrupt",
    break_header: "corrupt",
    break_file: r"model.safetensors is missing",
    break_index: "weight_map",
    break_shard: r"gone.safetensors is missing",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_broken_checkpoints_are_named(folder, damage):
    damage(folder, tensors_of(folder))
    with pytest.raises(NanoglimpseError, match=BROKEN[damage]) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.slow
def test_both_glimpse_layouts_are_the_same_weights(folder, tiny):
    (folder / "glimpse" / "glimpse.safetensors").unlink()
    published = load(folder, dtype="float32", device="cpu")
    assert torch.equal(first_logits(published), first_logits(tiny))
    for name, parameter in parameters(tiny).items():
        assert torch.equal(parameters(published)[name], parameter), name


def test_the_published_file_has_the_published_shape(tiny_folder):
    content = torch.load(tiny_folder / "glimpse" / "new_modules_gp.pt", weights_only=True)
    assert sorted(content) == ["attn_fuser", "le_norm", "le_proj", "learnable_embeddings"]
    assert content["learnable_embeddings"].shape == (6, 1, 48)
    assert sorted(content["le_proj"]) == ["bias", "weight"]
    assert content["attn_fuser"]["layers.1.attn.q_proj.weight"].shape == (32, 32)


def test_the_exporter_writes_both_layouts(folder, tmp_path, capsys):
    (folder / "glimpse" / "glimpse.safetensors").unlink()
    assert export([str(folder / "glimpse"), str(tmp_path / "out")]) == 0
    assert "tensors" in capsys.readouterr().out
    for kept in ("glimpse.safetensors", "new_modules_gp.pt"):
        other = tmp_path / kept.split(".")[0]
        other.mkdir()
        shutil.copy(tmp_path / "out" / kept, other)
        _, tensors = read_tensors(other)
        _, expected = read_tensors(folder / "glimpse")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert export([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.slow
def test_heads_of_deep_supervision_are_accounted_for(tiny_folder, tmp_path):
    write_glimpse(tmp_path, tiny_folder, deep_supervision=True)
    _, tensors = read_tensors(tmp_path)
    extra = {
        f"attn_fuser.attn_out_projs.0.{n}": torch.zeros(s)
        for n, s in (("weight", (1, 12)), ("bias", 1))
    }
    save_file(tensors | extra, tmp_path / "glimpse.safetensors")
    load(tiny_folder, glimpse=tmp_path, device="cpu")


class Bomb:
    def __reduce__(self):
        return (print, ("this must never be printed",))


def glimpse_pickle(path, tensors):
    path.write_bytes(pickle.dumps({"attn_fuser": Bomb()}))


def glimpse_torch_pickle(path, tensors):
    torch.save({"attn_fuser": Bomb()}, path)


def glimpse_corrupt(path, tensors):
    path.write_bytes(path.read_bytes()[:3000])


def glimpse_sections(path, tensors):
    torch.save({"attn_fuser": {}}, path)


def glimpse_no_tensor(path, tensors):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"le_norm": {"weight": "text"}}, path)


def glimpse_unknown(path, tensors):
    content = torch.load(path, weights_only=True)
    content["attn_fuser"]["extra"] = torch.zeros(1)
    torch.save(content, path)


def glimpse_missing(path, tensors):
    content = torch.load(path, weights_only=True)
    del content["attn_fuser"]["layers.0.norm1.weight"]
    torch.save(content, path)


def glimpse_shape(path, tensors):
    content = torch.load(path, weights_only=True)
    torch.save(content | {"learnable_embeddings": torch.zeros(5, 1, 48)}, path)


GLIMPSE_BROKEN = {
    glimpse_pickle: "could run code",
    glimpse_torch_pickle: "could run code",
    glimpse_corrupt: "corrupt",
    glimpse_sections: "expected a dict of",
    glimpse_no_tensor: "'le_norm.weight' is not a tensor",
    glimpse_unknown: "'attn_fuser.extra' has no place",
    glimpse_missing: "'attn_fuser.layers.0.norm1.weight'",
    glimpse_shape: r"'learnable_embeddings' has shape \[5, 1, 48\]",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", GLIMPSE_BROKEN, ids=lambda f: f.__name__)
def test_broken_glimpse_weights_are_named(folder, damage, capsys):
    (folder / "glimpse" / "glimpse.safetensors").unlink()
    damage(folder / "glimpse" / "new_modules_gp.pt", None)
    with pytest.raises(NanoglimpseError, match=GLIMPSE_BROKEN[damage]) as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert "must never" not in capsys.readouterr().out


def test_glimpse_weights_of_another_model(folder, tmp_path):
    write_checkpoint(tmp_path / "other", config_dict(num_hidden_layers=4))
    write_glimpse(tmp_path / "other" / "glimpse", tmp_path / "other", le_layers=[0, 1, 2, 3])
    with pytest.raises(UsageError, match="another model: text_config num_hidden_layers is 4"):
        load(folder, glimpse=tmp_path / "other" / "glimpse", device="cpu")


def test_a_folder_without_glimpse_weights(folder, tmp_path):
    shutil.copy(folder / "glimpse" / "config.json", tmp_path)
    with pytest.raises(NanoglimpseError, match="contains no glimpse weights"):
        load(folder, glimpse=tmp_path, device="cpu")


def write_adapter(folder, rank=3, width=48, down=72, **config):
    folder.mkdir()
    stem = "base_model.model.model.layers.2.self_attn.v_proj"
    other = "base_model.model.model.language_model.layers.3.mlp.down_proj"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(rank, width),
        f"{stem}.lora_B.weight": torch.randn(16, rank),
        f"{other}.lora_A.weight": torch.randn(rank, down),
        f"{other}.lora_B.weight": torch.randn(width, rank),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_an_adapter_is_merged_where_it_belongs(tiny_folder, tiny, tmp_path, rslora, scale):
    """Names of 4.x and of 5.x, a row range of a fused matrix and a matrix of its own."""
    lora = write_adapter(tmp_path / "lora", use_rslora=rslora)
    engine = load(tiny_folder, adapter=tmp_path / "lora", dtype="float32", device="cpu")
    (a_v, b_v), (a_down, b_down) = (list(lora.values())[i : i + 2] for i in (0, 2))
    changes = {
        "decoder.layers.2.qkv.weight": (slice(64, 80), scale * b_v @ a_v),
        "decoder.layers.3.mlp.down.weight": (slice(None), scale * b_down @ a_down),
    }
    for name, parameter in parameters(tiny).items():
        expected = parameter.detach().clone()
        if name in changes:
            rows, delta = changes[name]
            expected[rows] += delta
        torch.testing.assert_close(parameters(engine)[name], expected)


ADAPTERS = {
    "another base": ({"width": 40}, "another model"),
    "dora without lengths": ({"use_dora": True}, "magnitude_vector"),
    "not lora": ({"peft_type": "IA3"}, "peft_type"),
    "no scale": ({"lora_alpha": 0}, "lora_alpha must be"),
    "another rank": ({"r": 4}, "shape .*, but rank 4"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "words"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_cannot_be_merged(tiny_folder, tmp_path, change, words):
    write_adapter(tmp_path / "lora", **change)
    with pytest.raises(NanoglimpseError, match=words):
        load(tiny_folder, adapter=tmp_path / "lora", device="cpu")


def test_an_adapter_of_unknown_layers(tiny_folder, tmp_path):
    lora = write_adapter(tmp_path / "lora")
    renamed = {name.replace("layers.2", "layers.20"): t for name, t in lora.items()}
    save_file(renamed, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(NanoglimpseError, match=r"'model\.layers\.20.*no such linear layer"):
        load(tiny_folder, adapter=tmp_path / "lora", device="cpu")


def test_sources_that_do_not_exist():
    with pytest.raises(UsageError, match="neither a folder nor a Hub id"):
        locate("/no/such/folder", [])
    with pytest.raises(NanoglimpseError, match="hf download Qwen/Some-Model") as caught:
        locate("Qwen/Some-Model", ["*.json"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"device": "cuda"}, "no CUDA here"),
        ({"device": "tpu"}, "unknown device"),
        ({"dtype": "int3"}, "unknown dtype"),
        ({"backend": "magic"}, "backend must be one of"),
    ],
)
def test_options_of_load_that_cannot_be_had(tiny_folder, option, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=words):
        load(tiny_folder, **option)


MEASURE = """
import resource, sys
from nanoglimpse import load
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
engine = load(sys.argv[1], dtype="bfloat16", device="cpu")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (peak - before), float(engine.decoder.norm.weight[0]))
"""


def write_huge(folder):
    """A random checkpoint of 3B shapes in bf16 and two shards, written in pieces; its bytes."""
    folder.mkdir()
    shutil.copy(CONFIGS / "qwen2.5-vl-3b.json", folder / "config.json")
    from nanoglimpse.config import read_config
    from nanoglimpse.kernels.reference.table import TORCH
    from nanoglimpse.model.decoder import Decoder
    from nanoglimpse.model.vision import VisionEncoder
    from nanoglimpse.weights.mapping import parts

    config = read_config(folder / "config.json")
    with torch.device("meta"):
        vision = VisionEncoder(config.vision_config, TORCH)
        decoder = Decoder(config, TORCH)
        model = torch.nn.ModuleDict({"vision": vision, "decoder": decoder})
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names = sorted(parts(model).items())
    noise = torch.randn(2**22).bfloat16().view(torch.uint8).numpy().tobytes()
    weight_map, total = {}, 0
    for number, own in enumerate((names[::2], names[1::2])):
        header, offset = {}, 0
        for name, part in own:
            shape = [part.stop - part.start, *shapes[part.name][1:]]
            size = 2 * torch.Size(shape).numel()
            header[name] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [offset, offset + size],
            }
            offset += size
            weight_map[name] = f"{number}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / f"{number}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for done in range(0, offset, len(noise)):
                file.write(noise[: min(len(noise), offset - done)])
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.slow
def test_loading_3b_takes_little_more_memory_than_the_model(tmp_path):
    """Peak of the process while loading, mapped files included, against the checkpoint's size."""
    free = shutil.disk_usage(tmp_path).free
    if free < 10e9:
        pytest.skip(f"needs 10 GB of disk, {free / 1e9:.0f} are free")
    try:
        total = write_huge(tmp_path / "3b")
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "3b")]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    finally:
        shutil.rmtree(tmp_path / "3b", ignore_errors=True)
    assert total > 7e9
    assert float(out[1]) != 0
    assert int(out[0]) < 1.15 * total, f"{int(out[0]) / total:.2f} times the checkpoint"
