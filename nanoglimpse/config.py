"""Configuration, read strictly from the config.json of a checkpoint.

Fields have the names of the keys. Both layouts in use are read: flat (transformers 4.x: text keys
at the top, `rope_scaling`, `in_chans`) and nested (5.x: `text_config`, `rope_parameters`,
`in_channels`), and the mixture that 4.52 to 4.57 wrote. A missing key is an error, and so is a key
that is neither used nor ignored by name: a reader that drops unknown keys would lose a
`window_size`, and with it the window attention, without a message.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

from nanoglimpse.errors import NanoglimpseError


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


@dataclass(frozen=True)
class PixelConfig:
    """preprocessor_config.json, with the values of the released Qwen2.5-VL checkpoints as defaults.

    `raw` is not a key of the file. If it is set, patches stay uint8 pixels, which take an eighth of
    the bytes, and the vision encoder normalises them.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 12845056
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    raw: bool = False


_COMMON_IGNORED = {
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "dtype",
    "initializer_range",
    "model_type",
    "torch_dtype",
    "transformers_version",
}
_TEXT_FIXED = {"hidden_act": "silu", "use_sliding_window": False}
_TEXT_IGNORED = {
    "attention_dropout",
    "bos_token_id",
    "layer_types",
    "max_window_layers",
    "pad_token_id",
    "sliding_window",
    "use_cache",
    "vision_token_id",
}
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}
_VISION_FIXED = {"hidden_act": "silu", "rope_parameters": {"rope_theta": 1e4, "rope_type": "axial"}}
_VISION_IGNORED = {"spatial_patch_size"}
_GLIMPSE_FIXED = {
    "attn_fuse_type": "AttnFuserV1",
    "attn_fuse_hidden_act": "silu",
    "le_length": 1,
    "le_norm_type": "rmsnorm",
    "use_ref_masks": False,
    "use_zero_masks": False,
    "fixed_remain_ratio": None,
}
# The first two only matter in training; the third chooses an implementation.
_GLIMPSE_IGNORED = {"le_dropout_prob", "ori_attn_supervision", "attn_fuse_use_flash_attn"}
ANCHORS = ("tl", "tr", "bl", "br")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        NanoglimpseError: the file does not exist, is not JSON, or is not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NanoglimpseError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise NanoglimpseError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise NanoglimpseError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def read_config(path: Path) -> Config:
    """The model configuration in `path`, a checkpoint's config.json.

    Raises:
        NanoglimpseError: a key is unknown, missing or of the wrong type; the message names it.
    """
    return parse_config(read_json(path), str(path))


def read_glimpse_config(path: Path) -> tuple[Config, GlimpseConfig]:
    """Base and glimpse configuration in `path`, the config.json beside the glimpse weights.

    Raises:
        NanoglimpseError: as `read_config`; also when the file has no glimpse keys.
    """
    data = read_json(path)
    names = _names(GlimpseConfig) | _GLIMPSE_FIXED.keys() | _GLIMPSE_IGNORED
    base = parse_config({k: v for k, v in data.items() if k not in names}, str(path))
    own = {k: v for k, v in data.items() if k in names}
    glimpse = _build(GlimpseConfig, own, str(path), _GLIMPSE_FIXED, _GLIMPSE_IGNORED)
    check_glimpse(base, glimpse, str(path))
    return base, glimpse


def parse_config(data: Mapping[str, Any], where: str) -> Config:
    """A `Config` from the content of config.json; `where` names the file in errors."""
    if data.get("model_type") not in ("qwen2_5_vl", "qwen2_5_vl_gp"):
        found = data.get("model_type")
        raise NanoglimpseError(f"{where}: model_type is {found!r}; only 'qwen2_5_vl' can be loaded")
    text_names = _names(TextConfig) | _TEXT_FIXED.keys() | _TEXT_IGNORED | _ROPE_KEYS
    own_names = _names(Config)
    if "text_config" in data:
        text, text_where = dict(_section(data, "text_config", where)), f"{where} (text_config)"
    else:
        text, text_where = {k: v for k, v in data.items() if k in text_names}, where
    vision = dict(_section(data, "vision_config", where))
    # transformers 4.52 to 4.57 repeat keys of one section in the other; the owner's value counts.
    shared = ("tie_word_embeddings", "eos_token_id")
    own: dict[str, Any] = {k: text[k] for k in shared if k in text}
    own |= {k: v for k, v in data.items() if k not in text_names}
    own["eos_token_id"] = _token_ids(own.get("eos_token_id"))
    own["text_config"] = _build(
        TextConfig,
        _flat_rope(text, text_where),
        text_where,
        _TEXT_FIXED,
        _TEXT_IGNORED | _COMMON_IGNORED | own_names,
    )
    own["vision_config"] = _build(
        VisionConfig,
        _in_channels(vision, where),
        f"{where} (vision_config)",
        _VISION_FIXED,
        _VISION_IGNORED | _COMMON_IGNORED,
    )
    config = _build(Config, own, where, {}, _COMMON_IGNORED)
    for mistake in _mistakes(config):
        raise NanoglimpseError(f"{where}: {mistake}")
    return config


def _names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)}


def _section(data: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = data.get(name)
    if not isinstance(section, dict):
        raise NanoglimpseError(f"{where}: key '{name}' is missing or not an object")
    return section


def _token_ids(value: Any) -> Any:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else value


def _flat_rope(text: dict[str, Any], where: str) -> dict[str, Any]:
    """`rope_scaling` (4.x) or `rope_parameters` (5.x) as `rope_theta` and `mrope_section`."""
    flat = {k: v for k, v in text.items() if k not in _ROPE_KEYS}
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        raise NanoglimpseError(f"{where}: no mrope_section in rope_scaling or rope_parameters")
    kinds = {rope[key] for key in ("type", "rope_type") if key in rope}
    if not kinds <= {"mrope", "default"}:
        raise NanoglimpseError(f"{where}: rope type {sorted(kinds)} is not supported, only mrope")
    unknown = rope.keys() - {"type", "rope_type", "mrope_section", "rope_theta"}
    if unknown:
        raise NanoglimpseError(f"{where}: unknown key '{min(unknown)}' in the rope parameters")
    flat["mrope_section"] = rope["mrope_section"]
    theta = {"rope_theta": text.get("rope_theta")} | rope
    if theta["rope_theta"] is not None:
        flat["rope_theta"] = theta["rope_theta"]
    return flat


def _in_channels(vision: dict[str, Any], where: str) -> dict[str, Any]:
    """`in_chans` (4.x) as `in_channels` (5.x); if both are given, they must agree."""
    old = vision.pop("in_chans", None)
    if old is not None and vision.setdefault("in_channels", old) != old:
        new = vision["in_channels"]
        raise NanoglimpseError(f"{where} (vision_config): in_chans {old} but in_channels {new}")
    return vision


def _build(
    cls: type,
    data: Mapping[str, Any],
    where: str,
    fixed: Mapping[str, Any],
    ignored: Collection[str],
) -> Any:
    """An instance of the dataclass `cls`; every key of `data` must be used, fixed or ignored."""
    known = {f.name: f for f in fields(cls)}
    for key, value in data.items():
        if key in fixed and value != fixed[key]:
            raise NanoglimpseError(f"{where}: {key} is {value!r}; only {fixed[key]!r} is supported")
        if key not in known and key not in fixed and key not in ignored:
            raise NanoglimpseError(f"{where}: unknown key '{key}' (neither used nor ignored)")
    for name, field in known.items():
        if name not in data and field.default is MISSING:
            raise NanoglimpseError(f"{where}: key '{name}' is missing")
    used = {name: data[name] for name in known if name in data}
    return cls(**{name: _typed(known[name].type, v, name, where) for name, v in used.items()})


_KINDS = {
    int: lambda v: type(v) is int,
    bool: lambda v: type(v) is bool,
    float: lambda v: type(v) in (int, float),
    tuple[int, ...]: lambda v: isinstance(v, list | tuple) and all(type(i) is int for i in v),
    tuple[str, ...]: lambda v: isinstance(v, list | tuple) and all(type(i) is str for i in v),
    NoneType: lambda v: v is None,
    TextConfig: lambda v: isinstance(v, TextConfig),
    VisionConfig: lambda v: isinstance(v, VisionConfig),
}


def _typed(kind: Any, value: Any, name: str, where: str) -> Any:
    """`value` as the type that a field declares; text is never converted to a number."""
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    for option in options:
        if _KINDS[option](value):
            return tuple(value) if isinstance(value, list) else value
    wanted = " or ".join(str(getattr(o, "__name__", o)) for o in options)
    raise NanoglimpseError(f"{where}: {name} must be {wanted}, got {value!r}")


def _mistakes(config: Config) -> Iterator[str]:
    """Keys that contradict each other, so that the model cannot be built."""
    text, vision = config.text_config, config.vision_config
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    section, unit = text.mrope_section, vision.patch_size * vision.spatial_merge_size
    if text.hidden_size % heads or heads % kv_heads:
        yield (
            f"hidden_size {text.hidden_size}, num_attention_heads {heads} and "
            f"num_key_value_heads {kv_heads} do not divide each other"
        )
    if len(section) != 3 or 2 * sum(section) != text.head_dim:
        yield f"mrope_section {section} must be three numbers that add up to {text.head_dim}/2"
    if vision.hidden_size % (4 * vision.num_heads):
        yield f"vision hidden_size {vision.hidden_size} must be a multiple of 4 · num_heads"
    if vision.out_hidden_size != text.hidden_size:
        yield f"vision out_hidden_size {vision.out_hidden_size} must equal hidden_size"
    if vision.window_size < unit:
        yield f"window_size {vision.window_size} is smaller than one visual token, {unit} px"
    if not set(vision.fullatt_block_indexes) <= set(range(vision.depth)):
        yield f"fullatt_block_indexes {vision.fullatt_block_indexes} must be below depth"


def _glimpse_mistakes(base: Config, glimpse: GlimpseConfig) -> Iterator[str]:
    """Glimpse keys that contradict each other or the model."""
    layers, heads = range(base.text_config.num_hidden_layers), glimpse.attn_fuse_num_heads
    size, taps = glimpse.attn_fuse_size, glimpse.selected_visual_layers
    selected, anchors = glimpse.selected_layers, glimpse.anchor_positions
    if glimpse.reduce_layer not in layers:
        yield f"reduce_layer {glimpse.reduce_layer} must be one of the {len(layers)} layers"
    if not selected or not set(selected) <= set(range(glimpse.layers)):
        yield f"selected_layers {selected} must be in 0 to reduce_layer, and at least one"
    if 0 not in glimpse.le_layers or not set(glimpse.le_layers) <= set(layers):
        yield f"le_layers {glimpse.le_layers} must be layers of the model, 0 among them"
    if not set(taps) <= set(range(base.vision_config.depth)):
        yield f"selected_visual_layers {taps} must be blocks of the vision encoder"
    if size % heads or (size + glimpse.visual_cond_size) % (4 * heads):
        yield f"attn_fuse_num_heads {heads} does not divide the widths of the predictor"
    if not set(anchors) <= set(ANCHORS):
        yield f"anchor_positions {anchors} must be among {ANCHORS}"


def check_glimpse(base: Config, glimpse: GlimpseConfig, where: str) -> None:
    """Raises a NanoglimpseError if the glimpse configuration does not fit that of the model."""
    for mistake in _glimpse_mistakes(base, glimpse):
        raise NanoglimpseError(f"{where}: {mistake}")


def read_pixel_config(path: Path, config: Config) -> PixelConfig:
    """The preprocessor_config.json in `path`, or the defaults if the file does not exist.

    The limits of the area are read from both layouts in use.

    Raises:
        NanoglimpseError: the file is broken, contradicts `config`, or needs another resizing.
    """
    data = read_json(path) if path.exists() else {}
    size = data.get("size") or {}
    sides = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    found: dict[str, Any] = {new: size[old] for new, old in sides.items() if old in size}
    names = [f.name for f in fields(PixelConfig) if f.name != "raw"]
    found |= {name: data[name] for name in names if data.get(name) is not None}
    for name in ("image_mean", "image_std"):
        if name in found:
            found[name] = tuple(found[name])
    vision = config.vision_config
    for name, wanted in {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }.items():
        value = found.get(name, wanted)
        if value != wanted:
            raise NanoglimpseError(f"{path}: {name} is {value}, but config.json has {wanted}")
        found[name] = wanted
    if data.get("resample", 3) != 3 or not data.get("do_resize", True):
        raise NanoglimpseError(f"{path}: only bicubic resizing (resample 3) is supported")
    return PixelConfig(**found)


def read_eos(path: Path, config: Config) -> frozenset[int]:
    """Ids of the tokens that end an answer: those of generation_config.json, or else `config`'s."""
    named = read_json(path).get("eos_token_id") if path.exists() else None
    return frozenset(config.eos_token_id if named is None else _token_ids(named))
