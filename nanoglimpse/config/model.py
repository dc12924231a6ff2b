"""Configuration, read strictly from the config.json of a checkpoint.

Fields have the names of the keys. Both layouts in use are read: flat (transformers 4.x: text keys
at the top, `rope_scaling`, `in_chans`) and nested (5.x: `text_config`, `rope_parameters`,
`in_channels`), and the mixture that 4.52 to 4.57 wrote. A missing key is an error, and so is a key
that is neither used nor ignored by name: a reader that drops unknown keys would lose a
`window_size`, and with it the window attention, without a message. The bounds are far above every
released model; without them a file of a few bytes could ask for a model of billions of layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanoglimpse.config.schema import (
    Key,
    Schema,
    anything,
    choice,
    either,
    many,
    only,
    read_json,
    real,
    shown,
    text,
    truth,
    whole,
    words,
)
from nanoglimpse.errors import NanoglimpseError, UsageError


@dataclass(frozen=True)
class VisionConfig:
    """`vision_config`: the windowed vision transformer and its merger."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    tokens_per_second: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that the merger combines into one visual token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels · frames · height · width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """`text_config`, or the text keys at the top of a flat file: the decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    mrope_section: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    """Configuration of a Qwen2.5-VL checkpoint."""

    text_config: TextConfig
    vision_config: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: tuple[int, ...]


@dataclass(frozen=True)
class GlimpseConfig:
    """The keys that GlimpsePrune adds (official configuration.py; values in the paper, Tab. 14)."""

    reduce_layer: int
    selected_layers: tuple[int, ...]
    le_layers: tuple[int, ...]
    attn_fuse_size: int
    visual_cond_size: int
    attn_fuse_num_heads: int
    attn_fuse_global: bool
    selected_visual_layers: tuple[int, ...]
    deep_supervision: bool
    use_attention_logits: bool = True
    reduce_threshold: float = 0.5
    min_remain_num: int | None = 1
    max_remain_ratio: float | None = None
    anchor_positions: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """K, the number of decoder layers that see every visual token (paper Sec. 4)."""
        return self.reduce_layer + 1


# Keys of any configuration of transformers 4 and 5 that no code of Qwen2.5-VL reads, and keys that
# tools add.
_COMMON_IGNORED = words(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures auto_map bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id dtype early_stopping encoder_no_repeat_ngram_size finetuning_task
    id2label initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id
    length_penalty max_length min_length model_type num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type remove_invalid_values
    return_dict return_dict_in_generate sep_token_id task_specific_params tf_legacy_loss
    tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed
    unsloth_version use_bfloat16 use_cache
    """
)
# Keys that would change the model or the choice of tokens if they were not at their defaults.
_COMMON: dict[str, Key] = {
    "quantization_config": only(None),
    "pruned_heads": only({}),
    "num_beams": only(1),
    "num_beam_groups": only(1),
    "do_sample": only(False),
    "temperature": only(1.0),
    "top_k": only(50),
    "top_p": only(1.0),
    "typical_p": only(1.0),
    "repetition_penalty": only(1.0),
    "diversity_penalty": only(0.0),
    "no_repeat_ngram_size": only(0),
    "bad_words_ids": only(None),
    "begin_suppress_tokens": only(None),
    "suppress_tokens": only(None),
    "forced_bos_token_id": only(None),
    "forced_eos_token_id": only(None),
    "exponential_decay_length_penalty": only(None),
}
LAYERS, WIDTH, INNER, HEADS, VOCABULARY = 512, 2**16, 2**20, 2**10, 2**22
_INDEX = whole(0, LAYERS - 1)
TOKEN_IDS = either(whole(0, VOCABULARY - 1, ()), many(whole(0, VOCABULARY - 1), 0, 64))
_VISION = {
    "depth": whole(1, LAYERS),
    "hidden_size": whole(1, WIDTH),
    "intermediate_size": whole(1, INNER),
    "num_heads": whole(1, HEADS),
    "out_hidden_size": whole(1, WIDTH),
    "in_channels": whole(1, 16),
    "patch_size": whole(1, 256),
    "temporal_patch_size": whole(1, 16),
    "spatial_merge_size": whole(1, 16),
    "window_size": whole(1, WIDTH),
    "fullatt_block_indexes": many(_INDEX, 0, LAYERS),
    "tokens_per_second": real(1e-3, 1e3),
}
VISION = Schema(
    _VISION
    | _COMMON
    | {
        "hidden_act": only("silu"),
        "rope_parameters": only({"rope_theta": 1e4, "rope_type": "axial"}),
        "tie_word_embeddings": anything(None),
    },
    _COMMON_IGNORED | {"spatial_patch_size"},
)
_TEXT = {
    "vocab_size": whole(1, VOCABULARY),
    "hidden_size": whole(1, WIDTH),
    "intermediate_size": whole(1, INNER),
    "num_hidden_layers": whole(1, LAYERS),
    "num_attention_heads": whole(1, HEADS),
    "num_key_value_heads": whole(1, HEADS),
    "rms_norm_eps": real(1e-12, 1e-2),
    "max_position_embeddings": whole(1, 2**31 - 1),
}
_TEXT_CHECKED = {
    "hidden_act": only("silu"),
    "use_sliding_window": only(False),
    "layer_types": many(choice("full_attention"), 0, LAYERS, ()),
    "head_dim": whole(1, WIDTH, None),
}
_TEXT_IGNORED = {"attention_dropout", "max_window_layers", "sliding_window", "vision_token_id"}
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}
_ROPE = Schema(
    {
        "type": choice("mrope", "default", default=None),
        "rope_type": choice("mrope", "default", default=None),
        "mrope_section": many(whole(0, WIDTH), 3, 3),
        "rope_theta": real(1, 1e12, None),
        "partial_rotary_factor": only(1.0),
    },
    unknown=lambda name, value: f"unknown key {shown(name)} in the rope parameters",
)
_OWN = {
    "tie_word_embeddings": truth(False),
    "image_token_id": whole(0, VOCABULARY - 1),
    "video_token_id": whole(0, VOCABULARY - 1),
    "vision_start_token_id": whole(0, VOCABULARY - 1),
    "vision_end_token_id": whole(0, VOCABULARY - 1),
    "eos_token_id": TOKEN_IDS,
}
# In a file of transformers 4.52 to 4.57 the sections repeat each other's keys, null among them.
TEXT = Schema(
    _TEXT | _TEXT_CHECKED | _COMMON | {"rope_theta": real(1, 1e12)},
    _TEXT_IGNORED | _COMMON_IGNORED | _OWN.keys(),
)
OWN = Schema(_OWN | _COMMON, _COMMON_IGNORED | {"text_config", "vision_config"})
_GLIMPSE = {
    "reduce_layer": _INDEX,
    "selected_layers": many(_INDEX, 1, LAYERS),
    "le_layers": many(_INDEX, 1, LAYERS),
    "attn_fuse_size": whole(1, WIDTH),
    "visual_cond_size": whole(0, WIDTH),
    "attn_fuse_num_heads": whole(1, HEADS),
    "attn_fuse_global": truth(),
    "selected_visual_layers": many(_INDEX, 0, LAYERS),
    "deep_supervision": truth(),
    "use_attention_logits": truth(True),
    "reduce_threshold": real(0, 1, 0.5),
    "min_remain_num": whole(0, 2**31 - 1, 1, null=None),
    "max_remain_ratio": real(0, 1, None),
    "anchor_positions": many(text(), 0, 4, ()),
}
GLIMPSE = Schema(
    _GLIMPSE
    | {
        "attn_fuse_type": only("AttnFuserV1"),
        "attn_fuse_hidden_act": only("silu"),
        "le_length": only(1),
        "le_norm_type": only("rmsnorm"),
        "use_ref_masks": only(False),
        "use_zero_masks": only(False),
        "fixed_remain_ratio": only(None),
    },
    # The first two only matter in training; the third chooses an implementation.
    {"le_dropout_prob", "ori_attn_supervision", "attn_fuse_use_flash_attn"},
)
ANCHORS = ("tl", "tr", "bl", "br")


def read_config(path: Path) -> Config:
    """The model configuration in `path`, a checkpoint's config.json.

    Raises:
        NanoglimpseError: a key is unknown, missing, of the wrong kind or outside its range; the
            message names it.
    """
    return parse_config(read_json(path), str(path))


def read_glimpse_config(path: Path) -> tuple[Config, GlimpseConfig]:
    """Base and glimpse configuration in `path`, the config.json beside the glimpse weights.

    Raises:
        NanoglimpseError: as `read_config`; also when the file has no glimpse keys.
    """
    data, where = read_json(path), str(path)
    names = GLIMPSE.keys.keys() | set(GLIMPSE.ignored)
    base = parse_config({k: v for k, v in data.items() if k not in names}, where)
    read = GLIMPSE.read({k: v for k, v in data.items() if k in names}, where)
    glimpse = GlimpseConfig(**{name: read[name] for name in _GLIMPSE})
    check_glimpse(base, glimpse, where)
    return base, glimpse


def parse_config(data: Mapping[str, Any], where: str) -> Config:
    """A `Config` from the content of config.json; `where` names the file in errors."""
    if data.get("model_type") not in ("qwen2_5_vl", "qwen2_5_vl_gp"):
        found = shown(data.get("model_type"))
        raise NanoglimpseError(f"{where}: model_type is {found}; only 'qwen2_5_vl' can be loaded")
    vision = _in_channels(_section(data, "vision_config", where), where)
    text_names = _TEXT.keys() | _TEXT_CHECKED.keys() | _TEXT_IGNORED | _ROPE_KEYS
    if "text_config" in data:
        text_where, part = f"{where} (text_config)", _section(data, "text_config", where)
    else:
        text_where, part = where, {k: v for k, v in data.items() if k in text_names}
    own = {k: v for k, v in data.items() if k not in text_names}
    # transformers 4.52 to 4.57 repeat keys of one section in the other; the owner's value counts.
    own.setdefault("eos_token_id", part.get("eos_token_id"))
    # Either may tie, as in transformers 5: files of 4.x have it in the text part.
    if not own.get("tie_word_embeddings") and part.get("tie_word_embeddings") is not None:
        own["tie_word_embeddings"] = part["tie_word_embeddings"]
    rope = _rope(part, text_where)
    flat = {k: v for k, v in part.items() if k not in _ROPE_KEYS}
    texts = TEXT.read(flat | {"rope_theta": rope["rope_theta"]}, text_where)
    visions = VISION.read(vision, f"{where} (vision_config)")
    top = OWN.read(own, where)
    eos = top["eos_token_id"]
    config = Config(
        TextConfig(
            **{name: texts[name] for name in [*_TEXT, "rope_theta"]},
            mrope_section=rope["mrope_section"],
        ),
        VisionConfig(**{name: visions[name] for name in _VISION}),
        **{name: top[name] for name in _OWN} | {"eos_token_id": _tuple(eos)},
    )
    for mistake in _mistakes(config, texts["head_dim"]):
        raise NanoglimpseError(f"{where}: {mistake}")
    return config


def _tuple(ids: int | tuple[int, ...]) -> tuple[int, ...]:
    return (ids,) if isinstance(ids, int) else ids


def _section(data: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = data.get(name)
    if not isinstance(section, dict):
        raise NanoglimpseError(f"{where}: key '{name}' is missing or not an object")
    return section


def _rope(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_scaling` (4.x) or `rope_parameters` (5.x), with the `rope_theta` beside it."""
    rope = part.get("rope_parameters") or part.get("rope_scaling")
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        raise NanoglimpseError(f"{where}: no mrope_section in rope_scaling or rope_parameters")
    read = _ROPE.read(rope, where)
    if read["rope_theta"] is None:
        if "rope_theta" not in part:
            raise NanoglimpseError(f"{where}: key 'rope_theta' is missing")
        read["rope_theta"] = part["rope_theta"]
    return read


def _in_channels(vision: dict[str, Any], where: str) -> dict[str, Any]:
    """`in_chans` (4.x) as `in_channels` (5.x); if both are given, they must agree."""
    vision = dict(vision)
    old = vision.pop("in_chans", None)
    if old is not None and vision.setdefault("in_channels", old) != old:
        new = vision["in_channels"]
        raise NanoglimpseError(
            f"{where} (vision_config): in_chans {shown(old)} but in_channels {shown(new)}"
        )
    return vision


def _mistakes(config: Config, head_dim: int | None) -> Iterator[str]:
    """Keys that contradict each other, so that the model cannot be built."""
    text, vision = config.text_config, config.vision_config
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    section, unit = text.mrope_section, vision.patch_size * vision.spatial_merge_size
    if text.hidden_size % heads or heads % kv_heads:
        yield (
            f"hidden_size {text.hidden_size}, num_attention_heads {heads} and "
            f"num_key_value_heads {kv_heads} do not divide each other"
        )
    if head_dim not in (None, text.head_dim):
        yield f"head_dim is {head_dim}; only hidden_size / num_attention_heads is supported"
    if 2 * sum(section) != text.head_dim:
        yield f"mrope_section {section} must be three numbers that add up to {text.head_dim}/2"
    if vision.hidden_size % (4 * vision.num_heads):
        yield f"vision hidden_size {vision.hidden_size} must be a multiple of 4 · num_heads"
    if vision.out_hidden_size != text.hidden_size:
        yield f"vision out_hidden_size {vision.out_hidden_size} must equal hidden_size"
    if vision.window_size < unit:
        yield f"window_size {vision.window_size} is smaller than one visual token, {unit} px"
    if not set(vision.fullatt_block_indexes) <= set(range(vision.depth)):
        yield f"fullatt_block_indexes {shown(vision.fullatt_block_indexes)} must be below depth"
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    highest = max([*config.eos_token_id, *(getattr(config, name) for name in ids)])
    if highest >= text.vocab_size:
        yield f"token id {highest} is not below vocab_size {text.vocab_size}"


def _glimpse_mistakes(base: Config, glimpse: GlimpseConfig) -> Iterator[str]:
    """Glimpse keys that contradict each other or the model."""
    layers, heads = range(base.text_config.num_hidden_layers), glimpse.attn_fuse_num_heads
    size, taps = glimpse.attn_fuse_size, glimpse.selected_visual_layers
    selected, anchors = glimpse.selected_layers, glimpse.anchor_positions
    if glimpse.reduce_layer not in layers:
        yield f"reduce_layer {glimpse.reduce_layer} must be one of the {len(layers)} layers"
    if not set(selected) <= set(range(glimpse.layers)):
        yield f"selected_layers {shown(selected)} must be in 0 to reduce_layer"
    given = glimpse.le_layers
    if 0 not in given or not set(given) <= set(layers) or len(set(given)) < len(given):
        yield f"le_layers {shown(given)} must be different layers of the model, 0 among them"
    if not set(taps) <= set(range(base.vision_config.depth)):
        yield f"selected_visual_layers {shown(taps)} must be blocks of the vision encoder"
    if size % heads or (size + glimpse.visual_cond_size) % (4 * heads):
        yield f"attn_fuse_num_heads {heads} does not divide the widths of the predictor"
    if not set(anchors) <= set(ANCHORS):
        yield f"anchor_positions {shown(anchors)} must be among {ANCHORS}"


def check_glimpse(base: Config, glimpse: GlimpseConfig, where: str) -> None:
    """Raises a NanoglimpseError if the glimpse configuration does not fit that of the model."""
    for mistake in _glimpse_mistakes(base, glimpse):
        raise NanoglimpseError(f"{where}: {mistake}")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. A field that is None is unset.

    `Engine.ask` and `Engine.stream` take unset fields from the checkpoint's generation_config.json;
    everywhere else, and without that file, they are those of `GREEDY`.

    Attributes:
        temperature: sampling temperature; 0 always takes the most likely token.
        top_p: sample from the smallest set of tokens with this probability.
        top_k: sample from the k most likely tokens; 0 for all.
        repetition_penalty: divides the logits of tokens seen before, or multiplies negative ones.
        seed: makes sampling repeatable, with the same result in a batch as alone.
        samples: how many prompts in a row of a batch are the same prompt, asked for several
            answers; sample i of them draws from a generator of (seed, i).

    Raises:
        UsageError: a value is outside its range.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    samples: int = 1

    def __post_init__(self):
        temperature, top_p, penalty = self.temperature, self.top_p, self.repetition_penalty
        if temperature is not None and not 0 <= temperature < float("inf"):
            raise UsageError(f"temperature must be in [0, ∞), got {temperature}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"top_p must be in (0, 1], got {top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise UsageError(f"top_k must be at least 0, got {self.top_k}")
        if penalty is not None and not 0 < penalty < float("inf"):
            raise UsageError(f"repetition_penalty must be in (0, ∞), got {penalty}")
        if self.samples < 1:
            raise UsageError(f"samples must be at least 1, got {self.samples}")

    def over(self, base: "Sampling") -> "Sampling":
        """These fields, and those of `base` where they are unset."""
        names = [field.name for field in fields(self)]
        both = {name: (getattr(self, name), getattr(base, name)) for name in names}
        return Sampling(**{n: theirs if own is None else own for n, (own, theirs) in both.items()})

    def values(self) -> tuple[float, float, int, float]:
        """Temperature, top_p, top_k and repetition penalty; those of `GREEDY` where unset."""
        top_p = 1.0 if self.top_p is None else self.top_p
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        return self.temperature or 0.0, top_p, self.top_k or 0, penalty

    def shared(self, base: "Sampling") -> tuple[str, ...]:
        """The fields that `base` has set, to the same value."""
        names = [field.name for field in fields(self) if field.name != "samples"]
        return tuple(n for n in names if None is not getattr(base, n) == getattr(self, n))


UNSET = Sampling()
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
