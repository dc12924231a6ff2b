"""LoRA adapters: PEFT itself applies them to transformers' model, and the logits agree."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from nanoglimpse import NanoglimpseError, load
from tests.helpers.tiny import config_dict, write_checkpoint
from tests.model.test_parity import close, hf_inputs, prompt_of

peft = pytest.importorskip("peft")

PARTS = (4, (1, 12, 18), 5)
LINEAR = ["q_proj", "v_proj", "down_proj", "qkv"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, config_dict(tie_word_embeddings=request.param))
    return folder


def hf_model(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def adapt(base, out, bare=False, **config):
    """Writes a random adapter with PEFT; returns transformers' model as PEFT loads it."""
    config = {"r": 3, "lora_alpha": 6, "target_modules": LINEAR} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = hf_model(base)
        model = peft.get_peft_model(whole.model if bare else whole, peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                scale = 0.4 * parameter[0].numel() ** -0.5
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
            elif "magnitude" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data *= 1 + 0.3 * noise
        model.save_pretrained(out)
        fresh = hf_model(base)
        loaded = peft.PeftModel.from_pretrained(fresh.model if bare else fresh, out)
    if bare:
        fresh.model = loaded
    return fresh if bare else loaded


def same_logits(base, adapter, theirs):
    """Our logits with the adapter are theirs, and not those without it."""
    plain = load(base, dtype="float32", device="cpu")
    engine = load(base, adapter=adapter, dtype="float32", device="cpu")
    prompt = prompt_of(engine, PARTS)
    ours = engine.prefill(prompt, "dense").logits
    inputs = hf_inputs(prompt, engine.config)
    with torch.no_grad():
        close(ours, theirs(**inputs).logits[0, -1])
    before = plain.prefill(prompt, "dense").logits
    assert (ours - before).norm() > 0.02 * before.norm(), "the adapter has no effect"


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"layers.2.self_attn.q_proj": 5, r"blocks.\d+.attn.qkv": 2},
        "alpha_pattern": {"down_proj": 11, "^model.language_model.layers.1.self_attn.v_proj": 1},
    },
    "rslora, dora, patterns": {
        "use_rslora": True,
        "use_dora": True,
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"qkv": 9},
    },
    "patch embedding": {"target_modules": ["proj"]},
    "patch embedding, dora": {"target_modules": ["proj"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "modules to save": {"modules_to_save": ["lm_head", "norm1"]},
    "embeddings to save": {"modules_to_save": ["embed_tokens"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_peft_says_the_same(base, tmp_path, kind):
    theirs = adapt(base, tmp_path / "lora", **KINDS[kind])
    same_logits(base, tmp_path / "lora", theirs)


@pytest.mark.slow
def test_names_of_a_bare_model(base, tmp_path):
    theirs = adapt(base, tmp_path / "lora", bare=True)
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any(name.startswith("base_model.model.language_model.") for name in names)
    same_logits(base, tmp_path / "lora", theirs)


@pytest.mark.slow
def test_names_with_the_name_of_the_adapter(base, tmp_path):
    theirs = adapt(base, tmp_path / "lora", use_dora=True)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        new = name.replace(".weight", ".default.weight")
        renamed[new if "lora_A" in name or "lora_B" in name else f"{name}.default.weight"] = tensor
    save_file(renamed, file)
    same_logits(base, tmp_path / "lora", theirs)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A plain adapter, with its base."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter") / "lora"
    write_checkpoint(base)
    adapt(base, out)
    return base, out


def configured(folder, change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


OTHERS = {
    **{
        f"init {kind}": ({"init_lora_weights": kind}, "init_lora_weights must be one of")
        for kind in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica")
    },
    "alora": ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\]; only None"),
    "qalora": ({"use_qalora": True}, "use_qalora is True"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "arrow_config"),
    "kasa": ({"kasa_config": {}}, "kasa_config"),
    "velora": ({"velora_config": {}}, "velora_config"),
    "monteclora": ({"monteclora_config": {}}, "monteclora_config"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "parameters": ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "bias of LoRA": ({"lora_bias": True}, "lora_bias"),
    "biases": ({"bias": "all"}, "bias is 'all'; only 'none'"),
    "ties": ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "a key of tomorrow": ({"use_better_lora": True}, "unknown key 'use_better_lora'"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
    "rank of text": ({"r": "3"}, "r must be a whole number"),
    "rank 0": ({"r": 0}, "r must be a whole number"),
    "scale": ({"lora_alpha": float("inf")}, "JSON"),
    "pattern": ({"rank_pattern": {"(a": 3}}, "rank_pattern has"),
    "slow pattern": ({"alpha_pattern": {"(a+)+": 3}}, "quantifiers"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": 7}}, "rank 7"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_kinds_are_refused_by_name(adapter, tmp_path, case):
    base, folder = adapter[0], shutil.copytree(adapter[1], tmp_path / "lora")
    change, words = OTHERS[case]
    configured(folder, change)
    with pytest.raises(NanoglimpseError, match=words) as caught:
        load(base, adapter=folder, dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


def test_every_key_that_peft_writes_is_known(adapter):
    """`to_dict` has all keys of `LoraConfig`, at their defaults."""
    path = adapter[1] / "adapter_config.json"
    assert peft.LoraConfig().to_dict().keys() <= json.loads(path.read_text()).keys()
    load(adapter[0], adapter=adapter[1], dtype="float32", device="cpu")


QUERY = "base_model.model.model.language_model.layers.2.self_attn.q_proj.lora_A.weight"


def without_tensors(tensors):
    tensors.clear()


def empty_shape(tensors):
    tensors[QUERY] = torch.zeros(0)


def other_rank(tensors):
    tensors[QUERY] = torch.zeros(4, 48)


def two_names(tensors):
    tensors[QUERY.replace(".language_model", "")] = tensors[QUERY].clone()


def not_finite(tensors):
    tensors[QUERY][0, 0] = float("nan")


def no_partner(tensors):
    del tensors[QUERY.replace("lora_A", "lora_B")]


def lengths_without_dora(tensors):
    tensors[QUERY.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(48)


def embeddings(tensors):
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(3, 130)


def not_to_save(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.ones(130, 48)


def whole_numbers(tensors):
    tensors[QUERY] = torch.ones(3, 48, dtype=torch.int32)


BROKEN = {
    without_tensors: "holds no LoRA matrices; with ZeRO-3",
    empty_shape: r"lora_A of shape \[0\]",
    other_rank: r"shape \[4, 48\], but rank 3",
    two_names: "under two names",
    not_finite: "not finite",
    no_partner: "needs lora_A and lora_B",
    lengths_without_dora: "lora_magnitude_vector",
    embeddings: "not a LoRA matrix",
    not_to_save: "not a LoRA matrix",
    whole_numbers: "I32",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_broken_adapters_are_refused(adapter, tmp_path, damage):
    base, folder = adapter[0], shutil.copytree(adapter[1], tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(NanoglimpseError, match=BROKEN[damage]) as caught:
        load(base, adapter=folder, dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)
