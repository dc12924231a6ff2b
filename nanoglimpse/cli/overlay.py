"""Pictures of what a method kept: the kept cells of each image, and the importance of all cells.

A video becomes a contact sheet, with panels for each pair of frames, or an animation.
"""

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from nanoglimpse.config import Config
from nanoglimpse.files import write_whole
from nanoglimpse.inference.outputs import Answer
from nanoglimpse.inputs.processor import as_visuals
from nanoglimpse.pictures.fonts import Font, find_font
from nanoglimpse.pictures.picture import load_picture
from nanoglimpse.pictures.video import Video, Visual

PANEL, TITLE, MARGIN, LINE, BAR = 480, 200, 16, 20, 14
# Of the question and the answer: size, and place of the text beside its mark.
TEXT, INDENT = 16, 20
INK, PAPER, DIM = (32, 32, 36), (255, 255, 255), 0.3
# Animated formats by file suffix, and the milliseconds for which an animation shows an image.
ANIMATED, STILL = {".gif": "GIF", ".webp": "WEBP"}, 2000
# The colour scale from probability 0 to 1: dark blue, violet, red, orange, pale yellow.
STOPS = ((13, 8, 80), (126, 3, 168), (204, 71, 120), (248, 149, 64), (252, 253, 191))


def save_overlay(
    path: Path,
    images: Sequence[Visual],
    question: str,
    answer: Answer,
    config: Config,
    font: Path | None = None,
) -> str:
    """Writes the overlay, as an animation if `path` ends in .gif or .webp and as PNG otherwise.

    The file is written completely or not at all.

    Args:
        path: the file to write.
        images: the pictures and videos of the prompt.
        question: the question about them.
        answer: the answer, with the kept tokens and their importance.
        config: configuration of the model.
        font: font of the question and the answer; one that has their letters is found if None.

    Returns:
        What had to be left out, for want of a font that has its letters; "" if nothing.

    Raises:
        NanoglimpseError: the file cannot be written.
        UsageError: `font` is no font.
    """
    data = io.BytesIO()
    shown = images, question, answer, config, font
    if kind := ANIMATED.get(path.suffix.lower()):
        (first, *others), durations = draw_animation(*shown)
        first.save(data, kind, save_all=True, append_images=others, duration=durations, loop=0)
    else:
        draw_overlay(*shown).save(data, "PNG")
    write_whole(path, data.getvalue())
    texts = {"the question": question, "the answer": answer.text}
    lacking = [name for name, text in texts.items() if find_font(text, TEXT, font) is None]
    return " and ".join(lacking)


def draw_overlay(
    images: Sequence[Visual],
    question: str,
    answer: Answer,
    config: Config,
    font: Path | None = None,
) -> Image.Image:
    """Rows of panels with the question and the answer below; arguments as `save_overlay`."""
    rows = []
    visuals = as_visuals(images)
    for visual, stills in zip(visuals, _stills(visuals, answer, config), strict=True):
        if isinstance(visual, Video):
            panels = [_panels(still, PANEL // 2, f"{still.seconds:.1f} s: ") for still in stills]
            rows += [_beside(panels[i : i + 2]) for i in range(0, len(panels), 2)]
        else:
            rows += [_panels(still) for still in stills]
    width = max([row.width for row in rows], default=2 * PANEL)
    return _stack([*rows, _caption(question, answer, width, font)])


def draw_animation(
    images: Sequence[Visual],
    question: str,
    answer: Answer,
    config: Config,
    font: Path | None = None,
) -> tuple[list[Image.Image], list[int]]:
    """Sheets of one size, and the milliseconds to show each; arguments as `save_overlay`."""
    sheets, durations = [], []
    for stills in _stills(images, answer, config):
        for still in stills:
            panels = _panels(still, label=f"{still.seconds:.1f} s: " if len(stills) > 1 else "")
            sheets.append(_stack([panels, _caption(question, answer, panels.width, font)]))
            durations.append(still.milliseconds)
    if not sheets:
        return [draw_overlay([], question, answer, config, font)], [STILL]
    size = (max(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets))
    return [ImageOps.pad(s, size, color=PAPER, centering=(0, 0)) for s in sheets], durations


class Still(NamedTuple):
    """An image, or the first frame of a pair, and what was kept of it.

    Attributes:
        picture: the image.
        kept: bool [rows, columns], the cells whose visual tokens were kept.
        scores: probabilities [rows, columns] of the cells; None if the method gives none.
        seconds: position in the clip.
        milliseconds: for how long an animation shows it.
    """

    picture: Image.Image
    kept: Tensor
    scores: Tensor | None
    seconds: float
    milliseconds: int


def _stills(images: Sequence[Visual], answer: Answer, config: Config) -> Iterator[list[Still]]:
    """The stills of each picture or video."""
    merge, first = config.vision_config.spatial_merge_size, 0
    for visual, (_, height, width) in zip(as_visuals(images), answer.grids, strict=True):
        shape, interval = (height // merge, width // merge), STILL / 1000
        if isinstance(visual, Video):
            frames, rate = visual.frames(lambda frame, _: ImageOps.contain(frame, (PANEL, PANEL)))
            pictures, interval = frames[::2], 2 / rate
        else:
            pictures = [load_picture(visual)]
        stills = []
        for number, picture in enumerate(pictures):
            own = slice(first, first + math.prod(shape))
            kept, scores = answer.kept[own].view(shape), None
            if answer.importance is not None:
                scores = answer.importance[own].float().sigmoid().view(shape)
            place = (number * interval, round(1000 * interval))
            stills.append(Still(picture, kept, scores, *place))
            first = own.stop
        yield stills


def _beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels of one size in a row."""
    step = panels[0].width + MARGIN
    row = Image.new("RGB", (step * len(panels), panels[0].height), PAPER)
    for number, panel in enumerate(panels):
        row.paste(panel, (number * step, 0))
    return row


def _stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows one below the other on a sheet with margins."""
    width = max(row.width for row in rows)
    height = sum(row.height + MARGIN for row in rows) + MARGIN
    sheet, y = Image.new("RGB", (width + 2 * MARGIN, height), PAPER), MARGIN
    for row in rows:
        sheet.paste(row, (MARGIN, y))
        y += row.height + MARGIN
    return sheet


def _panels(still: Still, size: int = PANEL, label: str = "") -> Image.Image:
    """The kept cells of a still beside their importance, if there is any."""
    rows, columns = still.kept.shape
    cell = max(4, size // max(rows, columns))
    picture = still.picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    grey = picture.convert("L").convert("RGB")
    faded = Image.blend(Image.new("RGB", picture.size, PAPER), grey, DIM)
    shown = Image.composite(picture, faded, _cells(255 * still.kept.int(), cell))
    _outline(shown, still.kept, cell)
    panels = {f"{label}kept {int(still.kept.sum())} of {rows * columns} visual tokens": shown}
    bar = 0
    if still.scores is not None:
        heat = _colours(_cells((255 * still.scores).round().int(), cell))
        panels["importance"] = Image.blend(grey, heat, 0.65)
        bar = BAR + 2 * MARGIN
    step, height = max(picture.width, TITLE) + MARGIN, max(picture.height, 3 * LINE)
    width = max(step * len(panels) + bar, size)
    sheet = Image.new("RGB", (width, height + LINE + 4), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (title, panel) in enumerate(panels.items()):
        draw.text((number * step, 0), title, INK, font=_font(14))
        sheet.paste(panel, (number * step, LINE + 4))
    if bar:
        _scale(sheet, step + picture.width + MARGIN, LINE + 4, height)
    return sheet


def _cells(values: Tensor, cell: int) -> Image.Image:
    """Values from 0 to 255 [rows, columns] as a grey image of squares with side `cell`."""
    rows, columns = values.shape
    image = Image.frombytes("L", (columns, rows), bytes(values.flatten().tolist()))
    return image.resize((columns * cell, rows * cell), Image.Resampling.NEAREST)


def _outline(image: Image.Image, kept: Tensor, cell: int) -> None:
    """Draws a line around the kept cells."""
    draw = ImageDraw.Draw(image)
    rows, columns = kept.shape
    for row, column in kept.nonzero().tolist():
        x, y = column * cell, row * cell
        if row == 0 or not kept[row - 1, column]:
            draw.line((x, y, x + cell, y), STOPS[2], 2)
        if row == rows - 1 or not kept[row + 1, column]:
            draw.line((x, y + cell - 1, x + cell, y + cell - 1), STOPS[2], 2)
        if column == 0 or not kept[row, column - 1]:
            draw.line((x, y, x, y + cell), STOPS[2], 2)
        if column == columns - 1 or not kept[row, column + 1]:
            draw.line((x + cell - 1, y, x + cell - 1, y + cell), STOPS[2], 2)


def _colours(grey: Image.Image) -> Image.Image:
    """A grey image in the colours of STOPS."""
    stops = torch.tensor(STOPS, dtype=torch.float64).T[None]
    channels = F.interpolate(stops, 256, mode="linear", align_corners=True)[0].round().int()
    return Image.merge("RGB", [grey.point(channel) for channel in channels.tolist()])


def _scale(sheet: Image.Image, x: int, y: int, height: int) -> None:
    """Draws the colour scale, from 0 at the bottom to 1 at the top."""
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    sheet.paste(_colours(ramp.resize((BAR, height))), (x, y))
    draw = ImageDraw.Draw(sheet)
    draw.text((x + BAR + 4, y), "1", INK, font=_font(12))
    draw.text((x + BAR + 4, y + height - 14), "0", INK, font=_font(12))


def _caption(question: str, answer: Answer, width: int, font: Path | None) -> Image.Image:
    """The question and the answer; one for whose letters there is no font is left out."""
    lines: list[tuple[str, str, Font]] = []
    for mark, text in (("Q", question), ("A", answer.text)):
        if (face := find_font(text, TEXT, font)) is None:
            continue
        # The widest letter decides, but the average one does for Latin letters.
        widest = max((face.getlength(letter) for letter in set(text)), default=0)
        columns = max(16, int(width // (9 if text.isascii() else max(widest, 9))))
        wrapped: list[str] = []
        for paragraph in text.splitlines() or [""]:
            wrapped += textwrap.wrap(paragraph, columns) or [""]
        lines += [(mark, wrapped[0], face), *(("", line, face) for line in wrapped[1:])]
    sheet = Image.new("RGB", (width, LINE * len(lines)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (mark, line, face) in enumerate(lines):
        draw.text((0, number * LINE), mark, INK, font=_font(TEXT))
        draw.text((INDENT, number * LINE), line, INK, font=face)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
