"""The figure: milliseconds against visual tokens."""

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from nanoglimpse.benchmark.measuring import say
from nanoglimpse.files import write_whole

PANELS = {"all prefill": "prefill of the decoder", "a token": "decode, a token"}
COLOURS = ["#1f4e9c", "#c0392b", "#e08e0b", "#2e8b57", "#7d3c98", "#111111", "#17a2b8", "#d63384"]
TOP, WIDTH, HEIGHT = 60, 500, 400


def plot(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Draws milliseconds of prefill and decode, a line for each contender and batch size."""
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for case in cases:
        for name, entry in case["arms"].items():
            if "kv_rows" in entry:
                label = name if case["batch"] == 1 else f"{name}, batch {case['batch']}"
                lines[label].append((case["visual_tokens"], entry))
    image = Image.new("RGB", (1280, 570 + 24 * -(-len(lines) // 4)), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(16)
    for number, label in enumerate(lines):
        x, y, colour = 90 + 290 * (number % 4), 546 + 24 * (number // 4), _colour(number)
        draw.line([x, y, x + 24, y], colour, 3)
        draw.text((x + 32, y), label, colour, anchor="lm")
    for number, (stage, title) in enumerate(PANELS.items()):
        series = [[(x, entry[stage]["ms"]) for x, entry in points] for points in lines.values()]
        _panel(draw, 90 + 640 * number, title, series)
    data = io.BytesIO()
    image.save(data, "PNG")
    write_whole(path, data.getvalue())
    say(f"wrote {path}\n")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _panel(
    draw: ImageDraw.ImageDraw, left: int, title: str, series: Sequence[list[tuple[int, float]]]
) -> None:
    """Draws one chart, whose axes start at zero."""
    most_x = max(x for points in series for x, _ in points)
    most_y = 1.1 * max(y for points in series for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + WIDTH * x / most_x, TOP + HEIGHT * (1 - y / most_y)

    draw.text((left, TOP - 40), f"{title}, ms", "black")
    draw.text((left + WIDTH / 2, TOP + HEIGHT + 32), "visual tokens", "black", anchor="ma")
    for tick in range(5):
        x, y = most_x * tick / 4, most_y * tick / 4
        draw.line([place(0, y), place(most_x, y)], "#dddddd")
        draw.text(place(0, y), f"{y:.0f} " if most_y > 40 else f"{y:.2f} ", "black", anchor="rm")
        draw.text((place(x, 0)[0], TOP + HEIGHT + 8), f"{x:.0f}", "black", anchor="ma")
    for number, points in enumerate(series):
        spots = [place(x, y) for x, y in points]
        draw.line(spots, _colour(number), 3)
        for x, y in spots:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], _colour(number))
    draw.rectangle([left, TOP, left + WIDTH, TOP + HEIGHT], outline="black")
