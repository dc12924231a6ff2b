"""Videos as patches: two frames make a temporal patch.

The last frame is repeated if their number is odd. The area of a frame is limited as in Qwen's
qwen-vl-utils, with which the models were trained: 128 to 768 visual tokens, and less in clips that
would otherwise exceed 115,200.
"""

import torch
from PIL import Image
from torch import Tensor

from nanoglimpse.config import PixelConfig
from nanoglimpse.inputs import images
from nanoglimpse.model.rope import Grid
from nanoglimpse.pictures.video import Video

# Limits in visual tokens: the smallest and the largest frame, and all frames of a clip.
MIN_TOKENS, MAX_TOKENS, ALL_TOKENS = 128, 768, 115200


def preprocess_video(
    video: Video, min_pixels: int | None, max_pixels: int | None, config: PixelConfig
) -> tuple[Tensor, Grid, float]:
    """Patches [t · h · w, patch_dim], grid (t, h, w), and seconds per temporal patch.

    Raises:
        UsageError, NanoglimpseError: as `Video.frames` and `smart_resize`.
    """
    together, side = config.temporal_patch_size, config.patch_size
    low = min_pixels if video.min_pixels is None else video.min_pixels
    high = max_pixels if video.max_pixels is None else video.max_pixels

    def fit(frame: Image.Image, count: int) -> Image.Image:
        unit = side * config.merge_size
        limits = _limits(count, unit, low, high, config)
        height, width = images.smart_resize(frame.height, frame.width, unit, *limits)
        return frame.resize((width, height), Image.Resampling.BICUBIC)

    frames, rate = video.frames(fit)
    frames += frames[-1:] * (-len(frames) % together)
    grid = (1, frames[0].height // side, frames[0].width // side)
    starts = range(0, len(frames), together)
    patches = [images.patchify(frames[i : i + together], grid, config) for i in starts]
    return torch.cat(patches), (len(patches), *grid[1:]), together / rate


def _limits(
    frames: int, unit: int, low: int | None, high: int | None, config: PixelConfig
) -> tuple[int, int]:
    """Smallest and largest area of a frame in pixels: as given, or else as in qwen-vl-utils."""
    area = unit * unit
    if high is None:
        most = min(config.max_pixels, MAX_TOKENS * area)
        floor = int(1.05 * (MIN_TOKENS * area if low is None else low))
        # Two frames share their visual tokens.
        high = max(min(most, 2 * ALL_TOKENS * area // frames), min(floor, most))
    if low is None:
        low = min(max(config.min_pixels, MIN_TOKENS * area), high)
    return low, high
