"""Bar charts: the name is below each bar, and the value above it or inside its top."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

import nanoglimpse.world.canvas as canvas
from nanoglimpse.world.types import COLOURS, DrawSpec, Question, Thing, sample_up_to

SMALLEST, LARGEST, NARROW, WIDE, LETTERS = 16, 28, 44, 96, 6
# The highest and the lowest bar differ from the next one by at least this share of the axis.
MARGIN = 0.08
TITLES = ("Sales", "Stock", "Orders", "Visits", "Votes", "Weekly", "Monthly", "Survey", "Report")
GROUPS = ("north", "south", "east", "west", "old", "new")
CASES = (str.lower, str.capitalize, str.upper)

PHRASES = {
    "bar": (
        "What is the value of {}?",
        "How high is the bar of {}?",
        "Which number belongs to the bar of {}?",
    ),
    "largest": (
        "Which bar is the highest?",
        "Which bar is the tallest?",
        "What is the highest bar?",
    ),
    "smallest": (
        "Which bar is the lowest?",
        "Which bar is the shortest?",
        "What is the lowest bar?",
    ),
}


@dataclass(frozen=True)
class _Frame:
    """Position and style of the bars; lengths in pixels."""

    plot: canvas.Pixels
    column: float
    bar: int
    axis: int
    font: int
    ink: canvas.Colour
    faint: canvas.Colour
    inside: bool


def draw(rng: random.Random, spec: DrawSpec) -> tuple[Image.Image, tuple[Thing, ...]]:
    """Draws a chart; it has fewer bars than specified where no more fit."""
    dark = rng.random() < 0.25
    level = rng.randint(45, 62) if dark else rng.randint(218, 242)
    image = canvas.background(rng, spec.canvas, level, rng.randint(2, 9), 8)
    labels, values = _data(rng, spec)
    frame = _frame(rng, spec, labels, values, dark)
    _extras(rng, image, frame)
    colours = rng.choices(rng.sample(COLOURS, rng.choice((1, 3, 8))), k=len(values))
    things = [
        _bar(rng, image, frame, place, row)
        for place, row in enumerate(zip(labels, values, colours, strict=True))
    ]
    return image, tuple(things)


def _data(rng: random.Random, spec: DrawSpec) -> tuple[list[str], list[int]]:
    """Labels as printed, short enough to stand side by side, and their values."""
    room = spec.canvas[0] - 20
    least, most = spec.num_things or (3, 8)
    fit = max(1, room // NARROW)
    count = rng.randint(min(least, fit), min(most, fit))
    case = rng.choice(CASES if room / count > 72 else CASES[:1])
    names = [
        case(name)
        for name in spec.names
        if len(name) <= LETTERS and canvas.width_of(case(name), SMALLEST) <= room / count - 5
    ]
    labels = sample_up_to(rng, names, count)
    return labels, _values(rng, len(labels))


def _values(rng: random.Random, count: int) -> list[int]:
    """Two-digit values whose highest and lowest stand out on an axis up to 100."""
    while True:
        values = rng.sample(range(10, 100), count)
        order = sorted(values)
        if count == 1 or min(order[1] - order[0], order[-1] - order[-2]) >= 100 * MARGIN:
            return values


def _frame(
    rng: random.Random, spec: DrawSpec, labels: list[str], values: list[int], dark: bool
) -> _Frame:
    """A random layout with room for the title, the labels and the values."""
    width, height = spec.canvas
    font = rng.randint(SMALLEST, max(SMALLEST, min(LARGEST, height // 9)))
    left = rng.randint(10, 10 + width // 20)
    column = (width - left - 8) / len(labels)
    while font > 9 and max(canvas.width_of(label, font) for label in labels) > column - 4:
        font -= 1
    bar = round(min(column * rng.uniform(0.4, 0.75), WIDE))
    top = round(height * rng.uniform(0.1, 0.2)) + 2 * font
    foot = height - round(font * rng.uniform(1.6, 2.4))
    axis = rng.choice((100, -(-max(values) // 10) * 10))
    inside = rng.random() < 0.3
    plot = (left, top, width - 8, foot)
    ink, faint = (canvas.WHITE, (110, 110, 112)) if dark else (canvas.BLACK, (185, 185, 188))
    return _Frame(plot, column, bar, axis, font, ink, faint, inside)


def _extras(rng: random.Random, image: Image.Image, frame: _Frame) -> None:
    """Draws title, grid and axis, and on some charts a legend unrelated to the bars."""
    x0, y0, x1, y1 = frame.plot
    size = min(round(frame.font * rng.uniform(1.1, 1.5)), 24)
    title = canvas.write(image, (x0, size + 2), rng.choice(TITLES), size, frame.ink, bold=True)
    lines = ImageDraw.Draw(image)
    steps = rng.choice((2, 4, 5))
    for step in range(1, steps + 1):
        y = y1 - (y1 - y0) * step // steps
        lines.line((x0, y, x1, y), frame.faint)
    lines.line((x0, y1, x1, y1), frame.ink, 2)
    if rng.random() < 0.5:
        lines.line((x0, y0, x0, y1), frame.ink, 2)
    if rng.random() < 0.4:
        _legend(rng, image, frame, title[2] + 16)


def _legend(rng: random.Random, image: Image.Image, frame: _Frame, x: int) -> None:
    """Draws swatches with words beside the title until there is no more room."""
    size = max(frame.font - 2, 10)
    lines = ImageDraw.Draw(image)
    for word in rng.sample(GROUPS, rng.randint(2, 4)):
        end = x + size + 4 + canvas.width_of(word, size)
        if end > image.width - 4:
            return
        fill = canvas.RGB[rng.choice(COLOURS)]
        lines.rectangle((x, 5, x + size - 2, 3 + size), fill, frame.faint)
        canvas.write(image, (x + size + 4, 3 + size), word, size, frame.ink)
        x = end + 14


def _bar(
    rng: random.Random, image: Image.Image, frame: _Frame, place: int, row: tuple[str, int, str]
) -> Thing:
    """Draws one bar with its label and its value."""
    label, value, colour = row
    x0, y0, _, y1 = frame.plot
    middle = x0 + (place + 0.5) * frame.column
    left = round(middle - frame.bar / 2)
    outline = (left, round(y1 - (y1 - y0) * value / frame.axis), left + frame.bar, y1)
    image.paste(canvas.jitter(rng, canvas.RGB[colour]), outline)
    ImageDraw.Draw(image).rectangle((*outline[:2], outline[2] - 1, y1 - 1), None, frame.ink)
    below = y1 + 4 - canvas.stamp("h", frame.font).top
    name = canvas.write(image, (middle, below), label, frame.font, frame.ink, align=0.5)
    number = _number(image, frame, outline, str(value), colour)
    boxes = tuple(canvas.normalised(box, image.size) for box in (name, number))
    whole = canvas.normalised(canvas.bounding_box([outline, name, number], 1), image.size)
    texts = (label, str(value))
    return Thing(whole, "bar", colour, label.lower(), str(value), boxes, texts)


def _number(
    image: Image.Image, frame: _Frame, bar: canvas.Pixels, text: str, colour: str
) -> canvas.Pixels:
    """Prints the value above the bar, or inside its top if the chart does so and it fits."""
    printed = canvas.stamp(text, frame.font).mask
    roomy = printed.width + 6 <= bar[2] - bar[0] and printed.height + 8 <= bar[3] - bar[1]
    if frame.inside and roomy:
        base, ink = bar[1] + 5 + printed.height, canvas.INK[colour]
    else:
        base, ink = bar[1] - 4, frame.ink
    return canvas.write(image, ((bar[0] + bar[2]) / 2, base), text, frame.font, ink, align=0.5)


def make_questions(
    rng: random.Random, spec: DrawSpec, things: Sequence[Thing], per_kind: int
) -> list[Question]:
    """Questions of every kind that the chart can answer."""
    questions = []
    for bar in sample_up_to(rng, things, per_kind):
        text = rng.choice(PHRASES["bar"]).format(bar.name)
        answer = f"The value of {bar.name} is {bar.value}."
        questions.append(Question(text, answer, bar.value, (bar.box,), "bar"))
    order = sorted(things, key=lambda bar: int(bar.value))
    for kind, end, bar in (("largest", "highest", order[-1]), ("smallest", "lowest", order[0])):
        text, answer = rng.choice(PHRASES[kind]), f"The bar of {bar.name} is the {end}."
        questions.append(Question(text, answer, bar.name, (bar.box,), kind))
    return questions
