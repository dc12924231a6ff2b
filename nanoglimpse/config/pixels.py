"""How pictures become patches: preprocessor_config.json and processor_config.json.

transformers 4 writes the first, 5 the second, with the settings of pictures in `image_processor`.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanoglimpse.config.model import Config
from nanoglimpse.config.schema import Schema, anything, many, only, read_json, real, shown, whole
from nanoglimpse.errors import NanoglimpseError

FLAT, NESTED = "preprocessor_config.json", "processor_config.json"
_AREA = whole(1, 2**40, None)


@dataclass(frozen=True)
class PixelConfig:
    """How pictures become patches; the defaults are those of the released Qwen2.5-VL checkpoints.

    `raw` is not a key of the files. If it is set, patches stay uint8 pixels, which take an eighth
    of the bytes, and the vision encoder normalises them.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 12845056
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    raw: bool = False


def _unknown(name: str, value: Any) -> str:
    """Steps of a preprocessing have names that begin with `do_`; other keys do not change it."""
    step = name.startswith("do_") and name != "do_convert_rgb" and value
    return f"{shown(name)} is {shown(value)}, which is not supported" if step else ""


PIXELS = Schema(
    {
        "min_pixels": _AREA,
        "max_pixels": _AREA,
        "size": anything(None),
        "image_mean": many(real(-100, 100), 3, 3, None),
        "image_std": many(real(1e-6, 1e6), 3, 3, None),
        "patch_size": whole(1, 256, None),
        "temporal_patch_size": whole(1, 16, None),
        "merge_size": whole(1, 16, None),
        "do_resize": only(True),
        "do_rescale": only(True),
        "do_normalize": only(True),
        "resample": only(3),
        "rescale_factor": real(1 / 255 - 1e-9, 1 / 255 + 1e-9, None),
    },
    unknown=_unknown,
)
# Areas in pixels, in spite of the names of transformers. The later ones count if there are several.
_LIMITS = {"min_pixels": "min_pixels", "max_pixels": "max_pixels"}
_EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
_SIZE = Schema(dict.fromkeys([*_LIMITS, *_EDGES], _AREA))


def read_pixel_config(folder: Path, config: Config) -> PixelConfig:
    """The settings of pictures in a checkpoint's folder, or the defaults where they are silent.

    Raises:
        NanoglimpseError: a file is broken, contradicts `config` or the other file, or needs another
            preprocessing.
    """
    found: dict[str, Any] = {}
    for name in (FLAT, NESTED):
        path = folder / name
        data = read_json(path) if path.exists() else {}
        data = data.get("image_processor") or {} if name == NESTED else data
        if not isinstance(data, dict):
            raise NanoglimpseError(f"{path}: key 'image_processor' must be an object")
        for key, value in _settings(data, path).items():
            if found.setdefault(key, value) != value:
                raise NanoglimpseError(
                    f"{path}: {key} is {value}, but {found[key]} in {FLAT}; remove the file that "
                    "is out of date"
                )
    vision = config.vision_config
    for key, wanted in {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }.items():
        value = found.setdefault(key, wanted)
        if value != wanted:
            raise NanoglimpseError(f"{folder}: {key} is {value}, but config.json has {wanted}")
    pixels = PixelConfig(**found)
    if pixels.min_pixels > pixels.max_pixels:
        limits = f"min_pixels {pixels.min_pixels} is above max_pixels {pixels.max_pixels}"
        raise NanoglimpseError(f"{folder}: {limits}")
    return pixels


def _settings(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a `PixelConfig` that one file gives."""
    read, found = PIXELS.read(data, str(path)), {}
    size = read["size"] or {}
    if not isinstance(size, dict):
        raise NanoglimpseError(f"{path}: size must be an object, got {shown(size)}")
    sizes = _SIZE.read(size, f"{path} (size)")
    for name, field in [*_LIMITS.items(), *_EDGES.items()]:
        if sizes[name] is not None:
            found[field] = sizes[name]
    names = [field.name for field in fields(PixelConfig) if field.name != "raw"]
    return found | {name: read[name] for name in names if read[name] is not None}
