"""Videos: frames that Pillow reads, of which two make a temporal patch.

Frames are sampled as in transformers 5.23 with a given rate, that is, at the same points of time,
but from the durations of an animation and not from a mean rate. The last frame is repeated if their
number is odd. The area of a frame is limited as in Qwen's qwen-vl-utils, with which the models were
trained: 128 to 768 visual tokens, and less in clips that would otherwise exceed 115,200.
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
from nanoglimpse.inputs import images
from nanoglimpse.inputs.images import Picture
from nanoglimpse.model.rope import Grid

FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
# Limits in visual tokens: the smallest and the largest frame, and all frames of a clip.
MIN_TOKENS, MAX_TOKENS, ALL_TOKENS = 128, 768, 115200
# Milliseconds of a frame whose duration is 0, as in browsers.
DEFAULT_DURATION = 100

Fit = Callable[[Image.Image, int], Image.Image]


@dataclass(frozen=True)
class Video:
    """A video, which can stand wherever a picture can.

    Attributes:
        source: an animation (GIF, WebP, APNG), a folder of frames in the order of the numbers in
            their names, or a list of frames: paths or Pillow images.
        fps: frames per second for the model. An animation is sampled at this rate, but at least
            four frames of it; of a folder or a list, which has this rate, all frames are used.
        max_frames: maximum number of frames; more are reduced to evenly spaced ones.
    """

    source: str | Path | Sequence[Picture]
    fps: float = FPS
    max_frames: int = MAX_FRAMES

    @property
    def name(self) -> str:
        """The name in errors and results."""
        return str(self.source) if isinstance(self.source, str | Path) else "a list of frames"

    def __post_init__(self):
        if not 0 < self.fps < float("inf"):
            raise UsageError(f"fps must be in (0, ∞), got {self.fps}")
        if self.max_frames < 2:
            raise UsageError(f"max_frames must be at least 2, got {self.max_frames}")

    def check(self) -> None:
        """Raises the errors of `frames` that can be found without decoding a frame."""
        if isinstance(self.source, str | Path):
            path = Path(self.source)
            _files(path) if path.is_dir() else self._open(path).close()

    def frames(self, fit: Fit = lambda frame, count: frame) -> tuple[list[Image.Image], float]:
        """RGB frames of one size, and their rate per second.

        Args:
            fit: called with each frame when it is read, and with the number of frames; returns the
                frame to keep. Hundreds of frames in full size may not fit into memory.

        Raises:
            UsageError: there are no frames, their sizes differ, or the file is not an animation.
            NanoglimpseError: a frame is damaged.
        """
        if not isinstance(self.source, str | Path):
            return self._given(list(self.source), fit)
        path = Path(self.source)
        return self._given(_files(path), fit) if path.is_dir() else self._animated(path, fit)

    def preprocess(
        self, min_pixels: int | None, max_pixels: int | None, config: PixelConfig
    ) -> tuple[Tensor, Grid, float]:
        """Patches [t · h · w, patch_dim], grid (t, h, w), and seconds per temporal patch."""
        together, side = config.temporal_patch_size, config.patch_size

        def fit(frame: Image.Image, count: int) -> Image.Image:
            unit = side * config.merge_size
            limits = _limits(count, unit, min_pixels, max_pixels, config)
            height, width = images.smart_resize(frame.height, frame.width, unit, *limits)
            return frame.resize((width, height), Image.Resampling.BICUBIC)

        frames, rate = self.frames(fit)
        frames += frames[-1:] * (-len(frames) % together)
        grid = (1, frames[0].height // side, frames[0].width // side)
        starts = range(0, len(frames), together)
        patches = [images.patchify(frames[i : i + together], grid, config) for i in starts]
        return torch.cat(patches), (len(patches), *grid[1:]), together / rate

    def _given(self, pictures: Sequence[Picture], fit: Fit) -> tuple[list[Image.Image], float]:
        if not pictures:
            raise UsageError("a video needs at least one frame")
        total = len(pictures)
        count = total if total <= self.max_frames else _even(self.max_frames)
        frames, size = [], None
        for number in range(count):
            frame = images.load_picture(pictures[number * total // count])
            if frame.size != (size := size or frame.size):
                raise UsageError(f"the frames of a video must have one size; {self.name} has more")
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
            raise  # from `fit`, and a ValueError
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise NanoglimpseError(f"{path} is damaged or cannot be read: {error}") from None

    def _open(self, path: Path) -> Image.Image:
        if not path.exists():
            raise UsageError(f"there is no video {path}")
        try:
            return images.open_picture(path)
        except UsageError:
            raise UsageError(
                f"{path} is not an animation that Pillow can read (GIF, WebP, APNG); extract its "
                f"frames (ffmpeg -i {path.name} -vf fps={self.fps:g} frames/%05d.png) and give the "
                "folder"
            ) from None

    def _sample(self, durations: Sequence[int]) -> list[int]:
        """Numbers of the frames that are shown at evenly spaced points of time."""
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
    """Pictures of a folder in the order of the numbers in their names: 2 before 10."""
    kinds = Image.registered_extensions()
    found = [p for p in folder.iterdir() if p.suffix.lower() in kinds and p.name[0] != "."]
    if not found:
        raise UsageError(f"the folder {folder} contains no pictures")
    return sorted(found, key=lambda p: [_number(part) for part in re.split(r"(\d+)", p.name)])


def _number(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)


def _durations(image: Image.Image) -> list[int]:
    """Milliseconds of each frame of an animation; a still picture has one frame."""
    durations = []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        image.load()  # sets the duration of WebP
        durations.append(round(image.info.get("duration") or DEFAULT_DURATION))
    return durations


def _frame(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    image.load()
    return images.flatten(ImageOps.exif_transpose(image))


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
