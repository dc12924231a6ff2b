"""Videos: animations that Pillow reads, folders and lists of frames.

Frames are sampled as in transformers 5.23 with a given rate, that is, at the same points of time,
but from the durations of an animation and not from a mean rate.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from PIL import Image

from nanoglimpse.errors import NanoglimpseError, UsageError, one_line
from nanoglimpse.pictures import picture
from nanoglimpse.pictures.picture import Picture, Source, load_picture, orientation, source, to_rgb

FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
# Milliseconds of a frame whose duration is 0, as in browsers.
DEFAULT_DURATION = 100
# Formats of animations, and the area of 8K: each frame takes several times its bytes.
MOVING, MAX_PIXELS = ("GIF", "WEBP", "PNG"), 7680 * 4320

Fit = Callable[[Image.Image, int], Image.Image]


@dataclass(frozen=True)
class Video:
    """A video, which can stand wherever a picture can.

    Attributes:
        source: an animation (GIF, WebP, APNG), given as a picture may be; a folder of frames in the
            order of the numbers in their names; or a list of frames, each given as a picture.
        fps: frames per second for the model. An animation is sampled at this rate, but at least
            four frames of it; of a folder or a list, which has this rate, all frames are used.
        max_frames: maximum number of frames; more are reduced to evenly spaced ones.
        min_pixels, max_pixels: limits of the area of a frame, in place of those of the prompt.
    """

    source: Picture | Source | Sequence[Picture | Source]
    fps: float = FPS
    max_frames: int = MAX_FRAMES
    min_pixels: int | None = None
    max_pixels: int | None = None

    @property
    def name(self) -> str:
        """The name in errors and results."""
        if isinstance(self.source, list | tuple):
            return "a list of frames"
        return str(self.source) if isinstance(self.source, str | Path) else source(self.source).name

    def __post_init__(self):
        if not 0 < self.fps < float("inf"):
            raise UsageError(f"fps must be in (0, ∞), got {self.fps}")
        if self.max_frames < 2:
            raise UsageError(f"max_frames must be at least 2, got {self.max_frames}")

    def check(self) -> None:
        """Raises the errors of `frames` that can be found without decoding a frame."""
        if isinstance(self.source, list | tuple):
            return
        one = self._found()
        if folder := _folder(one):
            _files(folder)
            return
        with ExitStack() as stack:
            self._open(one, stack)

    def frames(self, fit: Fit = lambda frame, count: frame) -> tuple[list[Image.Image], float]:
        """RGB frames of one size, and their rate per second.

        Args:
            fit: called with each frame when it is read, and with the number of frames; returns the
                frame to keep. Hundreds of frames in full size may not fit into memory.

        Raises:
            UsageError: there are no frames, their sizes differ, or the file is not an animation.
            NanoglimpseError: a frame is damaged, or exceeds the bounds of a picture.
        """
        if isinstance(self.source, list | tuple):
            return self._given(list(self.source), fit)
        one = self._found()
        folder = _folder(one)
        return self._given(_files(folder), fit) if folder else self._animated(one, fit)

    def _found(self) -> Source:
        return source(self.source)

    def _given(
        self, pictures: Sequence[Picture | Source], fit: Fit
    ) -> tuple[list[Image.Image], float]:
        if not pictures:
            raise UsageError("a video needs at least one frame")
        total = len(pictures)
        count = total if total <= self.max_frames else _even(self.max_frames)
        frames, size = [], None
        for number in range(count):
            frame = load_picture(pictures[number * total // count])
            if frame.size != (size := size or frame.size):
                raise UsageError(f"the frames of a video must have one size; {self.name} has more")
            frames.append(fit(frame, count))
        return frames, self.fps * count / total

    def _animated(self, one: Source, fit: Fit) -> tuple[list[Image.Image], float]:
        with picture.decoding(one.name), ExitStack() as stack:
            image = self._open(one, stack)
            durations = _durations(image, one.name)
            chosen = self._sample(durations)
            frames = [fit(_frame(image, number), len(chosen)) for number in chosen]
            return frames, 1000 * len(chosen) / sum(durations)

    def _open(self, one: Source, stack: ExitStack) -> Image.Image:
        if isinstance(one.data, Path) and not _exists(one.data):
            raise UsageError(f"there is no video {one_line(one.name)}")
        try:
            image = stack.enter_context(one.open(moving=True))
            if image.format in MOVING or not getattr(image, "is_animated", False):
                return image
        except UsageError:
            pass
        raise UsageError(
            f"{one_line(one.name)} is not an animation that is read (GIF, WebP, APNG); extract its "
            f"frames (ffmpeg -i {one_line(Path(one.name).name)} -vf fps={self.fps:g} "
            "frames/%05d.png) and give the folder"
        )

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


Visual = Picture | Source | Video


def _even(count: int) -> int:
    return count // 2 * 2


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _folder(one: Source) -> Path | None:
    path = one.data
    return path if isinstance(path, Path) and _exists(path) and path.is_dir() else None


def _files(folder: Path) -> list[Path]:
    """Pictures of a folder in the order of the numbers in their names: 2 before 10."""
    kinds = picture.SUFFIXES
    found = [p for p in folder.iterdir() if p.suffix.lower() in kinds and p.name[0] != "."]
    if not found:
        raise UsageError(f"the folder {folder} contains no pictures")
    return sorted(found, key=lambda p: [_number(part) for part in re.split(r"(\d+)", p.name)])


def _number(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)


def _durations(image: Image.Image, name: str) -> list[int]:
    """Milliseconds of each frame of an animation; a still picture has one frame."""
    durations = []
    for number in range(count := getattr(image, "n_frames", 1)):
        image.seek(number)
        if image.width * image.height > MAX_PIXELS and count > 1:
            raise NanoglimpseError(
                f"{one_line(name)} is refused: its frames have {image.width} × {image.height} px; "
                f"the limit is {MAX_PIXELS:,}"
            )
        image.load()  # sets the duration of WebP, and finds damage
        durations.append(round(image.info.get("duration") or DEFAULT_DURATION))
    return durations


def _frame(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    image.load()
    frame, turn = to_rgb(image), orientation(image)
    if turn is not None:
        return frame.transpose(turn)
    return frame.copy() if frame is image else frame
