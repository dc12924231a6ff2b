"""Every JSON file against its table: kinds, ranges, and keys that may or may not be there."""

import json
import subprocess
import sys

import pytest

from nanoglimpse import NanoglimpseError
from nanoglimpse.config import (
    PixelConfig,
    Sampling,
    parse_config,
    read_config,
    read_generation,
    read_glimpse_config,
    read_json,
    read_pixel_config,
)
from nanoglimpse.config.schema import MAX_BYTES
from nanoglimpse.jsontext import MAX_DEPTH, parse_json
from tests.helpers.tiny import GLIMPSE, TEXT, VISION, config_dict
from tests.test_config import nested, vision_change

INF, NAN = float("inf"), float("nan")


def deep(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (deep(MAX_DEPTH + 2), "nested deeper"),
        (deep(100_000), "nested deeper"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested deeper"),
        ('{"a": 1, "b": {"c": 2, "c": 3}}', "key 'c' stands twice"),
        ('{"a": NaN}', "NaN is not"),
        ('{"a": [-Infinity]}', "-Infinity is not"),
        (r'{"a": "\ud800"}', "surrogate"),
        (r'{"\uDFFF": 1}', "surrogate"),
        ('{"a": ' + "9" * 5000 + "}", "4300|limit"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
    ids=["depth", "very deep", "deep objects", "twice", "NaN", "inf", "half", "half key", "digits",
         "open", "empty"],
)  # fmt: skip
def test_what_is_no_json(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_json_within_its_bounds():
    assert parse_json(deep(MAX_DEPTH)) is not None
    assert parse_json(r'{"a": "😀", "b": [1, -2.5e3, null, true]}')["a"] == "😀"


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_dict()), encoding="utf-8-sig")
    assert read_config(path) == parse_config(config_dict(), "flat")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(NanoglimpseError, match="larger than 64 MB"):
        read_json(path)


# Of every number of config.json: what is none, or outside its range.
WRONG = ["1", True, [1], {}, INF, NAN, -1, 0, 10**400, 2**63, 3.5, None]
NUMBERS = [k for k, v in {**TEXT, **VISION}.items() if type(v) in (int, float)]
NUMBERS.remove("spatial_patch_size")  # read by nothing


@pytest.mark.parametrize("name", sorted(set(NUMBERS)))
@pytest.mark.parametrize("value", WRONG, ids=lambda v: str(v)[:12])
def test_numbers_of_a_model_are_checked(name, value):
    if name in ("rope_theta", "tokens_per_second", "rms_norm_eps") and value == 3.5:
        value = -3.5
    changed = vision_change(**{name: value}) if name in VISION else config_dict(**{name: value})
    with pytest.raises(NanoglimpseError, match=r"must|missing|nan but") as caught:
        parse_config(changed, "config.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


HOSTILE = {
    "depth": vision_change(depth=30_000_000),
    "layers": config_dict(num_hidden_layers=2**31),
    "vocabulary": config_dict(vocab_size=2**31),
    "heads 0": config_dict(num_attention_heads=0),
    "kv heads 0": config_dict(num_key_value_heads=0),
    "unhashable rope": config_dict(rope_scaling={"type": [], "mrope_section": [1, 1, 2]}),
    "unhashable rope 5": config_dict(rope_scaling={"rope_type": {}, "mrope_section": [1, 1, 2]}),
    "sections of text": config_dict(rope_scaling={"type": "mrope", "mrope_section": "112"}),
    "two sections": config_dict(rope_scaling={"type": "mrope", "mrope_section": [2, 2]}),
    "negative section": config_dict(rope_scaling={"type": "mrope", "mrope_section": [-1, 3, 2]}),
    "rope is a list": config_dict(rope_scaling=["mrope_section"]),
    "theta 0": config_dict(rope_theta=0),
    "blocks": vision_change(fullatt_block_indexes=[10**9]),
    "blocks of text": vision_change(fullatt_block_indexes=["1"]),
    "blocks null": vision_change(fullatt_block_indexes=None),
    "token outside": config_dict(image_token_id=130),
    "end outside": config_dict(eos_token_id=[5, 130]),
    "end of text": config_dict(eos_token_id="124"),
    "end of float": config_dict(eos_token_id=124.0),
    "end object": config_dict(eos_token_id={}),
    "tie of text": config_dict(tie_word_embeddings="no"),
    "head width": config_dict(head_dim=16),
    "quantised": config_dict(quantization_config={"bits": 4}),
    "windows by layer": config_dict(layer_types=["sliding_attention"]),
    "text part": config_dict(text_config=3),
    "model type": config_dict(model_type=["qwen2_5_vl"]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_configurations_are_one_line(case):
    with pytest.raises(NanoglimpseError) as caught:
        parse_config(HOSTILE[case], "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_bounds_come_before_building(tmp_path):
    """A model of 3 · 10⁷ blocks would take gigabytes before the first weight is looked for."""
    (tmp_path / "config.json").write_text(json.dumps(vision_change(depth=30_000_000)))
    code = (
        "import sys, resource, nanoglimpse\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: nanoglimpse.load(sys.argv[1], device='cpu')\n"
        "except nanoglimpse.NanoglimpseError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100_000 * (1024 if sys.platform == "darwin" else 1)


HARMLESS = {
    "unsloth_fixed": True,
    "unsloth_version": "2026.1",
    "tokenizer_class": "Qwen2Tokenizer",
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "return_dict": True,
    "torchscript": False,
    "auto_map": {"AutoModel": "x.Y"},
    "keys_to_ignore_at_inference": ["past_key_values"],
    "head_dim": 8,
    "quantization_config": None,
    "num_beams": 1,
    "top_k": 50,
    "temperature": 1.0,
}


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_that_cannot_change_the_model_are_ignored(key):
    flat = config_dict()
    assert parse_config(flat | {key: HARMLESS[key]}, "flat") == parse_config(flat, "flat")
    new = nested(flat)
    new["text_config"][key] = HARMLESS[key]
    assert parse_config(new, "nested") == parse_config(flat, "flat")


@pytest.mark.parametrize(
    "change",
    [
        {"reduce_layer": -1},
        {"selected_layers": []},
        {"selected_layers": [[3]]},
        {"le_layers": [0, 0]},
        {"le_layers": "0"},
        {"attn_fuse_size": 0},
        {"attn_fuse_num_heads": 0},
        {"visual_cond_size": -4},
        {"reduce_threshold": NAN},
        {"reduce_threshold": 2},
        {"min_remain_num": 1.5},
        {"max_remain_ratio": "1"},
        {"anchor_positions": [["tl"]]},
        {"deep_supervision": 0},
    ],
    ids=str,
)
def test_glimpse_keys_are_checked(change, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_dict(model_type="qwen2_5_vl_gp") | GLIMPSE | change))
    with pytest.raises(NanoglimpseError) as caught:
        read_glimpse_config(path)
    assert "\n" not in str(caught.value)


CONFIG = parse_config(config_dict(), "tiny")


def pixels(folder, flat=None, nested=None):
    for name, data in (("preprocessor", flat), ("processor", nested)):
        if data is not None:
            (folder / f"{name}_config.json").write_text(json.dumps(data))
    return read_pixel_config(folder, CONFIG)


OWN = {"min_pixels": 784, "max_pixels": 7840, "image_mean": [0.1, 0.2, 0.3]}


def test_pixels_of_both_files(tmp_path):
    found = PixelConfig(784, 7840, (0.1, 0.2, 0.3))
    for name, files in {
        "flat": (OWN, None),
        "nested": (None, {"image_processor": OWN, "processor_class": "Qwen2_5_VLProcessor"}),
        "both": (OWN, {"image_processor": {"max_pixels": 7840}}),
        "edges": (
            {"size": {"shortest_edge": 784, "longest_edge": 7840}, "image_mean": [0.1, 0.2, 0.3]},
            {"processor_class": "Qwen2_5_VLProcessor"},
        ),
        "areas": ({"size": {"min_pixels": 784, "max_pixels": 7840}}, {"image_processor": OWN}),
    }.items():
        (tmp_path / name).mkdir()
        assert pixels(tmp_path / name, *files) == found, name


def test_a_processor_that_transformers_saves(tmp_path):
    """The file of transformers 5 is read as transformers reads it."""
    from transformers import Qwen2VLImageProcessor

    theirs = Qwen2VLImageProcessor(
        size={"shortest_edge": 784, "longest_edge": 7840}, image_mean=[0.1, 0.2, 0.3]
    )
    content = {"image_processor": json.loads(theirs.to_json_string())}
    assert pixels(tmp_path, None, content) == PixelConfig(784, 7840, (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("flat", "nested", "words"),
    [
        (OWN, {"image_processor": {"max_pixels": 784}}, "max_pixels is 784, but 7840 in prep"),
        ({"do_normalize": False}, None, "do_normalize is False; only True"),
        ({"do_rescale": False}, None, "do_rescale"),
        ({"do_resize": False}, None, "do_resize"),
        ({"do_center_crop": True}, None, "do_center_crop"),
        ({"rescale_factor": 0.5}, None, "rescale_factor"),
        ({"resample": 2}, None, "resample is 2; only 3"),
        ({"size": {"height": 28, "width": 28}}, None, "height"),
        ({"size": 28}, None, "size must be an object"),
        ({"min_pixels": "784"}, None, "min_pixels must be a whole number"),
        ({"max_pixels": 0}, None, "max_pixels"),
        ({"min_pixels": 99, "max_pixels": 98}, None, "is above"),
        ({"image_mean": [0.5]}, None, "image_mean must be a list of 3"),
        ({"image_mean": [0.5, 0.5, "0.5"]}, None, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, None, "image_std"),
        ({"image_std": 0.5}, None, "image_std"),
        ({"patch_size": 16}, None, "patch_size is 16, but config.json has 14"),
        (None, {"image_processor": [1]}, "must be an object"),
        (None, {"image_processor": {"do_normalize": False}}, "processor_config.*do_normalize"),
    ],
    ids=str,
)
def test_other_preprocessings_are_refused_by_name(tmp_path, flat, nested, words):
    with pytest.raises(NanoglimpseError, match=words) as caught:
        pixels(tmp_path, flat, nested)
    assert "\n" not in str(caught.value)


def generation(folder, **content):
    (folder / "generation_config.json").write_text(json.dumps(content))
    return read_generation(folder / "generation_config.json", CONFIG)


@pytest.mark.parametrize(
    ("content", "sampling"),
    [
        ({}, Sampling()),
        ({"repetition_penalty": 1.05}, Sampling(repetition_penalty=1.05)),
        # As 3B and 7B have been released.
        (
            {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05},
            Sampling(0.0, None, 50, 1.05),
        ),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, Sampling(0.0, 0.8)),
        ({"temperature": 0.7}, Sampling(0.0)),
        ({"do_sample": True}, Sampling(1.0, None, 50)),
        ({"do_sample": True, "top_k": 0, "temperature": 0.5}, Sampling(0.5, None, 0)),
        ({"do_sample": None, "top_p": None}, Sampling()),
    ],
    ids=str,
)
def test_sampling_of_a_checkpoint(tmp_path, content, sampling):
    assert generation(tmp_path, **content).sampling == sampling


@pytest.mark.parametrize(
    ("content", "eos"),
    [({}, {124}), ({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 8]}, {7, 8})],
    ids=str,
)
def test_ends_of_a_checkpoint(tmp_path, content, eos):
    assert generation(tmp_path, **content).eos == eos


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "378"),
        ("eos_token_id", 378.0),
        ("eos_token_id", {}),
        ("eos_token_id", [[1]]),
        ("eos_token_id", True),
        ("eos_token_id", -1),
        ("eos_token_id", 130),
        ("do_sample", 1),
        ("temperature", "0.7"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 2),
        ("top_k", 2.5),
        ("repetition_penalty", 0),
        ("num_beams", 4),
        ("min_p", 0.1),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [1]),
    ],
)
def test_what_is_refused_of_a_generation_config(tmp_path, key, value):
    with pytest.raises(NanoglimpseError, match=key) as caught:
        generation(tmp_path, **{key: value})
    assert "\n" not in str(caught.value)
