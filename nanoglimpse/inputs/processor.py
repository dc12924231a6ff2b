"""From pictures and a question to a prompt: pixels, token ids, positions.

Text is encoded by `tokenizers`. What a user gives, text or numbers, never becomes a control token.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nanoglimpse.config import Config, read_pixel_config, read_tokenizer, shown
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.inputs.images import joined, preprocess_image
from nanoglimpse.inputs.prompt import Prompt
from nanoglimpse.inputs.video import preprocess_video
from nanoglimpse.model.rope import visual_tokens
from nanoglimpse.pictures.messages import Part, is_messages, read_messages
from nanoglimpse.pictures.picture import sources
from nanoglimpse.pictures.video import Video, Visual

SYSTEM = "You are a helpful assistant."


class Processor:
    """Builds prompts for one checkpoint, and decodes token ids.

    Args:
        folder: folder of the checkpoint.
        config: configuration of the checkpoint.
        raw: let the vision encoder normalise pixels; uint8 pixels are an eighth of the bytes.

    Attributes:
        pixels: configuration of the preprocessing.
        tokenizer: None if the checkpoint has no tokenizer.json.
        control_ids: ids of the control tokens.
    """

    def __init__(self, folder: Path, config: Config, raw: bool = False):
        self.folder, self.config = folder, config
        self.pixels = replace(read_pixel_config(folder, config), raw=raw)
        self.tokenizer, self.control_ids = _tokenizer(folder / "tokenizer.json")

    def prompt(
        self,
        images: Visual | Sequence[Visual],
        question: str | Sequence[Any],
        *,
        history: Sequence[tuple[str | Sequence[Any], str]] = (),
        system: str = SYSTEM,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Prompt:
        """A prompt in the chat layout of Qwen: system prompt, user turn, start of the answer.

        Args:
            images: pictures (`pictures.picture.source`) and videos, one or several, placed before
                the first question.
            question: text; or a list of texts (str) and pictures (anything else that is one, as a
                Path) in any order; or a list of messages (`pictures.messages`).
            history: earlier questions and answers; with messages there is none beside theirs.
            system: the system prompt.
            min_pixels, max_pixels: limits of the area of a picture or frame. If None, those of the
                checkpoint apply to pictures, and those of `nanoglimpse.inputs.video` to frames.

        Raises:
            UsageError: the checkpoint has no tokenizer, or a picture or text cannot be used.
        """
        if not isinstance(question, str) and is_messages(question):
            own, history, question = read_messages(question)
            system = system if own is None else own
        turn = self.conversation(as_parts(question), history)
        parts = [*self.opening(system), *as_visuals(images), *turn]
        return self.fill(parts, min_pixels, max_pixels)

    def fill(
        self,
        parts: Sequence[Part | int],
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Prompt:
        """A prompt of text (str), control tokens (int), pictures and videos in the given order."""
        config, patches, grids, seconds = self.config, [], [], []
        filled: list[str | int] = []
        for part in parts:
            if isinstance(part, str | int):
                filled.append(part)
                continue
            if isinstance(part, Video):
                pixels, grid, duration = preprocess_video(part, min_pixels, max_pixels, self.pixels)
                placeholder = config.video_token_id
                seconds.append(duration)
            else:
                pixels, grid = preprocess_image(part, min_pixels, max_pixels, self.pixels)
                placeholder = config.image_token_id
            patches.append(pixels)
            grids.append(grid)
            placeholders = [placeholder] * visual_tokens(grid, config)
            filled += [config.vision_start_token_id, *placeholders, config.vision_end_token_id]
        return Prompt.from_tokens(
            self.encode(filled), joined(patches) if patches else None, grids, seconds, config=config
        )

    def chat(self, turn: Sequence[str | int], system: str = SYSTEM) -> list[str | int]:
        """The chat layout up to the answer: system prompt, this user turn, start of the answer."""
        return [*self.opening(system), *self.conversation(turn)]

    def opening(self, system: str = SYSTEM) -> list[str | int]:
        """The chat layout up to the content of the first user turn."""
        start, end = self.control("<|im_start|>"), self.control("<|im_end|>")
        return [start, f"system\n{system}", end, "\n", start, "user\n"]

    def conversation(
        self, turn: Sequence[Any], history: Sequence[tuple[str | Sequence[Any], str]] = ()
    ) -> list[Any]:
        """The chat layout after `opening`: earlier turns, this turn, start of the answer."""
        start, end = self.control("<|im_start|>"), self.control("<|im_end|>")
        parts: list[Any] = []
        for asked, answer in history:
            ended = [end, "\n", start, f"assistant\n{answer}", end, "\n", start, "user\n"]
            parts += [*as_parts(asked), *ended]
        return [*parts, *turn, end, "\n", start, "assistant\n"]

    def encode(self, parts: Sequence[str | int]) -> list[int]:
        """Token ids of text (str) and control tokens (int); adjacent texts are encoded together."""
        ids: list[int] = []
        for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
            run = list(group)
            if is_text:
                text = "".join(part for part in run if isinstance(part, str))
                if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                    raise UsageError("the text is not valid Unicode; is it encoded as UTF-8?")
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

    @property
    def end_ids(self) -> frozenset[int]:
        """The token that ends a turn of the conversation; none without a tokenizer."""
        end = self.tokenizer.token_to_id("<|im_end|>") if self.tokenizer else None
        return frozenset() if end is None else frozenset([end])

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UsageError: the checkpoint has none.
        """
        if self.tokenizer is None:
            raise UsageError(
                f"{self.folder} has no tokenizer.json, so text cannot be encoded; copy the "
                "original there, or build prompts with Prompt.from_tokens"
            )
        return self.tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, without control tokens."""
        ids = [i for i in token_ids if i not in self.control_ids]
        return self.need_tokenizer().decode(ids, skip_special_tokens=False)


class TextStream:
    """Decodes tokens one by one, and returns a character when all its bytes are there."""

    def __init__(self, processor: Processor):
        self.processor = processor
        self.pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty within a character."""
        self.pending.append(token_id)
        text = self.processor.decode(self.pending)
        return "" if text.endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """The rest of the text, with U+FFFD for an incomplete character."""
        text, self.pending = self.processor.decode(self.pending), []
        return text


def as_visuals(images: Visual | Sequence[Visual]) -> list[Part]:
    """One or several pictures and videos as a list; a str is a path or URL, not text."""
    given: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    return [p for one in given for p in ([one] if isinstance(one, Video) else sources(one))]


def as_parts(question: Any) -> list[Part]:
    """A question as texts, pictures and videos.

    Raises:
        UsageError: it holds something else. Token ids make a prompt with `Prompt.from_tokens`.
    """
    if isinstance(question, str):
        return [question]
    if not isinstance(question, list | tuple):
        kind = type(question).__name__
        raise UsageError(f"a question must be text or a list of texts and pictures, got {kind}")
    return [p for one in question for p in ([one] if isinstance(one, str) else as_visuals(one))]


def _tokenizer(path: Path) -> tuple[Tokenizer | None, frozenset[int]]:
    """The tokenizer and the ids of its control tokens, which encoding text never gives."""
    if not path.exists():
        return None, frozenset()
    # With `encode_special_tokens`, special tokens are not recognised in the text of a user.
    data, control = read_tokenizer(path)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # tokenizers raises nothing more specific
        raise NanoglimpseError(f"{path} is not a valid tokenizer: {shown(str(error))}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer, control
