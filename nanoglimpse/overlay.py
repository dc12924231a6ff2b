"""A picture of what was kept: for every image the kept cells beside the importance of all cells."""

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .config import Config
from .errors import UsageError
from .files import write_whole
from .processor import Picture, load_picture
from .results import Answer

PANEL, TITLE, MARGIN, LINE, BAR = 480, 200, 16, 20, 14
INK, PAPER, DIM = (32, 32, 36), (255, 255, 255), 0.3
# From "not needed" to "needed": dark blue, violet, red, orange, pale yellow.
STOPS = ((13, 8, 80), (126, 3, 168), (204, 71, 120), (248, 149, 64), (252, 253, 191))


def save_overlay(
    path: Path, images: Sequence[Picture], question: str, answer: Answer, config: Config
) -> None:
    """Writes the overlay as PNG, whole or not at all.

    Args:
        path: where to.
        images: the pictures that were asked about.
        question: what was asked.
        answer: the answer, with kept tokens and importance.
        config: of the model.

    Raises:
        NanoglimpseError: the file cannot be written.
    """
    data = io.BytesIO()
    draw_overlay(images, question, answer, config).save(data, "PNG")
    write_whole(path, data.getvalue())


def check_writable(path: Path) -> None:
    """Refuses a path where no overlay can be written.

    Raises:
        UsageError: it is a folder, there is none to write in, or that is read-only.
    """
    if path.is_dir():
        raise UsageError(f"the overlay cannot be written: {path} is a folder")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the overlay cannot be written: there is no folder {path.parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"the overlay cannot be written: {path.absolute().parent} is read-only")


def draw_overlay(
    images: Sequence[Picture], question: str, answer: Answer, config: Config
) -> Image.Image:
    """Panels one below the other, question and answer beneath; arguments as `save_overlay`."""
    merge, first, rows = config.vision_config.spatial_merge_size, 0, []
    for picture, grid in zip(images, answer.grids, strict=True):
        size = (grid[1] // merge, grid[2] // merge)
        own = slice(first, first + size[0] * size[1])
        scores = None if answer.importance is None else answer.importance[own].float().sigmoid()
        rows.append(_panels(load_picture(picture), size, answer.kept[own], scores))
        first = own.stop
    width = max([row.width for row in rows], default=2 * PANEL)
    rows.append(_caption(question, answer, width))
    sheet = Image.new(
        "RGB",
        (width + 2 * MARGIN, sum(row.height + MARGIN for row in rows) + MARGIN),
        PAPER,
    )
    y = MARGIN
    for row in rows:
        sheet.paste(row, (MARGIN, y))
        y += row.height + MARGIN
    return sheet


def _panels(
    picture: Image.Image, size: tuple[int, int], kept: Tensor, scores: Tensor | None
) -> Image.Image:
    """Kept cells of one picture, and beside them the importance where there is one."""
    rows, columns = size
    cell = max(4, PANEL // max(rows, columns))
    picture = picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    left = Image.composite(
        picture,
        Image.blend(
            Image.new("RGB", picture.size, PAPER), picture.convert("L").convert("RGB"), DIM
        ),
        _cells(255 * kept.int(), size, cell),
    )
    _outline(left, kept.view(size), cell)
    titles = [f"kept {int(kept.sum())} of {len(kept)} visual tokens"]
    panels = [left]
    if scores is not None:
        heat = _cells((255 * scores).round().int(), size, cell)
        panels.append(Image.blend(picture.convert("L").convert("RGB"), _colours(heat), 0.65))
        titles.append("importance")
    step = max(picture.width, TITLE) + MARGIN
    bar = 0 if scores is None else BAR + 2 * MARGIN
    width = max(step * len(panels) + bar, PANEL)
    height = max(picture.height, 3 * LINE)
    sheet = Image.new("RGB", (width, height + LINE + 4), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        draw.text((number * step, 0), title, INK, font=_font(14))
        sheet.paste(panel, (number * step, LINE + 4))
    if scores is not None:
        _scale(sheet, step + picture.width + MARGIN, LINE + 4, height)
    return sheet


def _cells(values: Tensor, size: tuple[int, int], cell: int) -> Image.Image:
    """Values 0…255 of the cells of a grid as a grey image, every cell a square."""
    rows, columns = size
    image = Image.frombytes("L", (columns, rows), bytes(values.tolist()))
    return image.resize((columns * cell, rows * cell), Image.Resampling.NEAREST)


def _outline(image: Image.Image, kept: Tensor, cell: int) -> None:
    """Lines where kept and dropped cells meet."""
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
    steps = len(STOPS) - 1
    table: list[list[int]] = [[], [], []]
    for value in range(256):
        place = value / 255 * steps
        index = min(int(place), steps - 1)
        for channel, (low, high) in enumerate(zip(STOPS[index], STOPS[index + 1], strict=True)):
            table[channel].append(round(low + (high - low) * (place - index)))
    return Image.merge("RGB", [grey.point(channel) for channel in table])


def _scale(sheet: Image.Image, x: int, y: int, height: int) -> None:
    """The colours' meaning: probability of being needed, 0 below, 1 above."""
    ramp = Image.linear_gradient("L").transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    sheet.paste(_colours(ramp.resize((BAR, height))), (x, y))
    draw = ImageDraw.Draw(sheet)
    draw.text((x + BAR + 4, y), "1", INK, font=_font(12))
    draw.text((x + BAR + 4, y + height - 14), "0", INK, font=_font(12))


def _caption(question: str, answer: Answer, width: int) -> Image.Image:
    lines = []
    for mark, text in (("Q  ", question), ("A  ", answer.text)):
        wrapped = [
            line
            for paragraph in text.splitlines() or [""]
            for line in textwrap.wrap(paragraph, max(16, width // 9)) or [""]
        ]
        lines += [mark + wrapped[0], *("    " + line for line in wrapped[1:])]
    sheet = Image.new("RGB", (width, LINE * len(lines)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((0, number * LINE), line, INK, font=_font(16))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
