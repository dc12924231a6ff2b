"""Resizes pictures and cuts them into patches.

Pixels are equal, bit for bit, to those of the Qwen2-VL processor of transformers with Pillow.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from nanoglimpse.config import PixelConfig
from nanoglimpse.errors import UsageError
from nanoglimpse.model.rope import Grid
from nanoglimpse.model.vision import normalise
from nanoglimpse.pictures.picture import Picture, Source, source

MAX_ASPECT = 200


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width as multiples of `factor`, with an area between the two limits.

    As in Qwen's code, which rounds halves to even, as Python does.

    Raises:
        UsageError: the picture is empty or too thin, or the limits exclude each other.
    """
    if not 0 < min_pixels <= max_pixels:
        raise UsageError(f"min_pixels must be in [1, max_pixels {max_pixels}], got {min_pixels}")
    if min(height, width) < 1:
        raise UsageError(f"a picture of {width} × {height} px is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UsageError(
            f"a picture of {width} × {height} px is too thin; the limit is {MAX_ASPECT} to 1"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def preprocess_image(
    picture: Picture | Source,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    config: PixelConfig | None = None,
) -> tuple[Tensor, Grid]:
    """Patches of a still picture, in the order of the merge units that become visual tokens.

    Args:
        picture: as `nanoglimpse.pictures.picture.source` takes it; its own limits come first.
        min_pixels, max_pixels: limits of the resized area; those of `config` if None.
        config: mean, deviation and patch sizes; those of Qwen2.5-VL by default.

    Returns:
        Patches fp32 [P, channels · frames · side²] with the picture in all frames, or uint8
        [P, channels · side²] if `config.raw` is set; and the grid (t, h, w) in patches.

    Raises:
        UsageError, NanoglimpseError: as `source`, `Source.load` and `smart_resize`.
    """
    config = config or PixelConfig()
    given = source(picture)
    low = next(x for x in (given.min_pixels, min_pixels, config.min_pixels) if x is not None)
    high = next(x for x in (given.max_pixels, max_pixels, config.max_pixels) if x is not None)
    image = given.load()
    side, merge = config.patch_size, config.merge_size
    height, width = smart_resize(image.height, image.width, side * merge, low, high)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    grid = (1, height // side, width // side)
    return patchify([image], grid, config), grid


def patchify(frames: Sequence[Image.Image], grid: Grid, config: PixelConfig) -> Tensor:
    """Patches of a picture, or of a pair of frames, in the order of the merge units.

    Args:
        frames: one picture, or the frames of a temporal patch; RGB, in the size of the grid.
        grid: (1, h, w).
        config: mean, deviation and patch sizes.

    Returns:
        fp32 [h · w, channels · frames · side²] with a still picture in all frames; or uint8 [h · w,
        channels · given frames · side²] if `config.raw` is set.
    """
    side, merge = config.patch_size, config.merge_size
    units = []
    for frame in frames:
        pixels = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(grid[1] // merge, merge, side, grid[2] // merge, merge, side, 3)
        units.append(pixels.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, side * side))
    raw = torch.cat(units, 2).flatten(1) if len(units) > 1 else units[0].flatten(1)
    return raw if config.raw else normalise(raw, config)


def joined(patches: Sequence[Tensor]) -> Tensor:
    """Concatenated patches; raw stills are repeated if there are also raw pairs of frames.

    Raises:
        UsageError: raw and normalised patches are mixed.
    """
    some = [p for p in patches if len(p)] or list(patches[:1])
    if len(some) == 1:
        return some[0]
    if len({p.dtype for p in some}) > 1:
        raise UsageError(
            "raw and normalised patches cannot be combined; preprocess all in the same way"
        )
    width = max(p.shape[1] for p in some)
    return torch.cat([p if p.shape[1] == width else _repeated(p, width) for p in some])


def _repeated(raw: Tensor, width: int) -> Tensor:
    channels = len(PixelConfig.image_mean)
    frames = width // raw.shape[1]
    return raw.view(len(raw), channels, 1, -1).expand(-1, -1, frames, -1).flatten(1)
