"""From a picture and a question to a prompt: pixels, token ids, positions.

Pillow does the pictures, `tokenizers` the text, torch the rest. Pixels equal those of transformers'
Pillow-based Qwen2-VL processor bit for bit. Text that a user types never becomes a control token.
"""

import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer
from torch import Tensor

from .config import Config, read_json
from .errors import NanoglimpseError, UsageError
from .pixels import PixelConfig, joined, patchify
from .rope import Grid, mrope_positions, visual_mask


class Clip(ABC):
    """What is shown as a video: `nanoglimpse.video.Video`, which is built on this module."""

    @abstractmethod
    def preprocess(
        self, min_pixels: int | None, max_pixels: int | None, config: PixelConfig
    ) -> tuple[Tensor, Grid, float]:
        """Patches and grid as `preprocess_image`, and the seconds that a pair of frames lasts."""


Picture = str | Path | Image.Image
Visual = Picture | Clip
SYSTEM = "You are a helpful assistant."
MAX_ASPECT = 200


def pictures_of(images: Visual | Sequence[Visual]) -> list[Path | Image.Image | Clip]:
    """One picture or several as a list; names become paths, so that no text is among them."""
    images = [images] if isinstance(images, Visual) else images
    return [Path(image) if isinstance(image, str) else image for image in images]


def load_picture(picture: Picture) -> Image.Image:
    """A picture as RGB, transparency composited on white; of an animation the first frame.

    A file's EXIF orientation is applied; a Pillow image is taken as its caller made it.

    Raises:
        UsageError, NanoglimpseError: see `open_picture`; also for a file that is truncated.
    """
    if isinstance(picture, Image.Image):
        return flatten(picture)
    with open_picture(picture) as image:
        try:
            return flatten(ImageOps.exif_transpose(image))
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise NanoglimpseError(f"{picture} is damaged or cannot be read: {error}") from None


def open_picture(path: str | Path) -> Image.Image:
    """A picture file, opened but not decoded.

    Raises:
        UsageError: no such file, or no picture that Pillow reads.
        NanoglimpseError: it cannot be read, or decodes to so many pixels that it may be a bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"there is no picture {path}") from None
    except UnidentifiedImageError:
        raise UsageError(f"{path} is not a picture that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise NanoglimpseError(f"{path} is refused: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise NanoglimpseError(f"{path} is damaged or cannot be read: {error}") from None


def flatten(image: Image.Image) -> Image.Image:
    """As RGB, transparency composited on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width as multiples of `factor`, their product between the two limits.

    As in Qwen's code, with Python's rounding of halves to the even side.

    Raises:
        UsageError: no pixels at all, or sides of a ratio over 200.
    """
    if min(height, width) < 1:
        raise UsageError(f"a picture of {width} × {height} px has no content")
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UsageError(
            f"a picture of {width} × {height} px is too thin; sides may differ {MAX_ASPECT} times"
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
    picture: Picture,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    config: PixelConfig | None = None,
) -> tuple[Tensor, Grid]:
    """Patches of a still picture, in the order of the merge units that become visual tokens.

    Args:
        picture: path or Pillow image.
        min_pixels, max_pixels: limits of the resized area; those of `config` where None.
        config: mean, deviation and patch sizes; Qwen2.5-VL's by default.

    Returns:
        patches fp32 [P, channels · frames · side²], the one frame repeated, and the grid (t, h, w)
        in patches; uint8 [P, channels · side²] if the configuration says raw.

    Raises:
        UsageError, NanoglimpseError: see `load_picture` and `smart_resize`.
    """
    config = config or PixelConfig()
    low = config.min_pixels if min_pixels is None else min_pixels
    high = config.max_pixels if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise UsageError(f"min_pixels {low} and max_pixels {high} leave no picture size")
    image = load_picture(picture)
    side, merge = config.patch_size, config.merge_size
    height, width = smart_resize(image.height, image.width, side * merge, low, high)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    grid = (1, height // side, width // side)
    return patchify([image], grid, config), grid


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: T tokens, of which N stand for visual tokens.

    Attributes:
        token_ids: int64 [T], a placeholder for every visual token.
        positions: int64 [3, T], M-RoPE ids on the axes time, height, width.
        visual: bool [T], the placeholders.
        patches: of all images and videos in order of appearance, fp32 [P, patch_dim]; or raw.
        grids: (t, h, w) in patches of each of them.
    """

    token_ids: Tensor
    positions: Tensor
    visual: Tensor
    patches: Tensor
    grids: tuple[Grid, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def from_tokens(
        cls,
        token_ids: Tensor | Sequence[int],
        patches: Tensor | None = None,
        grids: Sequence[Sequence[int]] = (),
        seconds_per_grid: float | Sequence[float] | Tensor | None = None,
        *,
        config: Config,
    ) -> "Prompt":
        """A prompt from ready tensors.

        Args:
            token_ids: [T]; every visual token has a placeholder, image or video by its id.
            patches: [P, patch_dim], in order of appearance; or uint8 as `preprocess_image` makes
                raw ones, [P, patch_dim] or of one frame each.
            grids: (t, h, w) in patches of each image and video, in order of appearance.
            seconds_per_grid: seconds between temporal patches, for all videos or each; 1 if None.
            config: of the model.

        Raises:
            UsageError: the parts do not fit each other or the model.
        """
        vision = config.vision_config
        ids = torch.as_tensor(token_ids, dtype=torch.int64).flatten()
        sizes = tuple((int(t), int(h), int(w)) for t, h, w in grids)
        patches = torch.empty(0, vision.patch_dim) if patches is None else patches
        seconds = (
            seconds_per_grid.tolist() if isinstance(seconds_per_grid, Tensor) else seconds_per_grid
        )
        if not len(ids):
            raise UsageError("a prompt needs at least one token")
        if int(ids.min()) < 0 or int(ids.max()) >= config.text_config.vocab_size:
            raise UsageError(f"token ids must lie in 0 to {config.text_config.vocab_size - 1}")
        if any(h % vision.spatial_merge_size or w % vision.spatial_merge_size for _, h, w in sizes):
            raise UsageError(f"grids {sizes} are not in whole visual tokens")
        expected = [sum(math.prod(grid) for grid in sizes), vision.patch_dim]
        one = vision.patch_dim // vision.temporal_patch_size
        if patches.dtype == torch.uint8 and patches.shape[1:] == (one,):
            expected[1] = one
        if list(patches.shape) != expected:
            raise UsageError(f"patches have shape {list(patches.shape)}, the grids need {expected}")
        positions = mrope_positions(ids, sizes, config, seconds)
        return cls(ids, positions, visual_mask(ids, config), patches, sizes)

    def then(self, other: "Prompt") -> "Prompt":
        """This prompt with another behind it, whose positions go on from here."""
        return Prompt(
            torch.cat((self.token_ids, other.token_ids)),
            torch.cat((self.positions, other.positions + self.positions.max() + 1), dim=1),
            torch.cat((self.visual, other.visual)),
            joined((self.patches, other.patches)),
            self.grids + other.grids,
        )


class Processor:
    """Builds prompts for one checkpoint and turns token ids back into text.

    Attributes:
        pixels: how pictures are preprocessed.
        tokenizer: None where the checkpoint has no tokenizer.json.
    """

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = folder, config
        self.pixels = _pixel_config(folder / "preprocessor_config.json", config)
        self.tokenizer, self.control_ids = _tokenizer(folder / "tokenizer.json")

    def prompt(
        self,
        images: Visual | Sequence[Visual],
        question: str | Sequence[str | Path | Image.Image | Clip],
        *,
        history: Sequence[tuple[str, str]] = (),
        system: str = SYSTEM,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Prompt:
        """A prompt in Qwen's chat layout: system, user turn, the assistant's to begin.

        Args:
            images: one picture or several, placed before the first question; `Video`s are pictures,
                too.
            question: text, or texts (str) and pictures (Path, Pillow image, Video) in any order.
            history: questions and answers that came before it.
            system: the system prompt.
            min_pixels, max_pixels: limits of a picture's area, or a frame's; the checkpoint's (for
                frames see `Video`) where None.

        Raises:
            UsageError: the checkpoint has no tokenizer, or a picture or text cannot be used.
        """
        asked = [question] if isinstance(question, str) else question
        parts = [*self.opening(system), *pictures_of(images), *self.conversation(asked, history)]
        return self.fill(parts, min_pixels, max_pixels)

    def fill(
        self,
        parts: Sequence[str | int | Path | Image.Image | Clip],
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Prompt:
        """A prompt of text (str), control tokens (int) and pictures in the order they are given."""
        config, patches, grids, seconds = self.config, [], [], []
        filled: list[str | int] = []
        for part in parts:
            if isinstance(part, str | int):
                filled.append(part)
                continue
            if isinstance(part, Clip):
                pixels, grid, duration = part.preprocess(min_pixels, max_pixels, self.pixels)
                placeholder = config.video_token_id
                seconds.append(duration)
            else:
                pixels, grid = preprocess_image(part, min_pixels, max_pixels, self.pixels)
                placeholder = config.image_token_id
            patches.append(pixels)
            grids.append(grid)
            count = math.prod(grid) // config.vision_config.merge_unit
            placeholders = [placeholder] * count
            filled += [config.vision_start_token_id, *placeholders, config.vision_end_token_id]
        return Prompt.from_tokens(
            self.encode(filled),
            joined(patches) if patches else None,
            grids,
            seconds,
            config=config,
        )

    def chat(self, turn: Sequence[str | int], system: str = SYSTEM) -> list[str | int]:
        """Qwen's chat layout up to the answer: system, this user turn, the assistant's to begin."""
        return [*self.opening(system), *self.conversation(turn)]

    def opening(self, system: str = SYSTEM) -> list[str | int]:
        """The chat layout up to the content of the first user turn."""
        start, end = self.control("<|im_start|>"), self.control("<|im_end|>")
        return [start, f"system\n{system}", end, "\n", start, "user\n"]

    def conversation(
        self,
        turn: Sequence[str | int | Path | Image.Image | Clip],
        history: Sequence[tuple[str, str]] = (),
    ) -> list[str | int | Path | Image.Image | Clip]:
        """The chat layout from there on: earlier turns, this one, the answer to begin."""
        start, end = self.control("<|im_start|>"), self.control("<|im_end|>")
        parts: list[str | int | Path | Image.Image | Clip] = []
        for asked, answer in history:
            parts += [asked, end, "\n", start, f"assistant\n{answer}", end, "\n", start, "user\n"]
        return [*parts, *turn, end, "\n", start, "assistant\n"]

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        """Token ids of text (str) and control tokens (int); neighbouring texts are one text."""
        ids: list[int] = []
        for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
            if is_text:
                text = "".join(group)
                if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                    raise UsageError("the text is not valid Unicode; was it typed in UTF-8?")
                ids += self._need_tokenizer().encode(text, add_special_tokens=False).ids
            else:
                ids += group
        return ids

    def control(self, token: str) -> int:
        """Id of a control token."""
        token_id = self._need_tokenizer().token_to_id(token)
        if token_id is None:
            raise NanoglimpseError(f"{self.folder / 'tokenizer.json'} has no token {token}")
        return token_id

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(
                f"{self.folder} has no tokenizer.json, so text cannot be encoded; copy the "
                "checkpoint's there, or build prompts with Prompt.from_tokens"
            )
        return self.tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without control tokens."""
        ids = [i for i in token_ids if i not in self.control_ids]
        return self._need_tokenizer().decode(ids, skip_special_tokens=False)


class TextStream:
    """Text of tokens as they come; a character appears when all its bytes have."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self.pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is open."""
        self.pending.append(token_id)
        text = self.processor.decode(self.pending)
        return "" if text.endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """What is still open, a broken character as U+FFFD."""
        text, self.pending = self.processor.decode(self.pending), []
        return text


def _pixel_config(path: Path, config: Config) -> PixelConfig:
    """preprocessor_config.json where there is one; sizes in pixels in either of its two layouts."""
    data = read_json(path) if path.exists() else {}
    size = data.get("size") or {}
    sides = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    found = {new: size[old] for new, old in sides.items() if old in size}
    names = [f.name for f in fields(PixelConfig) if f.name != "raw"]
    found |= {name: data[name] for name in names if data.get(name) is not None}
    for name in ("image_mean", "image_std"):
        if name in found:
            found[name] = tuple(found[name])
    pixels, vision = replace(PixelConfig(), **found), config.vision_config
    for name, wanted in {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }.items():
        value = found.get(name, wanted)
        if value != wanted:
            raise NanoglimpseError(f"{path}: {name} is {value}, config.json says {wanted}")
        pixels = replace(pixels, **{name: wanted})
    if data.get("resample", 3) != 3 or not data.get("do_resize", True):
        raise NanoglimpseError(f"{path}: only bicubic resizing (resample 3) is supported")
    return pixels


def _tokenizer(path: Path) -> tuple[Tokenizer | None, frozenset[int]]:
    """The tokenizer and the ids of its control tokens, which no text can produce."""
    if not path.exists():
        return None, frozenset()
    data = read_json(path)
    added = data.get("added_tokens", [])
    control = frozenset(token["id"] for token in added if token["special"])
    # All added tokens, so that none of them is found in a text that a user typed.
    for token in added:
        token["special"] = True
    try:
        tokenizer = Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # tokenizers raises nothing more specific
        raise NanoglimpseError(f"{path} is no tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer, control
