"""Kinds of values that options take. Each is checked when the command line is parsed.

An option names its kind (`add("--rounds", 11, "rounds that are counted", kind=COUNT)`), or has the
kind in place of a default (`add("--seed", SEED, "seed of the pictures")`). `whole` and `number`
make kinds of other ranges.
"""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INT32, INT64 = 2**31 - 1, 2**63 - 1
# Limits of the file systems that are in use, in bytes.
NAME_BYTES, PATH_BYTES = 255, 4095


@dataclass(frozen=True)
class Kind:
    """A kind of values.

    Attributes:
        accepts: what is accepted, in words that follow "must be".
        read: makes a value of a text, or raises ValueError.
    """

    accepts: str
    read: Callable[[str], Any]

    def __call__(self, text: str) -> Any:
        """The value.

        Raises:
            ArgumentTypeError: the text is no value of this kind.
        """
        try:
            return self.read(text)
        except ValueError:
            raise ArgumentTypeError(f"must be {self.accepts}, got {text!r}") from None


def whole(low: int, high: int = INT32) -> Kind:
    """Whole numbers in [low, high]."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    most = "" if high in (INT32, INT64) else f" and at most {high}"
    return Kind(f"a whole number of at least {low}{most}", read)


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Kind:
    """Finite numbers in [low, high], or in (low, high] if `open_low` is set."""

    def read(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
            raise ValueError
        return value

    if high == math.inf:
        return Kind(f"a number {'above' if open_low else 'of at least'} {low:g}", read)
    return Kind(f"in {'(' if open_low else '['}{low:g}, {high:g}]", read)


COUNT, NATURAL = whole(1), whole(0)
SEED = whole(0, INT64)
# Shares of which 0 makes no sense, and those of which it does.
SHARE, FRACTION = number(0, 1, open_low=True), number(0, 1)
# A rate of 0 trains nothing, which is a control.
RATE, WEIGHT = number(0, 100), number(0)
THREADS, WORKERS = whole(0, 1024), whole(0, 256)
# Pictures of 16,384 × 16,384 pixels have 340,000 visual tokens.
PIXELS = whole(1, 2**28)


def _ratio(text: str) -> float | None:
    return None if text == "none" else SHARE.read(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise ValueError
    return text


def _name(text: str) -> str:
    raw = text.encode("utf-8", "surrogateescape")
    longest = max(map(len, re.split(rb"[/\\]", raw)))
    if not raw or b"\0" in raw or longest > NAME_BYTES or len(raw) > PATH_BYTES:
        raise ValueError
    return text


RATIO = Kind("in (0, 1], or none", _ratio)
DEVICE = Kind("auto, cpu, cuda or cuda:N", _device)
NAME = Kind(f"a name or path, of at most {NAME_BYTES} bytes between slashes", _name)
FILE = Kind(NAME.accepts, lambda text: Path(_name(text)))
