"""A picture of what was kept: for every image the kept cells beside the importance of all cells.

A video is a contact sheet, a panel for each pair of frames, or an animation.
"""

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from nanoglimpse.config import Config
from nanoglimpse.files import write_whole
from nanoglimpse.inference.outputs import Answer
from nanoglimpse.inputs.images import load_picture
from nanoglimpse.inputs.video import Video, Visual

PANEL, TITLE, MARGIN, LINE, BAR = 480, 200, 16, 20, 14
INK, PAPER, DIM = (32, 32, 36), (255, 255, 255), 0.3
# Formats that move, and how long an image is shown there, in milliseconds.
ANIMATED, STILL = {".gif": "GIF", ".webp": "WEBP"}, 2000
# From "not needed" to "needed": dark blue, violet, red, orange, pale yellow.
STOPS = ((13, 8, 80), (126, 3, 168), (204, 71, 120), (248, 149, 64), (252, 253, 191))


def save_overlay(
    path: Path, images: Sequence[Visual], question: str, answer: Answer, config: Config
) -> None:
    """Writes the overlay as PNG, or as an animation to a .gif or .webp, whole or not at all.

    Args:
        path: where to.
        images: the pictures and videos that were asked about.
        question: what was asked.
        answer: the answer, with kept tokens and importance.
        config: of the model.

    Raises:
        NanoglimpseError: the file cannot be written.
    """
    data = io.BytesIO()
    shown = images, question, answer, config
    if path.suffix.lower() in ANIMATED:
        first, *others = sheets = draw_animation(*shown)
        first.save(
            data,
            ANIMATED[path.suffix.lower()],
            save_all=True,
            append_images=others,
            duration=[sheet.info["duration"] for sheet in sheets],
            loop=0,
        )
    else:
        draw_overlay(*shown).save(data, "PNG")
    write_whole(path, data.getvalue())


def draw_overlay(
    images: Sequence[Visual], question: str, answer: Answer, config: Config
) -> Image.Image:
    """Panels one below the other, question and answer beneath; arguments as `save_overlay`."""
    rows = []
    for visual, stills in zip(images, _stills(images, answer, config), strict=True):
        if isinstance(visual, Video):
            panels = [_panels(*still.cells, PANEL // 2, f"{still.at:.1f} s: ") for still in stills]
            rows += [_beside(panels[i : i + 2]) for i in range(0, len(panels), 2)]
        else:
            rows += [_panels(*still.cells) for still in stills]
    width = max([row.width for row in rows], default=2 * PANEL)
    return _stack([*rows, _caption(question, answer, width)])


def draw_animation(
    images: Sequence[Visual], question: str, answer: Answer, config: Config
) -> list[Image.Image]:
    """Sheets of one size, each with its `info["duration"]` in ms; arguments as `save_overlay`."""
    stacks: list[list[Image.Image]] = []
    durations = []
    for stills in _stills(images, answer, config):
        for still in stills:
            panels = _panels(*still.cells, label=f"{still.at:.1f} s: " if len(stills) > 1 else "")
            stacks.append([panels, _caption(question, answer, panels.width)])
            durations.append(still.milliseconds)
    sheets = [_stack(stack) for stack in stacks] or [draw_overlay([], question, answer, config)]
    size = (max(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets))
    whole = [ImageOps.pad(sheet, size, color=PAPER, centering=(0, 0)) for sheet in sheets]
    for sheet, duration in zip(whole, durations or [STILL], strict=True):
        sheet.info["duration"] = duration
    return whole


@dataclass(frozen=True)
class Still:
    """An image, or the first of a pair of frames, and what was kept of it.

    Attributes:
        cells: picture, (rows, columns), kept [N], and probabilities [N] where there are any.
        at: second of the clip.
        milliseconds: that it is shown.
    """

    cells: tuple[Image.Image, tuple[int, int], Tensor, Tensor | None]
    at: float
    milliseconds: int


def _stills(images: Sequence[Visual], answer: Answer, config: Config) -> Iterator[list[Still]]:
    """The stills of each picture or video."""
    merge, first = config.vision_config.spatial_merge_size, 0
    for visual, grid in zip(images, answer.grids, strict=True):
        size, seconds = (grid[1] // merge, grid[2] // merge), STILL / 1000
        if isinstance(visual, Video):
            frames, rate = visual.frames(lambda frame, _: ImageOps.contain(frame, (PANEL, PANEL)))
            pictures, seconds = frames[::2], 2 / rate
        else:
            pictures = [load_picture(visual)]
        stills = []
        for number, picture in enumerate(pictures):
            own = slice(first, first + size[0] * size[1])
            scores = None if answer.importance is None else answer.importance[own].float().sigmoid()
            cells = (picture, size, answer.kept[own], scores)
            stills.append(Still(cells, number * seconds, round(1000 * seconds)))
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


def _panels(
    picture: Image.Image,
    size: tuple[int, int],
    kept: Tensor,
    scores: Tensor | None,
    panel: int = PANEL,
    label: str = "",
) -> Image.Image:
    """Kept cells of one picture, and beside them the importance where there is one."""
    rows, columns = size
    cell = max(4, panel // max(rows, columns))
    picture = picture.resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)
    left = Image.composite(
        picture,
        Image.blend(
            Image.new("RGB", picture.size, PAPER), picture.convert("L").convert("RGB"), DIM
        ),
        _cells(255 * kept.int(), size, cell),
    )
    _outline(left, kept.view(size), cell)
    titles = [f"{label}kept {int(kept.sum())} of {len(kept)} visual tokens"]
    panels = [left]
    if scores is not None:
        heat = _cells((255 * scores).round().int(), size, cell)
        panels.append(Image.blend(picture.convert("L").convert("RGB"), _colours(heat), 0.65))
        titles.append("importance")
    step = max(picture.width, TITLE) + MARGIN
    bar = 0 if scores is None else BAR + 2 * MARGIN
    width = max(step * len(panels) + bar, panel)
    height = max(picture.height, 3 * LINE)
    sheet = Image.new("RGB", (width, height + LINE + 4), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (shown, title) in enumerate(zip(panels, titles, strict=True)):
        draw.text((number * step, 0), title, INK, font=_font(14))
        sheet.paste(shown, (number * step, LINE + 4))
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
