"""Files of grounded questions, in the plain layout and in the two layouts of VisCoT.

- plain, .jsonl: image, question, answer and boxes (normalised); optionally short, which is part of
  the answer.
- VisCoT's `*_cot_train.jsonl`: image, question, answer, width, height and bboxs (in pixels).
- VisCoT's benchmark, .json: conversations, with one box in pixels beside the name of the picture.

Any of them may name the data set (dataset or domain), the kind and the question_id of a question.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanoglimpse.data.qa import QA
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.world.types import REQUEST, Box


@dataclass(frozen=True)
class Row:
    """A question of a file.

    Attributes:
        name: the file and the question's id or number there.
        group: the data set or domain, else the name of the file.
        kind: the kind of question, "" if the file does not name it.
        picture: the file of the picture, which may be missing.
        qa: the question; without boxes if there is a `pixel_box`.
        pixel_box: the evidence in pixels, if the file does not give the size of the picture.
    """

    name: str
    group: str
    kind: str
    picture: Path
    qa: QA
    pixel_box: Box | None = None


def read_rows(path: Path, pictures: Path, *, need_boxes: bool) -> Iterator[Row]:
    """Reads a .jsonl in the plain layout or in VisCoT's training layout.

    Args:
        path: the file.
        pictures: the folder of its pictures.
        need_boxes: whether questions without boxes are refused.

    Raises:
        UsageError: the file cannot be read.
        NanoglimpseError: a line is not a question.
    """
    lines = [line for line in _read(path).splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            row = _row(json.loads(line), number, path, pictures, need_boxes)
        except KeyError as error:
            raise NanoglimpseError(f"{path}, line {number}, has no key {error}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise NanoglimpseError(
                f"{path}, line {number}, is not a question with evidence: {error}"
            ) from None
        yield row


def read_benchmark(path: Path, pictures: Path) -> Iterator[Row]:
    """Reads a .json in the layout of VisCoT's benchmark, as the official evaluation does.

    Raises:
        UsageError: the file cannot be read.
        NanoglimpseError: an entry is not a question.
    """
    try:
        entries = json.loads(_read(path))
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(entries, list):
        kind = type(entries).__name__
        raise NanoglimpseError(f"{path} must hold a list of questions, got a {kind}")
    for number, entry in enumerate(entries):
        try:
            row = _benchmark_row(entry, number, path, pictures)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise NanoglimpseError(
                f"{path}, entry {number}, is not a question of the benchmark: "
                f"{type(error).__name__} {error}"
            ) from None
        yield row


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _row(row: dict, number: int, path: Path, pictures: Path, need_boxes: bool) -> Row:
    answer = str(row["answer"])
    boxes = _boxes(row) if need_boxes or {"boxes", "bboxs"} & row.keys() else ()
    return Row(
        name=f"{path.stem} {row.get('question_id', number)}",
        group=str(row.get("dataset") or row.get("domain") or path.stem),
        kind=str(row.get("kind", "")),
        picture=pictures / str(row["image"]),
        qa=QA(str(row["question"]), answer, str(row.get("short", answer)), boxes),
    )


def _boxes(row: dict) -> tuple[Box, ...]:
    """The boxes of a row as shares of width and height."""
    if "boxes" in row or "bboxs" not in row:
        boxes, width, height = row["boxes"], 1, 1
    else:
        boxes, width, height = row["bboxs"], row["width"], row["height"]
    return tuple(
        (float(x0) / width, float(y0) / height, float(x1) / width, float(y1) / height)
        for x0, y0, x1, y1 in boxes
    )


def _benchmark_row(entry: dict, number: int, path: Path, pictures: Path) -> Row:
    picture, region = entry["image"]
    x0, y0, x1, y1 = map(float, json.loads(region.split("###")[1]))
    texts = [turn["value"] for turn in entry["conversations"]]
    question = texts[0].replace(REQUEST.strip(), "").strip().replace("<image>\n", "")
    answer = str(texts[3])
    return Row(
        name=f"{path.stem} {entry.get('question_id', number)}",
        group=str(entry.get("dataset") or path.stem),
        kind="",
        picture=_benchmark_picture(pictures, picture),
        qa=QA(question, answer, answer, ()),
        pixel_box=(x0, y0, x1, y1),
    )


def _benchmark_picture(pictures: Path, picture: str) -> Path:
    """Some data sets keep their pictures in a folder `val` that the benchmark does not name."""
    stated, parts = pictures / picture, Path(picture).parts
    inner = pictures / Path(*parts[:2], "val", *parts[2:])
    return inner if not stated.is_file() and inner.is_file() else stated
