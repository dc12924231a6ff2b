"""Video: frames that Pillow reads, two of them a temporal patch.

Frames are chosen as transformers 5.23 does when it is told a rate, from the durations of an
animation instead of a mean rate: at the same points of time. Its last frame is repeated where their
number is odd. The area of frames is limited as in Qwen's qwen-vl-utils, with which the models were
trained: 128 to 768 visual tokens a frame, less where a whole clip would exceed 115,200.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from nanoglimpse.config import PixelConfig
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.inputs.images import (
    Picture,
    flatten,
    load_picture,
    open_picture,
    patchify,
    smart_resize,
)
from nanoglimpse.model.rope import Grid

FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
# In visual tokens of one frame, and of all frames of a clip together.
MIN_TOKENS, MAX_TOKENS, ALL_TOKENS = 128, 768, 115200
# What browsers do with an animation that says 0.
DEFAULT_DURATION = 100

Fit = Callable[[Image.Image, int], Image.Image]


@dataclass(frozen=True)
class Video:
    """A clip to ask about, wherever a picture may stand.

    Attributes:
        source: an animation (GIF, WebP, APNG), a folder of frames in the order of the numbers in
            their names, or frames: paths or Pillow images.
        fps: frames a second that the model sees. An animation is sampled, at least four frames of
            it; a folder or a list has been, and all of it is taken.
        max_frames: at most so many, evenly spread.
    """

    source: str | Path | Sequence[Picture]
    fps: float = FPS
    max_frames: int = MAX_FRAMES

    @property
    def name(self) -> str:
        """What errors and results call it."""
        return str(self.source) if isinstance(self.source, str | Path) else "a list of frames"

    def __post_init__(self):
        if not 0 < self.fps < float("inf"):
            raise UsageError(f"fps {self.fps} must be above 0")
        if self.max_frames < 2:
            raise UsageError(f"max_frames {self.max_frames} must be at least 2")

    def check(self) -> None:
        """Raises what `frames` would, as far as that shows without decoding any."""
        if isinstance(self.source, str | Path):
            path = Path(self.source)
            _files(path) if path.is_dir() else self._open(path).close()

    def frames(self, fit: Fit = lambda frame, count: frame) -> tuple[list[Image.Image], float]:
        """RGB frames, all of one size, and how many of them make a second.

        Args:
            fit: is given every frame as it is read, and how many there will be, and returns what is
                kept of it: hundreds of frames may be too large for memory as they are.

        Raises:
            UsageError: there are none, they differ in size, or the file is no animation.
            NanoglimpseError: a frame is damaged.
        """
        if not isinstance(self.source, str | Path):
            return self._given(list(self.source), fit)
        path = Path(self.source)
        return self._given(_files(path), fit) if path.is_dir() else self._animated(path, fit)

    def preprocess(
        self, min_pixels: int | None, max_pixels: int | None, config: PixelConfig
    ) -> tuple[Tensor, Grid, float]:
        """Patches [t · h · w, patch_dim], grid (t, h, w), and seconds a temporal patch."""
        together, side = config.temporal_patch_size, config.patch_size

        def fit(frame: Image.Image, count: int) -> Image.Image:
            unit = side * config.merge_size
            limits = _limits(count, unit, min_pixels, max_pixels, config)
            height, width = smart_resize(frame.height, frame.width, unit, *limits)
            return frame.resize((width, height), Image.Resampling.BICUBIC)

        frames, rate = self.frames(fit)
        frames += frames[-1:] * (-len(frames) % together)
        grid = (1, frames[0].height // side, frames[0].width // side)
        starts = range(0, len(frames), together)
        patches = [patchify(frames[i : i + together], grid, config) for i in starts]
        return torch.cat(patches), (len(patches), *grid[1:]), together / rate

    def _given(self, pictures: Sequence[Picture], fit: Fit) -> tuple[list[Image.Image], float]:
        if not pictures:
            raise UsageError("a video needs at least one frame")
        total = len(pictures)
        count = total if total <= self.max_frames else _even(self.max_frames)
        frames, size = [], None
        for number in range(count):
            frame = load_picture(pictures[number * total // count])
            if frame.size != (size := size or frame.size):
                raise UsageError(f"frames of a video are of one size; these differ: {self.name}")
            frames.append(fit(frame, count))
        return frames, self.fps * count / total

    def _animated(self, path: Path, fit: Fit) -> tuple[list[Image.Image], float]:
        image = self._open(path)
        try:
            with image:
                durations = _durations(image)
                chosen = self._sample(durations)
                frames = [fit(_frame(image, i), len(chosen)) for i in chosen]
                return frames, 1000 * len(chosen) / sum(durations)
        except UsageError:
            raise  # of a frame's shape; it is a ValueError, too
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise NanoglimpseError(f"{path} is damaged or cannot be read: {error}") from None

    def _open(self, path: Path) -> Image.Image:
        if not path.exists():
            raise UsageError(f"there is no video {path}")
        try:
            return open_picture(path)
        except UsageError:
            raise UsageError(
                f"{path} is no animation that Pillow reads (GIF, WebP, APNG); make frames of it, "
                f"ffmpeg -i {path.name} -vf fps={self.fps:g} frames/%05d.png, and give the folder"
            ) from None

    def _sample(self, durations: Sequence[int]) -> list[int]:
        """Frames on display at evenly spaced points of time."""
        total, milliseconds = len(durations), sum(durations)
        wanted = min(max(milliseconds * self.fps / 1000, MIN_FRAMES), self.max_frames, total)
        count = _even(int(wanted)) or 1
        ends, shown, chosen = list(accumulate(durations)), 0, []
        for number in range(count):
            while ends[shown] * count <= number * milliseconds:
                shown += 1
            chosen.append(shown)
        return chosen


Visual = Picture | Video


def _even(count: int) -> int:
    return count // 2 * 2


def _files(folder: Path) -> list[Path]:
    """Pictures of a folder, frame 2 before frame 10."""
    kinds = Image.registered_extensions()
    found = [p for p in folder.iterdir() if p.suffix.lower() in kinds and p.name[0] != "."]
    if not found:
        raise UsageError(f"the folder {folder} holds no pictures that could be frames")
    return sorted(found, key=lambda p: [_number(part) for part in re.split(r"(\d+)", p.name)])


def _number(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)


def _durations(image: Image.Image) -> list[int]:
    """Milliseconds that each frame of an animation is shown; of a still picture, of one frame."""
    durations = []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        image.load()  # WebP knows a duration only then
        durations.append(round(image.info.get("duration") or DEFAULT_DURATION))
    return durations


def _frame(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    image.load()
    return flatten(ImageOps.exif_transpose(image))


def _limits(
    frames: int, unit: int, low: int | None, high: int | None, config: PixelConfig
) -> tuple[int, int]:
    """Smallest and largest area of a frame in pixels: the caller's, else as in qwen-vl-utils."""
    area = unit * unit
    if high is None:
        most = min(config.max_pixels, MAX_TOKENS * area)
        floor = int(1.05 * (MIN_TOKENS * area if low is None else low))
        # Two frames are one visual token deep.
        high = max(min(most, 2 * ALL_TOKENS * area // frames), min(floor, most))
    if low is None:
        low = min(max(config.min_pixels, MIN_TOKENS * area), high)
    if not 0 < low <= high:
        raise UsageError(f"min_pixels {low} and max_pixels {high} leave no frame size")
    return low, high
