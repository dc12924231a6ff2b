"""What is asked: questions of the synthetic world, of VisCoT's benchmark, or of a plain JSONL."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..errors import NanoglimpseError, UsageError
from ..processor import load_picture
from ..train.base import asked
from ..train.data import lines_of, plain_row
from ..train.examples import Asked, Box
from ..world import BRIEF_SUFFIX, QUESTION_KINDS, SPLITS, render
from ..world.__main__ import REQUEST

PER_PICTURE = 4


@dataclass(frozen=True)
class Item:
    """A question to be answered.

    Attributes:
        name: tells it from all others.
        group: the data set or domain that it counts for.
        kind: of question, where that is known.
        number: in its group, from 0.
        picture: a file or an image.
        asked: as it is put to the model, with boxes as shares of width and height.
        pixel_box: instead of those, where only the picture tells its size.
    """

    name: str
    group: str
    kind: str
    number: int
    picture: Path | Image.Image
    asked: Asked
    pixel_box: Box | None = None

    def opened(self) -> "Item":
        """With the picture read, and the box in shares of it.

        Raises:
            NanoglimpseError: the picture is damaged.
        """
        image, box = load_picture(self.picture), self.pixel_box
        if box is None:
            return replace(self, picture=image)
        sides = (*image.size, *image.size)
        shares = tuple(min(max(at / side, 0.0), 1.0) for at, side in zip(box, sides, strict=True))
        return replace(
            self, picture=image, asked=replace(self.asked, boxes=(shares,)), pixel_box=None
        )


class Source(Protocol):
    """Where questions come from.

    Attributes:
        groups: data sets or domains, in order.
        total: how many questions there are.
        missing: the picture of every question that is left out because it is not there.
        identity: what tells it from other data, for JSON.
    """

    groups: Sequence[str]
    total: int
    missing: Sequence[str]
    identity: dict

    def items(self, brief: bool) -> Iterator[Item]:
        """All questions, always in the same order."""


class World:
    """The synthetic world: so many questions of each domain, of all kinds if None are named."""

    def __init__(
        self, seed: int, domains: Sequence[str], count: int, kinds: Sequence[str] | None = None
    ):
        self.seed, self.groups, self.count, self.missing = seed, list(domains), count, []
        self.kinds = kinds and sorted(kinds)
        self.total, self.identity = count * len(domains), {"world": seed}
        if kinds:
            self.identity["kinds"] = self.kinds
            for domain in domains:
                if not set(kinds) & set(QUESTION_KINDS[domain]):
                    known = ", ".join(QUESTION_KINDS[domain])
                    raise UsageError(f"domain {domain} has no such kinds; it has {known}")

    def items(self, brief: bool) -> Iterator[Item]:
        """Domain after domain."""
        for domain in self.groups:
            yield from questions(self.seed, domain, self.count, brief, self.kinds)


def questions(
    seed: int, domain: str, count: int, brief: bool, only: Sequence[str] | None = None
) -> Iterator[Item]:
    """The first `count` questions of a seed of the world, a few a picture, kinds drawn evenly."""
    split, number, index = _world_name(seed), 0, 0
    while number < count:
        picture, rng = render(seed, index, domain=domain), random.Random(f"questions {index}")
        kinds = sorted({q.kind for q in picture.questions if not only or q.kind in only})
        for kind in rng.sample(kinds, min(PER_PICTURE, len(kinds), count - number)):
            question = rng.choice([q for q in picture.questions if q.kind == kind])
            name = f"{split} {domain} {index} {kind}"
            yield Item(name, domain, kind, number, picture.image, asked(question, brief))
            number += 1
        index += 1


def _world_name(seed: int) -> str:
    names = {seeds.start: name for name, seeds in SPLITS.items()}
    return names.get(seed, str(seed))


class Files:
    """Files of questions; each is a group, or names the data set of every question itself."""

    def __init__(self, paths: Sequence[Path], pictures: Path | None, count: int | None):
        self.missing, self._items = [], []
        numbers: dict[str, int] = {}
        for path in paths:
            for item in _read(path, pictures or path.parent):
                if not item.picture.is_file():
                    self.missing.append(str(item.picture))
                    continue
                number = numbers.get(item.group, 0)
                if count is None or number < count:
                    self._items.append(replace(item, number=number))
                    numbers[item.group] = number + 1
        if not self._items:
            first = f"; the first picture it misses is {self.missing[0]}" if self.missing else ""
            raise UsageError(f"{', '.join(map(str, paths))}: there is nothing to ask{first}")
        self.groups, self.total = list(numbers), len(self._items)
        _check_names(self._items)
        contents = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
        self.identity = dict(zip([path.name for path in paths], contents, strict=True))

    def items(self, brief: bool) -> Iterator[Item]:
        """In the files' order."""
        for item in self._items:
            if not brief:
                yield item
                continue
            text, short = item.asked.question + BRIEF_SUFFIX, item.asked.short
            yield replace(item, asked=replace(item.asked, question=text, answer=short))


def _check_names(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.name in seen:
            raise UsageError(f"question {item.name} is there twice; give every file once")
        seen.add(item.name)


def _read(path: Path, pictures: Path) -> Iterator[Item]:
    """The layout by the name: .json is VisCoT's benchmark, else a line holds a question."""
    if path.suffix == ".json":
        return _benchmark(path, pictures)
    return _plain(path, pictures)


def _plain(path: Path, pictures: Path) -> Iterator[Item]:
    """As the trainer reads them; boxes may be left out."""
    for number, line in enumerate(lines_of(path), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            if not {"boxes", "bboxs"} & row.keys():
                line = json.dumps(row | {"boxes": []})
        except (ValueError, AttributeError):
            row = {}  # plain_row says what is wrong
        picture, question = plain_row(line, where)
        group = str(row.get("dataset") or row.get("domain") or path.stem)
        name = f"{path.stem} {row.get('question_id', number)}"
        yield Item(name, group, str(row.get("kind", "")), 0, pictures / picture, question)


def _benchmark(path: Path, pictures: Path) -> Iterator[Item]:
    """The layout of the official evaluation: see README of the data set VisCoT."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise NanoglimpseError(f"{path} holds {type(rows).__name__}, not a list of questions")
    for number, row in enumerate(rows):
        try:
            yield _benchmark_item(row, number, path, pictures)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise NanoglimpseError(
                f"{path}, entry {number}, is no question of the benchmark: "
                f"{type(error).__name__} {error}"
            ) from None


def _benchmark_item(row: dict, number: int, path: Path, pictures: Path) -> Item:
    picture, place = row["image"]
    x0, y0, x1, y1 = map(float, json.loads(place.split("###")[1]))
    said = [turn["value"] for turn in row["conversations"]]
    question = said[0].replace(REQUEST.strip(), "").strip().replace("<image>\n", "")
    answer = str(said[3])
    return Item(
        name=f"{path.stem} {row.get('question_id', number)}",
        group=str(row.get("dataset") or path.stem),
        kind="",
        number=0,
        picture=_benchmark_picture(pictures, picture),
        asked=Asked(question, answer, answer, ()),
        pixel_box=(x0, y0, x1, y1),
    )


def _benchmark_picture(pictures: Path, picture: str) -> Path:
    """Some data sets keep their pictures in a folder `val` that the benchmark does not name."""
    first, parts = pictures / picture, Path(picture).parts
    inner = pictures / Path(*parts[:2], "val", *parts[2:])
    return inner if not first.is_file() and inner.is_file() else first
