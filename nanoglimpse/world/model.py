"""What a picture of the world holds, and the splits."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from ..errors import UsageError

Box = tuple[float, float, float, float]
T = TypeVar("T")


DOMAINS = ("scene", "document", "chart")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "diamond", "hexagon", "cross")
KINDS = (*SHAPES, "row", "total", "bar")
LEFT_OUT_PAIRS = (
    ("red", "star"),
    ("green", "circle"),
    ("blue", "triangle"),
    ("yellow", "hexagon"),
    ("purple", "square"),
    ("orange", "cross"),
)
QUESTION_KINDS = {
    "scene": ("number", "color", "shape", "exists", "left", "above", "count"),
    "document": ("value", "item", "total"),
    "chart": ("bar", "largest", "smallest"),
}
SPLITS = {
    "train": range(0, 1_000_000),
    "heldout": range(1_000_000, 2_000_000),
    "transfer": range(2_000_000, 3_000_000),
}
BRIEF_SUFFIX = "\n\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Item:
    """A thing in the picture.

    `box` holds everything that belongs to it (an object's outline, the row of a document from name
    to value, the column of a bar from value to label), `text_boxes` the printed text alone: the
    name, if there is one, then the value. Boxes are normalised: x0, y0, x1, y1 as shares of width
    and height. `texts` are what is printed in the text boxes, `name` is in lower case however it is
    printed, `value` as printed; what an item does not have is "".
    """

    box: Box
    kind: str
    colour: str
    name: str
    value: str
    text_boxes: tuple[Box, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question that the picture answers, and the boxes that must be seen to answer it.

    `short` is in `answer` as it is. There are no boxes where the answer is that something is not
    there.
    """

    text: str
    answer: str
    short: str
    boxes: tuple[Box, ...]
    kind: str


@dataclass(frozen=True)
class Picture:
    """An image with all that is in it; the same for the same seed, index and options."""

    image: Image.Image
    domain: str
    items: tuple[Item, ...]
    questions: tuple[Question, ...]
    seed: int
    index: int


@dataclass(frozen=True)
class Plan:
    """What a domain is asked to draw; None is for the domain to choose.

    `names` are the words that may be printed.
    """

    canvas: tuple[int, int]
    names: tuple[str, ...]
    transfer: bool
    things: tuple[int, int] | None
    size: tuple[int, int] | None


def split_of(seed: int) -> str:
    """The split that a seed belongs to.

    Raises:
        UsageError: to none.
    """
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise UsageError(f"seed {seed} is in no split; take one of 0 to {seeds.stop - 1}")


def some(rng: random.Random, candidates: Sequence[T], most: int) -> list[T]:
    """At most so many of the candidates, in random order."""
    return rng.sample(candidates, min(most, len(candidates)))
