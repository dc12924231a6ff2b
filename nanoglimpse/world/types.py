"""The vocabulary of the world: pictures, the things in them, questions, and the splits."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from nanoglimpse.errors import UsageError

Box = tuple[float, float, float, float]
T = TypeVar("T")

CELL, SMALLEST, LARGEST = 28, 112, 1120  # pixels of a cell, and of the sides of a canvas
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
# VisCoT appends this sentence to its questions.
REQUEST = (
    " Please provide the bounding box coordinate of the region that can help you answer the "
    "question better."
)
BRIEF_SUFFIX = "\n\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Thing:
    """An object of a scene, a row of a document or a bar of a chart.

    Boxes are normalised: x0, y0, x1, y1 as shares of width and height. Text that a thing does not
    have is "".

    Attributes:
        box: everything that belongs to the thing: the outline of an object, a row from name to
            value, the column of a bar from its value down to its label.
        kind: one of KINDS.
        colour: one of COLOURS.
        name: in lower case, however it is printed.
        value: as printed.
        text_boxes: around the printed text alone: the name, if there is one, then the value.
        texts: what is printed in the text boxes.
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
    """A question that the picture answers.

    Attributes:
        text: the question.
        answer: a whole sentence.
        short: the part of the answer that matters, word for word.
        boxes: the evidence; empty if the answer is that something is absent.
        kind: one of QUESTION_KINDS.
    """

    text: str
    answer: str
    short: str
    boxes: tuple[Box, ...]
    kind: str


@dataclass(frozen=True)
class Picture:
    """An image with its things and questions; equal seed, index and options give equal pictures."""

    image: Image.Image
    domain: str
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]
    seed: int
    index: int


@dataclass(frozen=True)
class DrawSpec:
    """What a domain has to draw.

    Attributes:
        canvas: width and height in pixels.
        names: the words that may be printed.
        transfer: whether to use the colour and shape pairs that training leaves out.
        num_things: the fewest and the most things, or None for the domain's own choice.
        size: the smallest and the largest object in pixels, or None for the domain's own choice.

    Raises:
        UsageError: canvas, num_things or size is out of its range.
    """

    canvas: tuple[int, int]
    names: tuple[str, ...]
    transfer: bool
    num_things: tuple[int, int] | None
    size: tuple[int, int] | None

    def __post_init__(self) -> None:
        for name, bounds in (("num_things", self.num_things), ("size", self.size)):
            if bounds is not None and not 1 <= bounds[0] <= bounds[1]:
                raise UsageError(f"{name} must be (fewest, most), both at least 1, got {bounds}")
        if self.size is not None and self.size[0] < 12:
            raise UsageError(f"size must be at least 12 pixels to hold text, got {self.size[0]}")
        for side in self.canvas:
            if side % CELL or not SMALLEST <= side <= LARGEST:
                raise UsageError(
                    f"a canvas side must be a multiple of {CELL} from {SMALLEST} to {LARGEST} "
                    f"pixels, got {side}"
                )


def split_of(seed: int) -> str:
    """The name of the split that a seed belongs to.

    Raises:
        UsageError: the seed is in no split.
    """
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise UsageError(f"seed must be in [0, {seeds.stop - 1}], got {seed}")


def sample_up_to(rng: random.Random, candidates: Sequence[T], most: int) -> list[T]:
    """At most `most` of the candidates, in random order."""
    return rng.sample(candidates, min(most, len(candidates)))
