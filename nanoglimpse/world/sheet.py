"""A contact sheet: small pictures above lines of text, with boxes in the colour of their line."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from nanoglimpse.world.types import Box

COLUMNS, LINES = 4, 4
THUMB, MARGIN, LINE, WRAP = 340, 12, 15, 54
OUTLINES = ((230, 0, 120), (0, 160, 160), (200, 110, 0), (60, 60, 230))

Card = tuple[Image.Image, Sequence[tuple[str, Sequence[Box]]]]


def contact_sheet(cards: Sequence[Card]) -> Image.Image:
    """Draws pictures in rows; of each the first LINES lines, with their boxes as shares."""
    drawn = [_drawn(*card) for card in cards]
    columns = min(COLUMNS, len(drawn))
    rows = [drawn[at : at + columns] for at in range(0, len(drawn), columns)]
    heights = [max(card.height for card in row) + MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * (THUMB + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            sheet.paste(card, (MARGIN + column * (THUMB + MARGIN), y))
        y += height
    return sheet


def _drawn(image: Image.Image, texts: Sequence[tuple[str, Sequence[Box]]]) -> Image.Image:
    """One picture of the sheet."""
    texts = texts[:LINES]
    scale = THUMB / max(image.size)
    size = [max(round(side * scale), 1) for side in image.size]
    thumb = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    lines = [
        (line, colour)
        for (text, _), colour in zip(texts, OUTLINES, strict=False)
        for line in textwrap.wrap(text, WRAP)
    ]
    card = Image.new("RGB", (THUMB, thumb.height + 4 + LINE * len(lines)), "white")
    card.paste(thumb)
    draw = ImageDraw.Draw(card)
    for (_, boxes), colour in zip(texts, OUTLINES, strict=False):
        for box in boxes:
            draw.rectangle([at * size[axis % 2] for axis, at in enumerate(box)], None, colour, 2)
    for number, (line, colour) in enumerate(lines):
        font = ImageFont.load_default(12)
        draw.text((0, thumb.height + 4 + number * LINE), line, colour, font)
    return card


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
