"""Renders one picture of the world from a seed and an index."""

import random

import nanoglimpse.world.chart as chart
import nanoglimpse.world.document as document
import nanoglimpse.world.scene as scene
from nanoglimpse.errors import UsageError
from nanoglimpse.world.types import CELL, DOMAINS, DrawSpec, Picture, split_of
from nanoglimpse.world.words import names_of

PAINTERS = {"scene": scene, "document": document, "chart": chart}
# Width to height; a square is as likely as all others together.
ASPECTS = ((1, 1), (1, 1), (1, 1), (1, 1), (4, 3), (3, 4), (3, 2), (2, 3))


def render(
    seed: int,
    index: int,
    *,
    domain: str | None = None,
    canvas: tuple[int, int] | None = None,
    num_things: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    per_kind: int = 3,
) -> Picture:
    """Draws a picture and makes questions about it.

    Args:
        seed: selects the split, see `SPLITS`, and with the index the picture.
        index: number of the picture, from 0.
        domain: one of DOMAINS; random if None.
        canvas: width and height in pixels, multiples of 28 from 112 to 1120; random if None.
        num_things: the fewest and the most objects, rows or bars; chosen by the canvas if None. A
            full canvas holds fewer.
        size: the smallest and the largest object of a scene in pixels; chosen by the canvas if
            None.
        per_kind: upper limit for the questions of each kind.

    Raises:
        UsageError: an argument is out of its range.
    """
    split = split_of(seed)
    if index < 0:
        raise UsageError(f"index must be at least 0, got {index}")
    if per_kind < 1:
        raise UsageError(f"per_kind must be at least 1, got {per_kind}")
    if domain is not None and domain not in DOMAINS:
        raise UsageError(f"unknown domain {domain}; choose one of {', '.join(DOMAINS)}")
    rng = random.Random(f"world {seed} {index}")
    # Drawn even if they are given, so that the rest of the picture does not depend on that.
    random_domain = rng.choice(DOMAINS)
    domain = domain or random_domain
    random_canvas = _canvas(rng, domain, split == "transfer")
    names = names_of(split, seed, index)
    spec = DrawSpec(canvas or random_canvas, names, split == "transfer", num_things, size)
    image, things = PAINTERS[domain].draw(rng, spec)
    questions = PAINTERS[domain].make_questions(rng, spec, things, per_kind)
    rng.shuffle(questions)
    return Picture(image, domain, things, tuple(questions), seed, index)


def _canvas(rng: random.Random, domain: str, transfer: bool) -> tuple[int, int]:
    """A random width and height, larger in the transfer split than in the others."""
    least = 8 if domain == "scene" else 10
    longer = rng.randint(25, 40) if transfer else rng.randint(least, 24)
    wide, high = rng.choice(ASPECTS)
    sides = (max(least, longer * side // max(wide, high)) for side in (wide, high))
    width, height = (side * CELL for side in sides)
    return width, height
