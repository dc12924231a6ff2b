"""The figure: milliseconds against visual tokens."""

import io
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nanoglimpse.benchmark.measuring import say
from nanoglimpse.files import write_whole

PANELS = {"all prefill": "prefill of the decoder", "a token": "decode, a token"}
COLOURS = ["#1f4e9c", "#c0392b", "#e08e0b", "#2e8b57", "#7d3c98", "#111111", "#17a2b8", "#d63384"]


def plot(path: Path, cases: list[dict]) -> None:
    """Milliseconds of prefill and decode against visual tokens, a line for each arm and batch."""
    lines = defaultdict(list)
    for case in cases:
        for name, arm in case["arms"].items():
            if "kv_rows" in arm:
                label = name if case["batch"] == 1 else f"{name}, batch {case['batch']}"
                lines[label].append((case["visual_tokens"], arm))
    image = Image.new("RGB", (1280, 570 + 24 * -(-len(lines) // 4)), "white")
    draw = ImageDraw.Draw(image)
    for number, label in enumerate(lines):
        x, y, colour = 90 + 290 * (number % 4), 546 + 24 * (number // 4), _colour(number)
        draw.line([x, y, x + 24, y], fill=colour, width=3)
        draw.text((x + 32, y), label, fill=colour, font=ImageFont.load_default(16), anchor="lm")
    for number, (stage, title) in enumerate(PANELS.items()):
        panel(draw, 90 + 640 * number, title, stage, lines)
    data = io.BytesIO()
    image.save(data, "PNG")
    write_whole(path, data.getvalue())
    say(f"wrote {path}\n")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def panel(draw: ImageDraw.ImageDraw, left: int, title: str, stage: str, lines: dict) -> None:
    """One chart, axes from zero."""
    font, top, width, height = ImageFont.load_default(16), 60, 500, 400
    most_x = max(x for points in lines.values() for x, _ in points)
    most_y = 1.1 * max(arm[stage]["ms"] for points in lines.values() for _, arm in points)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * x / most_x, top + height * (1 - y / most_y)

    draw.text((left, top - 40), f"{title}, ms", fill="black", font=font)
    for tick in range(5):
        x, y = most_x * tick / 4, most_y * tick / 4
        draw.line([place(0, y), place(most_x, y)], fill="#dddddd")
        draw.text(
            place(0, y),
            f"{y:.0f} " if most_y > 40 else f"{y:.2f} ",
            fill="black",
            font=font,
            anchor="rm",
        )
        draw.text(
            (place(x, 0)[0], top + height + 8), f"{x:.0f}", fill="black", font=font, anchor="ma"
        )
    draw.text(
        (left + width / 2, top + height + 32), "visual tokens", fill="black", font=font, anchor="ma"
    )
    for number, points in enumerate(lines.values()):
        colour = _colour(number)
        spots = [place(x, arm[stage]["ms"]) for x, arm in points]
        draw.line(spots, fill=colour, width=3)
        for x, y in spots:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
    draw.rectangle([left, top, left + width, top + height], outline="black")
