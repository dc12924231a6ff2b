"""The figure: milliseconds against visual tokens."""

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from nanoglimpse.benchmark.measuring import say
from nanoglimpse.files import write_whole

PANELS = {"all prefill": "prefill of the decoder", "a token": "decode, a token"}
COLOURS = ["#1f4e9c", "#c0392b", "#e08e0b", "#2e8b57", "#7d3c98", "#111111", "#17a2b8", "#d63384"]
WIDTH, HEIGHT, MARGIN, LINE, TICKS = 500, 400, 24, 24, 4
FONT = 16


class Point(NamedTuple):
    """Visual tokens, milliseconds, and their ±."""

    x: float
    y: float
    spread: float


def plot(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Draws milliseconds of prefill and decode, a line for each contender and batch size."""
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for case in cases:
        for name, entry in case["arms"].items():
            label = name if case["batch"] == 1 else f"{name}, batch {case['batch']}"
            lines[label].append((case["visual_tokens"], entry))
    panels = {
        title: [
            [
                Point(x, e[stage]["ms"], e[stage]["ms_spread"] or 0)
                for x, e in sorted(points, key=_x)
            ]
            for points in lines.values()
        ]
        for stage, title in PANELS.items()
    }
    data = io.BytesIO()
    draw_figure(list(lines), panels).save(data, "PNG")
    write_whole(path, data.getvalue())
    say(f"wrote {path}\n")


def _x(point: tuple[int, dict[str, Any]]) -> int:
    return point[0]


def draw_figure(labels: Sequence[str], panels: dict[str, list[list[Point]]]) -> Image.Image:
    """Charts side by side above a legend; the image is as large as all of it needs.

    Args:
        labels: of the lines of every panel.
        panels: by title, the points of each line.
    """
    font = ImageFont.load_default(FONT)
    # Room for the numbers of the vertical axis, and for half of the last one of the other.
    numbers = [n for lines in panels.values() for top in _tops(lines) for n in _ticks(top)]
    room = round(max(map(font.getlength, numbers))) + MARGIN
    step = room + WIDTH + room // 2
    entry = round(max(map(font.getlength, labels))) + 32 + MARGIN
    columns = max((len(panels) * step - MARGIN) // entry, 1)
    rows, legend = -(-len(labels) // columns), MARGIN + 2 * LINE + HEIGHT + 3 * LINE
    width = max(len(panels) * step, entry + MARGIN) + MARGIN
    image = Image.new("RGB", (width, legend + rows * LINE + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.font = font
    for number, label in enumerate(labels):
        x, y = MARGIN + entry * (number % columns), legend + LINE * (number // columns)
        draw.line([x, y, x + 24, y], _colour(number), 3)
        draw.text((x + 32, y), label, _colour(number), anchor="lm")
    for number, (title, lines) in enumerate(panels.items()):
        _panel(draw, room + step * number, title, lines)
    return image


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _tops(lines: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """The ends of both axes, which begin at zero."""
    points = [point for line in lines for point in line]
    return max(p.x for p in points), 1.1 * max(p.y + p.spread for p in points)


def _ticks(top: float) -> list[str]:
    form = ".0f" if top > 40 else ".2f"
    return [f"{top * tick / TICKS:{form}}" for tick in range(TICKS + 1)]


def _panel(
    draw: ImageDraw.ImageDraw, left: int, title: str, lines: Sequence[Sequence[Point]]
) -> None:
    """Draws one chart."""
    (most_x, most_y), top = _tops(lines), MARGIN + 2 * LINE

    def place(x: float, y: float) -> tuple[float, float]:
        return left + WIDTH * x / most_x, top + HEIGHT * (1 - y / most_y)

    draw.text((left, MARGIN), f"{title}, ms", "black")
    middle = (left + WIDTH / 2, top + HEIGHT + LINE + 8)
    draw.text(middle, "visual tokens", "black", anchor="ma")
    for tick, (across, upward) in enumerate(zip(_ticks(most_x), _ticks(most_y), strict=True)):
        right, up = place(most_x * tick / TICKS, most_y * tick / TICKS)
        draw.line([(left, up), (left + WIDTH, up)], "#dddddd")
        draw.text((left - 8, up), upward, "black", anchor="rm")
        draw.text((right, top + HEIGHT + 8), across, "black", anchor="ma")
    for number, line in enumerate(lines):
        spots = [place(x, y) for x, y, _ in line]
        draw.line(spots, _colour(number), 3)
        for (x, y), point in zip(spots, line, strict=True):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], _colour(number))
            ends = [place(point.x, point.y + s * point.spread) for s in (-1, 1)]
            draw.line(ends, _colour(number), 1)
    draw.rectangle([left, top, left + WIDTH, top + HEIGHT], outline="black")
