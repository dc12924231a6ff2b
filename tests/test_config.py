"""config.json, strictly: released files, both layouts, and what is refused."""

import json
from pathlib import Path

import pytest

from nanoglimpse import NanoglimpseError
from nanoglimpse.config import parse_config, read_config, read_glimpse_config
from tests.helpers.tiny import GLIMPSE, config_dict

CONFIGS = Path(__file__).parents[1] / "weights" / "configs"
# layers, width, query heads, kv heads, tied, vision MLP
RELEASED = {
    "3b": (36, 2048, 16, 2, True, 3420),
    "7b": (28, 3584, 28, 4, False, 3420),
    "32b": (64, 5120, 40, 8, False, 3456),
    "72b": (80, 8192, 64, 8, False, 3456),
}


@pytest.mark.parametrize("size", RELEASED)
def test_released_configurations(size):
    config = read_config(CONFIGS / f"qwen2.5-vl-{size}.json")
    text, vision = config.text_config, config.vision_config
    assert RELEASED[size] == (
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        config.tie_word_embeddings,
        vision.intermediate_size,
    )
    assert (text.head_dim, text.mrope_section, text.rope_theta) == (128, (16, 24, 24), 1e6)
    assert (vision.head_dim, vision.fullatt_block_indexes) == (80, (7, 15, 23, 31))
    assert (vision.window_size, vision.patch_dim, config.image_token_id) == (112, 1176, 151655)
    assert config.eos_token_id == (151645,)


@pytest.mark.parametrize(("size", "layers"), [("3b", 24), ("7b", 19)])
def test_official_glimpse_configurations(size, layers):
    """K = ⌈2L/3⌉ (paper Tab. 14); the file holds K - 1."""
    base, glimpse = read_glimpse_config(CONFIGS / f"glimpseprune-{size}.json")
    assert base == read_config(CONFIGS / f"qwen2.5-vl-{size}.json")
    assert glimpse.layers == layers == -(-2 * base.text_config.num_hidden_layers // 3)
    assert glimpse.selected_visual_layers == (31, 23, 15, 7)
    assert (glimpse.attn_fuse_size, glimpse.visual_cond_size) == (256, 512)
    assert (glimpse.reduce_threshold, glimpse.max_remain_ratio) == (0.5, None)


def nested(flat: dict) -> dict:
    """The same configuration as transformers 5.x writes it."""
    top = {k: flat[k] for k in flat if k.endswith("token_id") and k != "eos_token_id"}
    moved = {"rope_scaling", "rope_theta", "vision_config", "architectures", "torch_dtype"}
    text = {k: v for k, v in flat.items() if k not in top and k not in moved}
    text["rope_parameters"] = flat["rope_scaling"] | {
        "rope_theta": flat["rope_theta"],
        "rope_type": "default",
    }
    text |= {"model_type": "qwen2_5_vl_text", "layer_types": ["full_attention"], "dtype": "float32"}
    del text["tie_word_embeddings"]
    vision = {k: v for k, v in flat["vision_config"].items() if k != "in_chans"} | {
        "in_channels": 3,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }
    return top | {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": flat["tie_word_embeddings"],
        "text_config": text,
        "vision_config": vision,
    }


@pytest.mark.parametrize("size", RELEASED)
def test_both_layouts_mean_the_same(size):
    flat = json.loads((CONFIGS / f"qwen2.5-vl-{size}.json").read_text())
    assert parse_config(nested(flat), "nested") == parse_config(flat, "flat")


def test_the_mixture_of_both_layouts():
    """transformers 4.53 repeats the text keys at the top, and some of the top in the text part."""
    flat = config_dict()
    mixed = flat | {"text_config": nested(flat)["text_config"] | {"image_token_id": None}}
    assert parse_config(mixed, "mixed") == parse_config(flat, "flat")


def test_the_owner_of_a_key_counts_in_a_mixture():
    flat = config_dict()
    mixed = flat | {"text_config": nested(flat)["text_config"], "hidden_size": 999}
    assert parse_config(mixed, "mixed").text_config.hidden_size == flat["hidden_size"]


def vision_change(**change):
    return config_dict() | {"vision_config": config_dict()["vision_config"] | change}


REFUSED = {
    "unknown key": (config_dict(new_key=1), "unknown key 'new_key'"),
    "unknown vision key": (vision_change(num_registers=4), "vision_config.*'num_registers'"),
    "missing key": (
        {k: v for k, v in config_dict().items() if k != "rms_norm_eps"},
        "'rms_norm_eps'",
    ),
    "missing section": (
        {k: v for k, v in config_dict().items() if k != "vision_config"},
        "vision_config",
    ),
    "other model": (config_dict(model_type="qwen3_vl"), "qwen3_vl"),
    "other activation": (config_dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "sliding window": (config_dict(use_sliding_window=True), "use_sliding_window"),
    "other rope": (
        config_dict(rope_scaling={"type": "yarn", "factor": 4.0, "mrope_section": [1, 1, 2]}),
        "yarn",
    ),
    "no rope": (config_dict(rope_scaling=None), "mrope_section"),
    "text for a number": (
        config_dict(hidden_size="48"),
        "hidden_size must be a whole number from 1 to 65536, got '48'",
    ),
    "truth for a number": (
        config_dict(vocab_size=True),
        "vocab_size must be a whole number .*, got True",
    ),
    "heads": (config_dict(num_attention_heads=5), "do not divide"),
    "sections": (config_dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]}), "add up"),
    "widths": (vision_change(out_hidden_size=64), "out_hidden_size"),
    "full blocks": (vision_change(fullatt_block_indexes=[7, 15]), "fullatt_block_indexes"),
    "channels": (vision_change(in_channels=1), "in_chans 3 but in_channels 1"),
    "quantised": (config_dict(quantization_config={"bits": 4}), "quantization_config"),
}


@pytest.mark.parametrize(("data", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_named(data, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(NanoglimpseError, match=words) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


GLIMPSE_REFUSED = {
    "unknown key": ({"le_depth": 2}, "le_depth"),
    "other predictor": ({"attn_fuse_type": "AttnFuserV2"}, "AttnFuserV2"),
    "logits": ({"use_attention_logits": "no"}, "use_attention_logits"),
    "layer": ({"reduce_layer": 6}, "reduce_layer 6"),
    "selected layer": ({"selected_layers": [4]}, "selected_layers"),
    "tap": ({"selected_visual_layers": [5]}, "selected_visual_layers"),
    "vectors": ({"le_layers": [1, 2]}, "le_layers"),
    "heads": ({"attn_fuse_num_heads": 5}, "attn_fuse_num_heads"),
    "anchor": ({"anchor_positions": ["left"]}, "anchor_positions"),
}


@pytest.mark.parametrize(("change", "words"), GLIMPSE_REFUSED.values(), ids=GLIMPSE_REFUSED)
def test_what_is_refused_of_a_glimpse_configuration(change, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_dict(model_type="qwen2_5_vl_gp") | GLIMPSE | change))
    with pytest.raises(NanoglimpseError, match=words):
        read_glimpse_config(path)


def test_a_base_configuration_is_no_glimpse_configuration():
    with pytest.raises(NanoglimpseError, match="reduce_layer"):
        read_glimpse_config(CONFIGS / "qwen2.5-vl-3b.json")


@pytest.mark.parametrize("content", ["{", "[]", "\x00\xff"])
def test_files_that_are_no_json_objects(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(NanoglimpseError, match="JSON"):
        read_config(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(NanoglimpseError, match="missing"):
        read_config(tmp_path / "config.json")
