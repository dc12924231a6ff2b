"""Coloured shapes with a number or a code on each, on a textured ground."""

import math
import random
from collections import Counter
from functools import lru_cache
from itertools import permutations, product
from operator import itemgetter

from PIL import Image, ImageDraw

from .canvas import INK, RGB, Pixels, background, clutter, near, normal, stamp
from .model import COLOURS, LEFT_OUT_PAIRS, SHAPES, Item, Plan, Question, some

Pair = tuple[str, str]

# Text in a shape: width and height that it may take and where its middle is, as shares of the size.
ROOM = {
    "circle": (0.74, 0.46, 0.5),
    "square": (0.8, 0.6, 0.5),
    "triangle": (0.46, 0.38, 0.69),
    "star": (0.42, 0.38, 0.56),
    "diamond": (0.56, 0.38, 0.5),
    "hexagon": (0.72, 0.46, 0.5),
    "cross": (0.84, 0.4, 0.5),
}
SMALLEST_TEXT, LARGEST_FONT = 13, 48
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # I, O and Q are too much like digits
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


def draw(rng: random.Random, plan: Plan) -> tuple[Image.Image, tuple[Item, ...]]:
    """A scene and its objects; fewer than asked for where no more fit."""
    image = background(rng, plan.canvas, rng.randint(95, 160), rng.randint(10, 40))
    cells = plan.canvas[0] * plan.canvas[1] / 28**2
    clutter(rng, image, rng.randint(0, round(4 + cells / 20)))
    most = min(max(round(cells / 14), 2), 8)
    count = rng.randint(*plan.things or (1 + most // 6, most))
    pairs, used, items = _pairs(rng, plan), [], []
    shadow = rng.random() < 0.4
    for box in _places(rng, plan, count):
        for pair in pairs:
            if text := _text(rng, pair[1], box[2] - box[0], used):
                items.append(_object(rng, image, box, pair, text, shadow))
                pairs.remove(pair)
                break
    return image, tuple(items)


def _allowed(plan: Plan) -> list[Pair]:
    pairs = product(COLOURS, SHAPES)
    return [pair for pair in pairs if plan.transfer or pair not in LEFT_OUT_PAIRS]


def _pairs(rng: random.Random, plan: Plan) -> list[Pair]:
    """All pairs that may be drawn; first come those of a few colours and shapes, to be alike."""
    colours = rng.sample(COLOURS, rng.randint(2, len(COLOURS)))
    shapes = rng.sample(SHAPES, rng.randint(2, len(SHAPES)))
    first = rng.choice(LEFT_OUT_PAIRS) if plan.transfer else None
    pairs = _allowed(plan)
    rng.shuffle(pairs)
    return sorted(
        pairs, key=lambda pair: (pair != first, pair[0] not in colours or pair[1] not in shapes)
    )


def _places(rng: random.Random, plan: Plan, count: int) -> list[Pixels]:
    """Where objects go; the largest are placed first, which leaves room for the others."""
    width, height = plan.canvas
    room = min(width, height) - 4
    fair = math.sqrt(0.5 * width * height / count) - GAP
    least, most = plan.size or (40, round(max(min(110, room * 0.45, fair), 40)))
    least, most = min(least, room), min(most, room)
    places: list[Pixels] = []
    for size in sorted((rng.randint(least, most) for _ in range(count)), reverse=True):
        while size >= least and not (place := _free(rng, plan, size, places)):
            size = size * 4 // 5
        if size >= least:
            places.append(place)
    rng.shuffle(places)
    return places


def _free(rng: random.Random, plan: Plan, size: int, places: list[Pixels]) -> Pixels | None:
    """A square that keeps away from the others, if one is found."""
    for _ in range(30):
        x = rng.randint(2, plan.canvas[0] - size - 2)
        y = rng.randint(2, plan.canvas[1] - size - 2)
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
    """A number or code that is readable on the shape, its digits not yet used; "" if none."""
    room = size * ROOM[shape][0]
    for attempt in range(30):
        digits = str(rng.randint(1, 99 if attempt < 15 else 9))
        letter = rng.choice(LETTERS) if attempt < 15 and rng.random() < 0.3 else ""
        fits = stamp(letter + digits, _font_for(shape, size)).mask.width <= room
        if fits and digits not in used:
            used.append(digits)
            return letter + digits
    return ""


def _font_for(shape: str, size: int) -> int:
    """The smallest font allowed: its digits are SMALLEST_TEXT high, less on tiny shapes."""
    height = min(SMALLEST_TEXT, ROOM[shape][1] * size)
    return max(8, round(height / _digit_height()))


@lru_cache(maxsize=1)
def _digit_height() -> float:
    return stamp("0", 200).mask.height / 200


def _object(
    rng: random.Random, image: Image.Image, box: Pixels, pair: Pair, text: str, shadow: bool
) -> Item:
    """Draws one object and its text."""
    colour, shape = pair
    size = box[2] - box[0]
    mask = _mask(shape, size)
    if shadow:
        image.paste((30, 30, 32), (box[0] + 2, box[1] + 3), mask.point(lambda value: value // 2))
    image.paste(near(rng, RGB[colour]), box[:2], mask)
    printed = _fitted(rng, shape, size, text)
    x = (box[0] + box[2] - printed.width) // 2
    y = round(box[1] + size * ROOM[shape][2] - printed.height / 2)
    image.paste(INK[colour], (x, y), printed)
    where = (x, y, x + printed.width, y + printed.height)
    boxes = (normal(where, image.size),)
    return Item(normal(box, image.size), shape, colour, "", text, boxes, (text,))


def _fitted(rng: random.Random, shape: str, size: int, text: str) -> Image.Image:
    """The text about as large as the shape has room for."""
    sample = stamp(text, 100).mask
    width, height, _ = ROOM[shape]
    most = int(min(100 * width / sample.width, 100 * height / sample.height) * size)
    font = max(_font_for(shape, size), min(round(most * rng.uniform(0.85, 1)), LARGEST_FONT))
    bold = stamp(text, font, rng.random() < 0.5).mask
    return bold if bold.width <= width * size else stamp(text, font).mask


@lru_cache(maxsize=1024)
def _mask(shape: str, size: int) -> Image.Image:
    """The shape as a mask that it fills from edge to edge."""
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
    return {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
        "hexagon": [(0.25, 0), (0.75, 0), (1, 0.5), (0.75, 1), (0.25, 1), (0, 0.5)],
        "cross": [
            *((near, 0), (far, 0), (far, near), (1, near), (1, far), (far, far)),
            *((far, 1), (near, 1), (near, far), (0, far), (0, near), (near, near)),
        ],
    }[shape]


def _star() -> list[tuple[float, float]]:
    points = [
        (radius * math.sin(turn * math.pi / 5), -radius * math.cos(turn * math.pi / 5))
        for turn, radius in enumerate([1.0, 0.5] * 5)
    ]
    wide, low = max(x for x, _ in points), max(y for _, y in points)
    return [((x / wide + 1) / 2, (y + 1) / (low + 1)) for x, y in points]


def ask(rng: random.Random, plan: Plan, items: tuple[Item, ...], per_kind: int) -> list[Question]:
    """Questions of every kind that the scene can answer."""
    questions = [_ask_number(rng, item, items) for item in some(rng, items, per_kind)]
    questions += [
        make(rng, item, items)
        for make in (_ask_color, _ask_shape)
        for item in some(rng, items, per_kind)
    ]
    questions += _ask_exists(rng, plan, items, per_kind)
    questions += _ask_sides(rng, plan, items, per_kind)
    return questions + [
        _ask_count(rng, one, many, found) for one, many, found in _groups(rng, items)[:per_kind]
    ]


def thing(item: Item) -> str:
    """The object by its colour and its shape, of which there is one."""
    return f"{item.colour} {item.kind}"


def _called(rng: random.Random, item: Item, items: tuple[Item, ...]) -> str:
    """What a question calls the object: by one of the two where that is enough, or by both."""
    return rng.choice([thing(item), *_by_colour(item, items), *_by_shape(item, items)])


def _by_colour(item: Item, items: tuple[Item, ...]) -> list[str]:
    """The object by its colour alone, where it is the only one."""
    alone = sum(other.colour == item.colour for other in items) == 1
    return [f"{item.colour} object"] * alone


def _by_shape(item: Item, items: tuple[Item, ...]) -> list[str]:
    """The object by its shape alone, where it is the only one."""
    return [item.kind] * (sum(other.kind == item.kind for other in items) == 1)


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _noun(item: Item) -> str:
    return "number" if item.value.isdigit() else "code"


def _ask_number(rng: random.Random, item: Item, items: tuple[Item, ...]) -> Question:
    phrase, name = rng.choice(PHRASES[_noun(item)] + PHRASES["text"]), _called(rng, item, items)
    answer = f"The {_noun(item)} on the {name} is {item.value}."
    return Question(phrase.format(name), answer, item.value, (item.box,), "number")


def _marked(rng: random.Random, item: Item, names: list[str]) -> tuple[str, str]:
    """What a question and its answer call the object: by its text, or by the name it has."""
    if names and rng.random() < 0.5:
        return names[0], names[0]
    marks = (item.value, f"the {_noun(item)} {item.value}")
    return f"object with {rng.choice(marks)}", f"object with {item.value}"


def _ask_color(rng: random.Random, item: Item, items: tuple[Item, ...]) -> Question:
    asked, called = _marked(rng, item, _by_shape(item, items))
    answer = f"The {called} is {item.colour}."
    text = rng.choice(PHRASES["color"]).format(asked)
    return Question(text, answer, item.colour, (item.box,), "color")


def _ask_shape(rng: random.Random, item: Item, items: tuple[Item, ...]) -> Question:
    asked, called = _marked(rng, item, _by_colour(item, items))
    answer = f"The {called} is {_a(item.kind)}."
    text = rng.choice(PHRASES["shape"]).format(asked)
    return Question(text, answer, item.kind, (item.box,), "shape")


def _ask_exists(
    rng: random.Random, plan: Plan, items: tuple[Item, ...], per_kind: int
) -> list[Question]:
    """About as many with yes as with no; no is asked of what is there in part, if it can be."""
    count = min(per_kind, len(items))
    absent = sum(rng.random() < 0.5 for _ in range(count))
    questions = []
    for item in some(rng, items, count - absent):
        text = rng.choice(PHRASES["exists"]).format(_a(thing(item)))
        answer = f"Yes, there is {_a(thing(item))}."
        questions.append(Question(text, answer, "yes", (item.box,), "exists"))
    for pair in _missing(rng, plan, items)[:absent]:
        text = rng.choice(PHRASES["exists"]).format(_a(" ".join(pair)))
        answer = f"No, there is no {' '.join(pair)}."
        questions.append(Question(text, answer, "no", (), "exists"))
    return questions


def _missing(rng: random.Random, plan: Plan, items: tuple[Item, ...]) -> list[Pair]:
    """The pairs that are not there, those first of which the picture has more."""
    there = [(item.colour, item.kind) for item in items]
    colours, shapes = [pair[0] for pair in there], [pair[1] for pair in there]
    missing = [pair for pair in _allowed(plan) if pair not in there]
    rng.shuffle(missing)
    return sorted(missing, key=lambda pair: -((pair[0] in colours) + (pair[1] in shapes)))


def _ask_sides(
    rng: random.Random, plan: Plan, items: tuple[Item, ...], per_kind: int
) -> list[Question]:
    """Comparisons of two objects that are clearly apart on the axis."""
    questions = []
    for axis, (kind, end) in enumerate((("left", "is further left"), ("above", "is higher up"))):
        for first, second in some(rng, _apart(plan, items, axis), per_kind):
            names = [_called(rng, item, items) for item in (first, second)]
            text = rng.choice(PHRASES[kind]).format(*rng.sample(names, 2))
            answer = f"The {names[0]} {end}."
            boxes = (first.box, second.box)
            questions.append(Question(text, answer, names[0], boxes, kind))
    return questions


def _apart(plan: Plan, items: tuple[Item, ...], axis: int) -> list[tuple[Item, Item]]:
    """Pairs of objects of which the first one's centre is clearly before the second's."""
    half = plan.canvas[axis] / 2
    centres = [((item.box[axis] + item.box[axis + 2]) * half, item) for item in items]
    return [(a, b) for (x, a), (y, b) in permutations(centres, 2) if y - x >= APART]


def _groups(rng: random.Random, items: tuple[Item, ...]) -> list[tuple[str, str, list[Item]]]:
    """What can be counted: its name for one and for many, and the objects; five at most.

    Groups of different sizes come first, since most groups are of one.
    """
    groups = [
        (f"{colour} object", f"{colour} objects", [i for i in items if i.colour == colour])
        for colour in COLOURS
    ]
    for shape in SHAPES:
        plural = shape + ("es" if shape.endswith("s") else "s")
        groups.append((shape, plural, [item for item in items if item.kind == shape]))
    rng.shuffle(groups)
    sizes, ranked = Counter(), []
    for group in groups:
        size = len(group[2])
        if 1 <= size <= 5:
            ranked.append((sizes[size], group))
            sizes[size] += 1
    return [group for _, group in sorted(ranked, key=itemgetter(0))]


def _ask_count(rng: random.Random, one: str, many: str, found: list[Item]) -> Question:
    count, boxes = len(found), tuple(item.box for item in found)
    answer = f"There is 1 {one}." if count == 1 else f"There are {count} {many}."
    text = rng.choice(PHRASES["count"]).format(many)
    return Question(text, answer, str(count), boxes, "count")
