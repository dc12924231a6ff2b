"""Scenes: coloured shapes on a textured background, each with a number or a code on it."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations, product
from operator import itemgetter

from PIL import Image, ImageDraw

import nanoglimpse.world.canvas as canvas
import nanoglimpse.world.types as types
from nanoglimpse.world.types import COLOURS, SHAPES, DrawSpec, Question, Thing, sample_up_to

Pair = tuple[str, str]

# Where text fits in a shape: its largest width and height and its middle, as shares of the size.
TEXT_AREA = {
    "circle": (0.74, 0.46, 0.5),
    "square": (0.8, 0.6, 0.5),
    "triangle": (0.46, 0.38, 0.69),
    "star": (0.42, 0.38, 0.56),
    "diamond": (0.56, 0.38, 0.5),
    "hexagon": (0.72, 0.46, 0.5),
    "cross": (0.84, 0.4, 0.5),
}
SMALLEST_TEXT, LARGEST_FONT = 13, 48
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # without I, O and Q, which look like digits
GAP, APART, OVERSAMPLE = 6, 42, 3

PHRASES = {
    "number": ("What number is on the {}?", "Which number does the {} show?"),
    "code": ("What code is on the {}?", "Which code does the {} show?"),
    "text": ("What is written on the {}?", "What does the {} say?"),
    "color": (
        "What color is the {}?",
        "Which color does the {} have?",
        "What is the color of the {}?",
    ),
    "shape": (
        "What shape is the {}?",
        "Which shape does the {} have?",
        "What is the shape of the {}?",
    ),
    "exists": ("Is there {}?", "Can you see {}?", "Does the picture show {}?"),
    "left": (
        "Which is further left, the {} or the {}?",
        "Which one is further to the left: the {} or the {}?",
        "Of the {} and the {}, which is further left?",
    ),
    "above": (
        "Which is higher up, the {} or the {}?",
        "Which one is closer to the top: the {} or the {}?",
        "Of the {} and the {}, which is higher up?",
    ),
    "count": ("How many {} are there?", "How many {} does the picture show?", "Count the {}."),
}


def draw(rng: random.Random, spec: DrawSpec) -> tuple[Image.Image, tuple[Thing, ...]]:
    """Draws a scene; it has fewer objects than specified where no more fit."""
    image = canvas.background(rng, spec.canvas, rng.randint(95, 160), rng.randint(10, 40))
    cells = spec.canvas[0] * spec.canvas[1] / 28**2
    canvas.clutter(rng, image, rng.randint(0, round(4 + cells / 20)))
    most = min(max(round(cells / 14), 2), 8)
    count = rng.randint(*spec.num_things or (1 + most // 6, most))
    pairs, used, things = _pairs(rng, spec), list[str](), list[Thing]()
    shadow = rng.random() < 0.4
    for box in _places(rng, spec, count):
        for pair in pairs:
            if text := _text(rng, pair[1], box[2] - box[0], used):
                things.append(_object(rng, image, box, pair, text, shadow))
                pairs.remove(pair)
                break
    return image, tuple(things)


def _allowed(spec: DrawSpec) -> list[Pair]:
    pairs = product(COLOURS, SHAPES)
    return [pair for pair in pairs if spec.transfer or pair not in types.LEFT_OUT_PAIRS]


def _pairs(rng: random.Random, spec: DrawSpec) -> list[Pair]:
    """All pairs that may be drawn, in order of preference.

    Pairs of a few colours and shapes come first, so that objects have some of them in common.
    """
    colours = rng.sample(COLOURS, rng.randint(2, len(COLOURS)))
    shapes = rng.sample(SHAPES, rng.randint(2, len(SHAPES)))
    first = rng.choice(types.LEFT_OUT_PAIRS) if spec.transfer else None
    pairs = _allowed(spec)
    rng.shuffle(pairs)
    return sorted(
        pairs, key=lambda pair: (pair != first, pair[0] not in colours or pair[1] not in shapes)
    )


def _places(rng: random.Random, spec: DrawSpec, count: int) -> list[canvas.Pixels]:
    """Squares for the objects; the largest are placed first, while there is room for them."""
    width, height = spec.canvas
    room = min(width, height) - 4
    fair = math.sqrt(0.5 * width * height / count) - GAP
    least, most = spec.size or (40, round(max(min(110, room * 0.45, fair), 40)))
    least, most = min(least, room), min(most, room)
    places: list[canvas.Pixels] = []
    for size in sorted((rng.randint(least, most) for _ in range(count)), reverse=True):
        place = None
        while size >= least and not (place := _free(rng, spec, size, places)):
            size = size * 4 // 5
        if place:
            places.append(place)
    rng.shuffle(places)
    return places


def _free(
    rng: random.Random, spec: DrawSpec, size: int, places: list[canvas.Pixels]
) -> canvas.Pixels | None:
    """A random square that keeps its distance from the others; None if 30 tries find none."""
    for _ in range(30):
        x = rng.randint(2, spec.canvas[0] - size - 2)
        y = rng.randint(2, spec.canvas[1] - size - 2)
        if all(
            x >= other[2] + GAP
            or other[0] >= x + size + GAP
            or y >= other[3] + GAP
            or other[1] >= y + size + GAP
            for other in places
        ):
            return x, y, x + size, y + size
    return None


def _text(rng: random.Random, shape: str, size: int, used: list[str]) -> str:
    """A number or code that fits on the shape and whose digits are new; "" if none is found."""
    room = size * TEXT_AREA[shape][0]
    for attempt in range(30):
        digits = str(rng.randint(1, 99 if attempt < 15 else 9))
        letter = rng.choice(LETTERS) if attempt < 15 and rng.random() < 0.3 else ""
        fits = canvas.stamp(letter + digits, _font_for(shape, size)).mask.width <= room
        if fits and digits not in used:
            used.append(digits)
            return letter + digits
    return ""


def _font_for(shape: str, size: int) -> int:
    """The smallest font allowed: digits of SMALLEST_TEXT pixels, or fewer on tiny shapes."""
    height = min(SMALLEST_TEXT, TEXT_AREA[shape][1] * size)
    return max(8, round(height / _digit_height()))


@lru_cache(maxsize=1)
def _digit_height() -> float:
    return canvas.stamp("0", 200).mask.height / 200


def _object(
    rng: random.Random, image: Image.Image, box: canvas.Pixels, pair: Pair, text: str, shadow: bool
) -> Thing:
    """Draws one object and its text."""
    colour, shape = pair
    size = box[2] - box[0]
    mask = _mask(shape, size)
    if shadow:
        image.paste((30, 30, 32), (box[0] + 2, box[1] + 3), mask.point(lambda value: value // 2))
    image.paste(canvas.jitter(rng, canvas.RGB[colour]), box[:2], mask)
    printed = _fitted(rng, shape, size, text)
    x = (box[0] + box[2] - printed.width) // 2
    y = round(box[1] + size * TEXT_AREA[shape][2] - printed.height / 2)
    image.paste(canvas.INK[colour], (x, y), printed)
    where = (x, y, x + printed.width, y + printed.height)
    boxes = (canvas.normalised(where, image.size),)
    return Thing(canvas.normalised(box, image.size), shape, colour, "", text, boxes, (text,))


def _fitted(rng: random.Random, shape: str, size: int, text: str) -> Image.Image:
    """The text as a mask, about as large as fits on the shape."""
    sample = canvas.stamp(text, 100).mask
    width, height, _ = TEXT_AREA[shape]
    most = int(min(100 * width / sample.width, 100 * height / sample.height) * size)
    font = max(_font_for(shape, size), min(round(most * rng.uniform(0.85, 1)), LARGEST_FONT))
    bold = canvas.stamp(text, font, rng.random() < 0.5).mask
    return bold if bold.width <= width * size else canvas.stamp(text, font).mask


@lru_cache(maxsize=1024)
def _mask(shape: str, size: int) -> Image.Image:
    """The shape as a mask, which it touches on every side."""
    large = size * OVERSAMPLE
    mask = Image.new("L", (large, large))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0, 0, large - 1, large - 1), 255)
    else:
        pen.polygon([(x * (large - 1), y * (large - 1)) for x, y in _corners(shape)], 255)
    return mask.reduce(OVERSAMPLE)


def _corners(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in the unit square."""
    if shape == "star":
        return _star()
    near, far = 0.27, 0.73
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
        "hexagon": [(0.25, 0), (0.75, 0), (1, 0.5), (0.75, 1), (0.25, 1), (0, 0.5)],
        "cross": [
            *((near, 0), (far, 0), (far, near), (1, near), (1, far), (far, far)),
            *((far, 1), (near, 1), (near, far), (0, far), (0, near), (near, near)),
        ],
    }
    return corners[shape]


def _star() -> list[tuple[float, float]]:
    points = [
        (radius * math.sin(turn * math.pi / 5), -radius * math.cos(turn * math.pi / 5))
        for turn, radius in enumerate([1.0, 0.5] * 5)
    ]
    wide, low = max(x for x, _ in points), max(y for _, y in points)
    return [((x / wide + 1) / 2, (y + 1) / (low + 1)) for x, y in points]


def make_questions(
    rng: random.Random, spec: DrawSpec, things: Sequence[Thing], per_kind: int
) -> list[Question]:
    """Questions of every kind that the scene can answer."""
    questions = [
        make(rng, thing, things)
        for make in (_number_question, _color_question, _shape_question)
        for thing in sample_up_to(rng, things, per_kind)
    ]
    questions += _existence_questions(rng, spec, things, per_kind)
    questions += _comparison_questions(rng, spec, things, per_kind)
    return questions + [
        _count_question(rng, one, many, found)
        for one, many, found in _groups(rng, things)[:per_kind]
    ]


def _full_name(thing: Thing) -> str:
    """Colour and shape, which no other object of the scene shares."""
    return f"{thing.colour} {thing.kind}"


def _called(rng: random.Random, thing: Thing, things: Sequence[Thing]) -> str:
    """A random name of the object: by colour and shape, or by one of them if that is unique."""
    return rng.choice([_full_name(thing), *_by_colour(thing, things), *_by_shape(thing, things)])


def _by_colour(thing: Thing, things: Sequence[Thing]) -> list[str]:
    """The name of the object by its colour, or nothing if others have the same colour."""
    alone = sum(other.colour == thing.colour for other in things) == 1
    return [f"{thing.colour} object"] * alone


def _by_shape(thing: Thing, things: Sequence[Thing]) -> list[str]:
    """The name of the object by its shape, or nothing if others have the same shape."""
    return [thing.kind] * (sum(other.kind == thing.kind for other in things) == 1)


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _noun(thing: Thing) -> str:
    return "number" if thing.value.isdigit() else "code"


def _number_question(rng: random.Random, thing: Thing, things: Sequence[Thing]) -> Question:
    phrase, name = rng.choice(PHRASES[_noun(thing)] + PHRASES["text"]), _called(rng, thing, things)
    answer = f"The {_noun(thing)} on the {name} is {thing.value}."
    return Question(phrase.format(name), answer, thing.value, (thing.box,), "number")


def _marked(rng: random.Random, thing: Thing, names: list[str]) -> tuple[str, str]:
    """The names of the object in a question and its answer: by its text, or one of `names`."""
    if names and rng.random() < 0.5:
        return names[0], names[0]
    marks = (thing.value, f"the {_noun(thing)} {thing.value}")
    return f"object with {rng.choice(marks)}", f"object with {thing.value}"


def _color_question(rng: random.Random, thing: Thing, things: Sequence[Thing]) -> Question:
    in_question, in_answer = _marked(rng, thing, _by_shape(thing, things))
    answer = f"The {in_answer} is {thing.colour}."
    text = rng.choice(PHRASES["color"]).format(in_question)
    return Question(text, answer, thing.colour, (thing.box,), "color")


def _shape_question(rng: random.Random, thing: Thing, things: Sequence[Thing]) -> Question:
    in_question, in_answer = _marked(rng, thing, _by_colour(thing, things))
    answer = f"The {in_answer} is {_a(thing.kind)}."
    text = rng.choice(PHRASES["shape"]).format(in_question)
    return Question(text, answer, thing.kind, (thing.box,), "shape")


def _existence_questions(
    rng: random.Random, spec: DrawSpec, things: Sequence[Thing], per_kind: int
) -> list[Question]:
    """Questions with the answers yes and no, about equally often."""
    count = min(per_kind, len(things))
    absent = sum(rng.random() < 0.5 for _ in range(count))
    questions = []
    for thing in sample_up_to(rng, things, count - absent):
        text = rng.choice(PHRASES["exists"]).format(_a(_full_name(thing)))
        answer = f"Yes, there is {_a(_full_name(thing))}."
        questions.append(Question(text, answer, "yes", (thing.box,), "exists"))
    for pair in _missing(rng, spec, things)[:absent]:
        text = rng.choice(PHRASES["exists"]).format(_a(" ".join(pair)))
        answer = f"No, there is no {' '.join(pair)}."
        questions.append(Question(text, answer, "no", (), "exists"))
    return questions


def _missing(rng: random.Random, spec: DrawSpec, things: Sequence[Thing]) -> list[Pair]:
    """Pairs that the scene lacks; those whose colour or shape it has come first.

    A question about a pair that has nothing in common with the scene would be too easy.
    """
    there = [(thing.colour, thing.kind) for thing in things]
    colours, shapes = [pair[0] for pair in there], [pair[1] for pair in there]
    missing = [pair for pair in _allowed(spec) if pair not in there]
    rng.shuffle(missing)
    return sorted(missing, key=lambda pair: -((pair[0] in colours) + (pair[1] in shapes)))


def _comparison_questions(
    rng: random.Random, spec: DrawSpec, things: Sequence[Thing], per_kind: int
) -> list[Question]:
    """Comparisons of two objects that are clearly apart on the axis."""
    questions = []
    for axis, (kind, end) in enumerate((("left", "is further left"), ("above", "is higher up"))):
        for first, second in sample_up_to(rng, _apart(spec, things, axis), per_kind):
            names = [_called(rng, thing, things) for thing in (first, second)]
            text = rng.choice(PHRASES[kind]).format(*rng.sample(names, 2))
            answer = f"The {names[0]} {end}."
            boxes = (first.box, second.box)
            questions.append(Question(text, answer, names[0], boxes, kind))
    return questions


def _apart(spec: DrawSpec, things: Sequence[Thing], axis: int) -> list[tuple[Thing, Thing]]:
    """Pairs of objects in which the first one's centre is clearly before the second one's."""
    half = spec.canvas[axis] / 2
    centres = [((thing.box[axis] + thing.box[axis + 2]) * half, thing) for thing in things]
    return [(a, b) for (x, a), (y, b) in permutations(centres, 2) if y - x >= APART]


def _groups(rng: random.Random, things: Sequence[Thing]) -> list[tuple[str, str, list[Thing]]]:
    """Groups of one to five objects to count: singular, plural and the objects.

    Most groups have a single object, so the order alternates between sizes.
    """
    groups = [
        (f"{colour} object", f"{colour} objects", [i for i in things if i.colour == colour])
        for colour in COLOURS
    ]
    for shape in SHAPES:
        plural = shape + ("es" if shape.endswith("s") else "s")
        groups.append((shape, plural, [thing for thing in things if thing.kind == shape]))
    rng.shuffle(groups)
    sizes: Counter[int] = Counter()
    ranked = []
    for group in groups:
        size = len(group[2])
        if 1 <= size <= 5:
            ranked.append((sizes[size], group))
            sizes[size] += 1
    return [group for _, group in sorted(ranked, key=itemgetter(0))]


def _count_question(rng: random.Random, one: str, many: str, found: list[Thing]) -> Question:
    count, boxes = len(found), tuple(thing.box for thing in found)
    answer = f"There is 1 {one}." if count == 1 else f"There are {count} {many}."
    text = rng.choice(PHRASES["count"]).format(many)
    return Question(text, answer, str(count), boxes, "count")
