"""From a picture and a question to a prompt: pixels, token ids, positions.

Pillow does the pictures, `tokenizers` the text, torch the rest. Pixels equal those of transformers'
Pillow-based Qwen2-VL processor bit for bit. Text that a user types never becomes a control token.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tokenizers import Tokenizer

from nanoglimpse.config import Config, read_json, read_pixel_config
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.inputs.images import joined, preprocess_image
from nanoglimpse.inputs.prompt import Prompt
from nanoglimpse.inputs.video import Video, Visual

Part = TypeVar("Part")
SYSTEM = "You are a helpful assistant."


class Processor:
    """Builds prompts for one checkpoint and turns token ids back into text.

    Args:
        folder: of the checkpoint.
        config: its configuration.
        raw: leave pixels to the vision encoder; to a GPU they travel in an eighth of the bytes.

    Attributes:
        pixels: how pictures are preprocessed.
        tokenizer: None where the checkpoint has no tokenizer.json.
    """

    def __init__(self, folder: Path, config: Config, raw: bool = False):
        self.folder, self.config = folder, config
        pixels = read_pixel_config(folder / "preprocessor_config.json", config)
        self.pixels = replace(pixels, raw=raw)
        self.tokenizer, self.control_ids = _tokenizer(folder / "tokenizer.json")

    def prompt(
        self,
        images: Visual | Sequence[Visual],
        question: str | Sequence[str | Path | Image.Image | Video],
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
        parts = [*self.opening(system), *as_visuals(images), *self.conversation(asked, history)]
        return self.fill(parts, min_pixels, max_pixels)

    def fill(
        self,
        parts: Sequence[str | int | Path | Image.Image | Video],
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
            if isinstance(part, Video):
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
            self.encode(filled), joined(patches) if patches else None, grids, seconds, config=config
        )

    def chat(self, turn: Sequence[str | int], system: str = SYSTEM) -> list[str | int]:
        """Qwen's chat layout up to the answer: system, this user turn, the assistant's to begin."""
        return [*self.opening(system), *self.conversation(turn)]

    def opening(self, system: str = SYSTEM) -> list[str | int]:
        """The chat layout up to the content of the first user turn."""
        start, end = self.control("<|im_start|>"), self.control("<|im_end|>")
        return [start, f"system\n{system}", end, "\n", start, "user\n"]

    def conversation(
        self, turn: Sequence[Part], history: Sequence[tuple[str, str]] = ()
    ) -> list[str | int | Part]:
        """The chat layout from there on: earlier turns, this one, the answer to begin."""
        start, end = self.control("<|im_start|>"), self.control("<|im_end|>")
        parts: list[str | int | Part] = []
        for asked, answer in history:
            parts += [asked, end, "\n", start, f"assistant\n{answer}", end, "\n", start, "user\n"]
        return [*parts, *turn, end, "\n", start, "assistant\n"]

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        """Token ids of text (str) and control tokens (int); neighbouring texts are one text."""
        ids: list[int] = []
        for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
            run = list(group)
            if is_text:
                text = "".join(part for part in run if isinstance(part, str))
                if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                    raise UsageError("the text is not valid Unicode; was it typed in UTF-8?")
                ids += self.need_tokenizer().encode(text, add_special_tokens=False).ids
            else:
                ids += [part for part in run if isinstance(part, int)]
        return ids

    def control(self, token: str) -> int:
        """Id of a control token."""
        token_id = self.need_tokenizer().token_to_id(token)
        if token_id is None:
            raise NanoglimpseError(f"{self.folder / 'tokenizer.json'} has no token {token}")
        return token_id

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UsageError: the checkpoint has none.
        """
        if self.tokenizer is None:
            raise UsageError(
                f"{self.folder} has no tokenizer.json, so text cannot be encoded; copy the "
                "checkpoint's there, or build prompts with Prompt.from_tokens"
            )
        return self.tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without control tokens."""
        ids = [i for i in token_ids if i not in self.control_ids]
        return self.need_tokenizer().decode(ids, skip_special_tokens=False)


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


def as_visuals(images: Visual | Sequence[Visual]) -> list[Path | Image.Image | Video]:
    """One visual or several as a list; names become paths, so that no text is among them."""
    images = [images] if isinstance(images, Visual) else images
    return [Path(image) if isinstance(image, str) else image for image in images]


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
