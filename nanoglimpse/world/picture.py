"""One picture of the world from a seed and an index."""

import random

from ..errors import UsageError
from . import chart, document, scene
from .model import DOMAINS, Picture, Plan, split_of
from .names import names_of

CELL, SMALLEST, LARGEST = 28, 112, 1120
MAKERS = {"scene": scene, "document": document, "chart": chart}
# Width to height; a square is as likely as all others together.
SHAPES = ((1, 1), (1, 1), (1, 1), (1, 1), (4, 3), (3, 4), (3, 2), (2, 3))


def render(
    seed: int,
    index: int,
    *,
    domain: str | None = None,
    canvas: tuple[int, int] | None = None,
    things: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    per_kind: int = 3,
) -> Picture:
    """Draws a picture and asks about it.

    Args:
        seed: chooses the split; see `SPLITS`.
        index: of the picture, 0 and above.
        domain: one of DOMAINS; drawn if None.
        canvas: width and height in pixels, multiples of 28 from 112 to 1120; drawn if None.
        things: least and most objects, rows or bars; by the canvas if None. Fewer where no more
            fit.
        size: least and most pixels across an object of a scene; by the canvas if None.
        per_kind: at most so many questions of each kind.

    Raises:
        UsageError: an argument is not one of these.
    """
    split = split_of(seed)
    _check(index, domain, canvas, things, size, per_kind)
    rng = random.Random(f"world {seed} {index}")
    chosen = rng.choice(DOMAINS)
    domain = domain or chosen
    drawn = _canvas(rng, domain, split == "transfer")
    names = names_of(split, seed, index)
    plan = Plan(canvas or drawn, names, split == "transfer", things, size)
    image, items = MAKERS[domain].draw(rng, plan)
    questions = MAKERS[domain].ask(rng, plan, items, per_kind)
    rng.shuffle(questions)
    return Picture(image, domain, items, tuple(questions), seed, index)


def _canvas(rng: random.Random, domain: str, transfer: bool) -> tuple[int, int]:
    """A width and a height, larger in the transfer split than in the others."""
    least = 8 if domain == "scene" else 10
    longer = rng.randint(25, 40) if transfer else rng.randint(least, 24)
    wide, high = rng.choice(SHAPES)
    sides = (max(least, longer * side // max(wide, high)) for side in (wide, high))
    width, height = (side * CELL for side in sides)
    return width, height


def _check(
    index: int,
    domain: str | None,
    canvas: tuple[int, int] | None,
    things: tuple[int, int] | None,
    size: tuple[int, int] | None,
    per_kind: int,
) -> None:
    if index < 0 or per_kind < 1:
        raise UsageError(f"index {index} must be 0 or more, per_kind {per_kind} 1 or more")
    if domain is not None and domain not in DOMAINS:
        raise UsageError(f"there is no domain {domain}; take one of {', '.join(DOMAINS)}")
    for name, bounds in (("things", things), ("size", size)):
        if bounds is not None and not 1 <= bounds[0] <= bounds[1]:
            raise UsageError(f"{name} {bounds} must be least and most, both 1 or more")
    if size is not None and size[0] < 12:
        raise UsageError(f"an object of {size[0]} px is too small for text; 12 is the least")
    for side in canvas or ():
        if side % CELL or not SMALLEST <= side <= LARGEST:
            raise UsageError(
                f"a canvas side of {side} px must be a multiple of {CELL} "
                f"from {SMALLEST} to {LARGEST}"
            )
