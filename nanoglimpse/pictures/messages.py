"""Lists of messages, as Qwen's utilities and the clients of OpenAI's interface write them.

A message is {"role": "system" | "user" | "assistant", "content": text or a list of parts}. A part
is {"type": "text", "text": …}, {"type": "image", "image": …}, {"type": "video", "video": …}, or
{"type": "image_url", "image_url": {"url": …}}.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from nanoglimpse.errors import UsageError, one_line
from nanoglimpse.pictures.picture import Source, sources
from nanoglimpse.pictures.video import FPS, MAX_FRAMES, Video

Part = str | Source | Video
LIMITS = ("min_pixels", "max_pixels")


class Conversation(NamedTuple):
    """What a list of messages says.

    Attributes:
        system: the system prompt, None if there is none.
        history: earlier turns, each with its answer.
        turn: the turn to answer.
    """

    system: str | None
    history: list[tuple[list[Part], str]]
    turn: list[Part]


def is_messages(question: object) -> bool:
    """Whether a question is a list of messages: a list of dicts, the first of which has a role."""
    first = question[0] if isinstance(question, list | tuple) and question else None
    return isinstance(first, dict) and "role" in first


def read_messages(messages: Sequence[Any]) -> Conversation:
    """Reads messages: the system prompt or none, then user and assistant in turns, the user last.

    Raises:
        UsageError: they are not such messages; it says which.
        NanoglimpseError: a picture cannot be fetched.
    """
    contents: list[list[Part]] = []
    system = None
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        role = message.get("role") if isinstance(message, dict) else None
        if role == "system" and number == 1:
            system = _text(_parts(message.get("content"), where), where)
            continue
        expected = "assistant" if len(contents) % 2 else "user"
        if role != expected:
            raise UsageError(f"{where} must have the role {expected!r}, got {one_line(role, 40)!r}")
        contents.append(_parts(message.get("content"), where))
    if len(contents) % 2 == 0:
        raise UsageError("the last message must be one of the user")
    pairs = zip(contents[:-1:2], contents[1::2], strict=True)
    history = [(asked, _text(answer, "a message of the assistant")) for asked, answer in pairs]
    return Conversation(system, history, contents[-1])


def _text(parts: Sequence[Part], where: str) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise UsageError(f"{where} must be text")
    return "".join(part for part in parts if isinstance(part, str))


def _parts(content: Any, where: str) -> list[Part]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list | tuple):
        raise UsageError(
            f"{where}: content must be text or a list of parts, got {type(content).__name__}"
        )
    return [part for one in content for part in _part(one, where)]


def _part(part: Any, where: str) -> list[Part]:
    if isinstance(part, str):
        return [part]
    kinds = ("text", "image", "image_url", "video")
    kind = next((kind for kind in kinds if isinstance(part, dict) and kind in part), None)
    if kind is None:
        raise UsageError(f"{where}: a part must be a dict with one of {', '.join(kinds)}")
    value, known = part[kind], {"type", kind}
    if kind == "text":
        _only(part, known, where)
        if not isinstance(value, str):
            raise UsageError(f"{where}: text must be a str, got {type(value).__name__}")
        return [value]
    limits = {name: part[name] for name in LIMITS if part.get(name) is not None}
    if not all(isinstance(limit, int) for limit in limits.values()):
        raise UsageError(f"{where}: {' and '.join(LIMITS)} must be whole numbers")
    if kind == "video":
        _only(part, known | {*LIMITS, "fps", "max_frames"}, where)
        rates = {"fps": part.get("fps", FPS), "max_frames": part.get("max_frames", MAX_FRAMES)}
        if not all(isinstance(rate, int | float) for rate in rates.values()):
            raise UsageError(f"{where}: fps and max_frames must be numbers")
        return [Video(value, **rates, **limits)]
    _only(part, known | {*LIMITS, "detail"}, where)
    value = value.get("url") if kind == "image_url" and isinstance(value, dict) else value
    return [replace(one, **limits) for one in sources(value)]


def _only(part: dict, known: set[str], where: str) -> None:
    if unknown := [key for key in part if key not in known]:
        names = ", ".join(sorted(known))
        raise UsageError(f"{where}: unknown key {one_line(unknown[0], 40)!r}; known are {names}")
