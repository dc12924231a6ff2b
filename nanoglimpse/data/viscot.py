"""Files of grounded questions, in the plain layout and in the two layouts of VisCoT.

- plain, .jsonl: image, question, answer and boxes (shares of width and height of the picture as it
  is seen); optionally short, which is part of the answer.
- VisCoT's `*_cot_train.jsonl`: image, question, answer and bboxs (in pixels), with width and height
  of the picture that the pixels are those of.
- VisCoT's benchmark, .json: conversations, with one box in pixels beside the name of the picture.

Any of them may name the data set (dataset or domain), the kind and the question_id of a question.
An answer may be a list of answers that are all right. Boxes are optional.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from nanoglimpse.config import PixelConfig
from nanoglimpse.data.qa import QA
from nanoglimpse.errors import UsageError
from nanoglimpse.inputs.images import smart_resize
from nanoglimpse.jsonl import read_rows
from nanoglimpse.jsontext import parse_json
from nanoglimpse.pictures.picture import orientation, source
from nanoglimpse.world.types import REQUEST, Box

Size = tuple[float, float]
# Where a point of the stored picture is seen, in shares.
TURNS: dict[Image.Transpose | None, Callable[[float, float], Size]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda x, y: (1 - x, y),
    Image.Transpose.ROTATE_180: lambda x, y: (1 - x, 1 - y),
    Image.Transpose.FLIP_TOP_BOTTOM: lambda x, y: (x, 1 - y),
    Image.Transpose.TRANSPOSE: lambda x, y: (y, x),
    Image.Transpose.ROTATE_270: lambda x, y: (1 - y, x),
    Image.Transpose.TRANSVERSE: lambda x, y: (1 - y, 1 - x),
    Image.Transpose.ROTATE_90: lambda x, y: (y, 1 - x),
}
# No share is larger; what is, has another unit.
LARGEST_SHARE, LARGEST = 2.0, 1e9


@dataclass(frozen=True)
class Row:
    """A question of a file.

    Attributes:
        name: the file and the question's id or number there.
        group: the data set or domain, else the name of the file.
        kind: the kind of question, "" if the file does not name it.
        picture: the file of the picture, which may be missing.
        qa: the question. Its boxes are as the file has them, before `opened` turns and clips them.
        has_boxes: whether the file has boxes for the question, if only an empty list.
        size: width and height that the boxes in pixels refer to; None for shares.
        pixel_boxes: the evidence in pixels, if the file does not give the size of the picture.
    """

    name: str
    group: str
    kind: str
    picture: Path
    qa: QA
    has_boxes: bool = True
    size: Size | None = None
    pixel_boxes: tuple[Box, ...] = ()

    def opened(self) -> "Opened":
        """The picture as it is seen, and the evidence in it.

        Raises:
            UsageError: the file is missing, no picture, too thin, or has another shape than the
                row says.
            NanoglimpseError: the file is damaged.
        """
        image, stored, turned = _seen(self.picture)
        turn = TURNS.get(turned)
        boxes, as_stored = self.qa.boxes, False
        if self.size and not _have_one_shape(self.size, image.size):
            as_stored = _have_one_shape(self.size, stored)
            if not as_stored:
                wide, high = self.size
                raise UsageError(
                    f"{self.name}: its boxes are those of a picture of {wide:g} × {high:g} px, but "
                    f"{self.picture} has {image.width} × {image.height} px"
                )
        if self.pixel_boxes:
            as_stored = not _within(self.pixel_boxes, image.size)
            as_stored = as_stored and _within(self.pixel_boxes, stored)
            boxes = _shares(self.pixel_boxes, stored if as_stored else image.size)
        if as_stored and turn:
            boxes = tuple(_turned(box, turn) for box in boxes)
        seen = tuple(_clipped(box) for box in boxes if _is_inside(box))
        return Opened(image, seen, len(boxes) > 0 and not seen)


@dataclass(frozen=True)
class Opened:
    """The picture of a row.

    Attributes:
        image: RGB, turned as its EXIF data say.
        boxes: the evidence, as shares of width and height.
        outside: whether the row has boxes, but all of them are outside the picture.
    """

    image: Image.Image
    boxes: tuple[Box, ...]
    outside: bool


@dataclass(frozen=True)
class RowFile:
    """The questions of a file.

    Attributes:
        rows: the questions, in order; no two have one name.
        refused: a line for each row that is no question, and why.
    """

    rows: list[Row]
    refused: list[str]

    def checked(self) -> list[Row]:
        """The rows.

        Raises:
            UsageError: a row was refused; it says which and how many more.
        """
        if self.refused:
            more = len(self.refused) - 1
            raise UsageError(self.refused[0] + (f"; {more} more rows are wrong" if more else ""))
        return self.rows


def read_questions(path: Path, pictures: Path, prefix: str = "") -> RowFile:
    """Reads a file in any of the layouts; .json stands for VisCoT's benchmark.

    Args:
        path: the file.
        pictures: the folder of its pictures.
        prefix: begins the names of its questions, in place of the name of the file.

    Raises:
        UsageError: the file cannot be read.
    """
    benchmark = path.suffix == ".json"
    entries = _entries(path) if benchmark else read_rows(path)
    make, unit = (_benchmark_row, "entry") if benchmark else (_row, "line")
    rows, refused = [], []
    for number, entry in entries:
        where = f"{path}, {unit} {number},"
        try:
            row = make(entry, number, path, pictures)
            rows.append((number, replace(row, name=f"{prefix or path.stem} {row.name}")))
        except KeyError as error:
            refused.append(f"{where} has no key {error}")
        except (ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
            kind = "a question of the benchmark" if benchmark else "a question with evidence"
            refused.append(f"{where} is not {kind}: {error}")
    return RowFile(list(_named(rows)), refused)


def _named(rows: Sequence[tuple[int, Row]]) -> Iterator[Row]:
    """Adds what tells rows of one name apart: their data set, and else their number."""
    names = Counter(row.name for _, row in rows)
    full = Counter((row.name, row.group) for _, row in rows)
    for number, row in rows:
        name = row.name
        if names[name] > 1:
            name += f" of {row.group}"
        if full[row.name, row.group] > 1:
            name += f" ({number})"
        yield replace(row, name=name)


def _entries(path: Path) -> list[tuple[int, Any]]:
    try:
        entries = parse_json(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise UsageError(f"{path} must hold a list of questions, got a {kind}")
    return list(enumerate(entries))


def _row(row: Any, number: int, path: Path, pictures: Path) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {_short(row)}")
    answers = _answers(row, "answer")
    shorts = answers
    if "short" in row:
        shorts = _answers(row, "short")
        shorts += answers[1:] if len(shorts) == 1 else ()
    boxes, size, loose = _evidence(row)
    return Row(
        name=str(row.get("question_id", number)),
        group=str(row.get("dataset") or row.get("domain") or path.stem),
        kind=str(row.get("kind", "")),
        picture=pictures / _text(row, "image"),
        qa=QA(_text(row, "question"), answers[0], shorts[0], boxes, answers, shorts),
        has_boxes=bool({"boxes", "bboxs"} & row.keys()),
        size=size,
        pixel_boxes=loose,
    )


def _evidence(row: dict) -> tuple[tuple[Box, ...], Size | None, tuple[Box, ...]]:
    """Boxes as shares, the size that those in pixels refer to, and boxes in pixels of no size."""
    if "boxes" in row or "bboxs" not in row:
        boxes = _boxes(row.get("boxes", []), "boxes")
        far = max((abs(at) for box in boxes for at in box), default=0.0)
        if far > LARGEST_SHARE:
            raise ValueError(
                f"boxes must be shares of width and height from 0 to 1, but {far:g} looks like "
                "pixels or thousandths; give pixels as bboxs"
            )
        return boxes, None, ()
    boxes = _boxes(row["bboxs"], "bboxs")
    numbers = [at for box in boxes for at in box]
    if any(at % 1 for at in numbers) and all(0 <= at <= 1 for at in numbers):
        raise ValueError("bboxs must be pixels, but these look like shares; give shares as boxes")
    if row.get("width") is None and row.get("height") is None:
        return (), None, boxes
    size = _number(row["width"]), _number(row["height"])
    if min(size) <= 0:
        raise ValueError(f"width and height must be more than 0, got {size[0]:g} × {size[1]:g}")
    return _shares(boxes, size), size, ()


def _boxes(value: Any, what: str) -> tuple[Box, ...]:
    if not isinstance(value, list) or not all(isinstance(b, list) and len(b) == 4 for b in value):
        raise ValueError(f"{what} must be a list of [x0, y0, x1, y1], got {_short(value)}")
    boxes = []
    for given in value:
        x0, y0, x1, y1 = map(_number, given)
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"{_short(given)} ends before it begins; corners are x0, y0, x1, y1, and this "
                "looks like x, y, width, height or like corners in another order"
            )
        boxes.append((x0, y0, x1, y1))
    return tuple(boxes)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {_short(value)}")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{_short(value)} is no position in a picture")
    return float(value)


def _text(row: dict, key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be text, got {_short(value)}")
    return value


def _answers(row: dict, key: str) -> tuple[str, ...]:
    """One or several right answers; numbers become text."""
    value = row[key]
    values = value if isinstance(value, list) else [value]
    numbers = {int, float}
    good = [str(v) for v in values if type(v) in numbers or (isinstance(v, str) and v.strip())]
    if not good or len(good) < len(values):
        raise ValueError(f"{key} must be text or a list of texts, got {_short(value)}")
    return tuple(dict.fromkeys(good))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _benchmark_row(entry: Any, number: int, path: Path, pictures: Path) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {_short(entry)}")
    picture, region = entry["image"]
    boxes = _boxes([json.loads(region.split("###")[1])], "the region")
    texts = [turn["value"] for turn in entry["conversations"]]
    if len(texts) < 4:
        raise ValueError(f"expected four turns, got {len(texts)}")
    question = _text({"question": texts[0]}, "question").replace(REQUEST.strip(), "").strip()
    answers = _answers({"answer": texts[3]}, "answer")
    return Row(
        name=str(entry.get("question_id", number)),
        group=str(entry.get("dataset") or path.stem),
        kind="",
        picture=_benchmark_picture(pictures, _text({"image": picture}, "image")),
        qa=QA(question.replace("<image>\n", ""), answers[0], answers[0], (), answers, answers),
        pixel_boxes=boxes,
    )


def _benchmark_picture(pictures: Path, picture: str) -> Path:
    """Some data sets keep their pictures in a folder `val` that the benchmark does not name."""
    stated, parts = pictures / picture, Path(picture).parts
    inner = pictures / Path(*parts[:2], "val", *parts[2:])
    return inner if not os.path.isfile(stated) and os.path.isfile(inner) else stated


def _seen(path: Path) -> tuple[Image.Image, tuple[int, int], Image.Transpose | None]:
    """A picture as it is seen, the size in which it is stored, and how its EXIF data turn it.

    Raises:
        UsageError, NanoglimpseError: as `Row.opened`.
    """
    picture, pixels = source(path), PixelConfig()
    with picture.open() as file:
        stored, turn = file.size, orientation(file)
    image, factor = picture.load(), pixels.patch_size * pixels.merge_size
    try:
        smart_resize(image.height, image.width, factor, pixels.min_pixels, pixels.max_pixels)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return image, stored, turn


def _have_one_shape(one: Size, other: Size) -> bool:
    """Whether one size is the other, or scales it up to a rounded pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def _within(boxes: Sequence[Box], size: Size) -> bool:
    return all(box[2] <= size[0] and box[3] <= size[1] for box in boxes)


def _shares(boxes: Sequence[Box], size: Size) -> tuple[Box, ...]:
    wide, high = size
    return tuple((x0 / wide, y0 / high, x1 / wide, y1 / high) for x0, y0, x1, y1 in boxes)


def _turned(box: Box, turn: Callable[[float, float], Size]) -> Box:
    (a, b), (c, d) = turn(box[0], box[1]), turn(box[2], box[3])
    return min(a, c), min(b, d), max(a, c), max(b, d)


def _is_inside(box: Box) -> bool:
    return box[0] < 1 and box[1] < 1 and box[2] >= 0 and box[3] >= 0


def _clipped(box: Box) -> Box:
    x0, y0, x1, y1 = (min(max(at, 0.0), 1.0) for at in box)
    return x0, y0, x1, y1
