"""Documents: receipts and forms with rows of a name and a value, printed on paper."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

import nanoglimpse.world.canvas as canvas
from nanoglimpse.world.types import DrawSpec, Question, Thing, sample_up_to

SMALLEST, LARGEST, TIGHT, LOOSE = 18, 36, 1.3, 2.1
HEADER = 1.6  # height of the header in rows
HEADERS = ("RECEIPT", "Invoice", "Order", "MARKET", "Shop", "Stock", "DELIVERY", "List", "STORE")
NOTES = ("Thank you", "copy", "page one", "please keep", "no return", "paid in cash", "see below")
CASES = (str.lower, str.upper, str.capitalize)

PHRASES = {
    "price": ("How much is the {}?", "What does the {} cost?", "What is the price of the {}?"),
    "value": (
        "What is the value of {}?",
        "Which value does {} have?",
        "What is written next to {}?",
    ),
    "item": ("Which item costs {}?", "What costs {}?", "Which item has the value {}?"),
    "total": ("What is the total?", "How much is it in total?", "What is the sum?"),
}


@dataclass(frozen=True)
class _Row:
    """The text of a row: the name in lower case, and label and value as printed."""

    kind: str
    name: str
    label: str
    value: str


@dataclass(frozen=True)
class _Style:
    """The layout of a document; lengths in pixels."""

    font: int
    pitch: float
    left: int
    right: int
    top: float
    ink: canvas.Colour
    bold: bool
    leaders: bool
    ruled: bool


def draw(rng: random.Random, spec: DrawSpec) -> tuple[Image.Image, tuple[Thing, ...]]:
    """Draws a document; it has fewer rows than specified where no more fit."""
    image = canvas.background(rng, spec.canvas, rng.randint(60, 125), rng.randint(10, 30))
    sheet = _paper(rng, image)
    rows = _rows(rng, spec, sheet)
    style = _style(rng, sheet, rows)
    _extras(rng, image, style, sheet, len(rows))
    return image, tuple(_print(image, style, place, row) for place, row in enumerate(rows))


def _paper(rng: random.Random, image: Image.Image) -> canvas.Pixels:
    """Draws the paper and returns its printable area."""
    x0, y0, x1, y1 = (round(side * rng.uniform(0.015, 0.06)) for side in image.size * 2)
    box = (x0, y0, image.width - x1, image.height - y1)
    size = (box[2] - box[0], box[3] - box[1])
    image.paste(canvas.background(rng, size, rng.randint(230, 244), rng.randint(2, 9), 7), box[:2])
    return canvas.bounding_box([box], -4 - min(image.size) // 60)


def _rows(rng: random.Random, spec: DrawSpec, sheet: canvas.Pixels) -> list[_Row]:
    """Random rows; on a receipt the last one is the total."""
    receipt = rng.random() < 0.6
    fit = max(1, int((sheet[3] - sheet[1]) / (SMALLEST * TIGHT) - HEADER) - receipt)
    least, most = spec.num_things or (6, 20)
    names = sample_up_to(rng, spec.names, rng.randint(min(least, fit), min(most, fit)))
    case, (values, show) = rng.choice(CASES), _values(rng, len(names))
    mark = "" if receipt else rng.choice((":", ""))
    rows = [
        _Row("row", name, case(name) + mark, show(value))
        for name, value in zip(names, values, strict=True)
    ]
    if receipt:
        rows.append(_Row("total", "total", case("total"), show(sum(values))))
    return rows


def _values(rng: random.Random, count: int) -> tuple[list[int], Callable[[int], str]]:
    """Distinct values and their format: all are integers or all have decimals."""
    if rng.random() < 0.6:
        return rng.sample(range(10, rng.choice((100, 1000))), count), str
    steps = rng.sample(range(20, rng.choice((400, 2000))), count)
    return [5 * step for step in steps], lambda value: f"{value / 100:.2f}"


def _style(rng: random.Random, sheet: canvas.Pixels, rows: list[_Row]) -> _Style:
    """A random layout in which all rows fit on the sheet."""
    width, height = sheet[2] - sheet[0], sheet[3] - sheet[1]
    bold, lines = rng.random() < 0.35, len(rows) + HEADER
    font = rng.randint(SMALLEST, max(SMALLEST, min(LARGEST, int(height / lines / TIGHT))))
    while (needed := _needed(rows, font, bold)) > width and font > 10:
        font -= 1
    pitch = min(rng.uniform(TIGHT, LOOSE) * font, height / lines)
    block = rng.randint(min(needed, width), max(min(width, needed * 2), needed))
    left = sheet[0] + rng.randint(0, max(width - block, 0))
    spare = height - lines * pitch
    return _Style(
        font=font,
        pitch=pitch,
        left=left,
        right=left + block,
        top=sheet[1] + HEADER * pitch + rng.uniform(0, spare),
        ink=canvas.shade(rng, rng.randint(15, 70), 14),
        bold=bold,
        leaders=rng.random() < 0.35,
        ruled=rng.random() < 0.3,
    )


def _needed(rows: list[_Row], font: int, bold: bool) -> int:
    """The smallest width of the block of rows."""
    labels = max(canvas.width_of(row.label, font, bold) for row in rows)
    return labels + max(canvas.width_of(row.value, font, True) for row in rows) + font


def _extras(
    rng: random.Random, image: Image.Image, style: _Style, sheet: canvas.Pixels, rows: int
) -> None:
    """Prints a header above the rows and on some documents a note below them."""
    size = min(round(style.font * rng.uniform(1.1, 1.4)), round(style.pitch * 1.2))
    middle = (style.left + style.right) / 2
    top = style.top - style.pitch * 0.5
    canvas.write(image, (middle, top), rng.choice(HEADERS), size, style.ink, bold=True, align=0.5)
    low = style.top + (rows + 1) * style.pitch
    if low < sheet[3] and rng.random() < 0.6:
        note = max(style.font - 5, 11)
        canvas.write(image, (middle, low), rng.choice(NOTES), note, (120, 120, 122), align=0.5)


def _print(image: Image.Image, style: _Style, place: int, row: _Row) -> Thing:
    """Prints one row; its baseline is near the bottom of its share of the height."""
    base = style.top + (place + 0.75) * style.pitch
    bold = style.bold or row.kind == "total"
    label = canvas.write(
        image, (style.left, base), row.label, style.font, style.ink, bold=style.bold
    )
    value = canvas.write(
        image, (style.right, base), row.value, style.font, style.ink, bold=bold, align=1.0
    )
    lines = ImageDraw.Draw(image)
    if style.leaders:
        for x in range(label[2] + 6, value[0] - 4, 5):
            lines.point((x, round(base) - 1), style.ink)
    if style.ruled or row.kind == "total":
        y = round(base - 0.75 * style.pitch) + (0 if row.kind == "total" else round(style.pitch))
        lines.line((style.left, y, style.right, y), (150, 150, 152))
    boxes = tuple(canvas.normalised(box, image.size) for box in (label, value))
    whole = canvas.normalised(canvas.bounding_box([label, value], 2), image.size)
    return Thing(whole, row.kind, "", row.name, row.value, boxes, (row.label, row.value))


def make_questions(
    rng: random.Random, spec: DrawSpec, things: Sequence[Thing], per_kind: int
) -> list[Question]:
    """Questions of every kind that the document can answer."""
    rows = [thing for thing in things if thing.kind == "row"]
    totals = [thing for thing in things if thing.kind == "total"]
    prices = PHRASES["value"] + PHRASES["price"] * len(totals)
    questions = []
    for row in sample_up_to(rng, rows, per_kind):
        text, answer = rng.choice(prices).format(row.name), f"The {row.name} is {row.value}."
        questions.append(Question(text, answer, row.value, (row.box,), "value"))
    for row in sample_up_to(rng, rows, per_kind):
        text, answer = rng.choice(PHRASES["item"]), f"The {row.name} costs {row.value}."
        questions.append(Question(text.format(row.value), answer, row.name, (row.box,), "item"))
    for row in totals:
        text, answer = rng.choice(PHRASES["total"]), f"The total is {row.value}."
        questions.append(Question(text, answer, row.value, (row.box,), "total"))
    return questions
