"""The questions of a comparison: from the synthetic world, VisCoT's benchmark, or a .jsonl."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from nanoglimpse.data.qa import QA, as_qa
from nanoglimpse.data.viscot import Row, read_benchmark, read_rows
from nanoglimpse.errors import UsageError
from nanoglimpse.inputs.images import load_picture
from nanoglimpse.world import QUESTION_KINDS, SPLITS, Box, render

PER_PICTURE = 4


@dataclass(frozen=True)
class EvalQuestion:
    """A question of a comparison.

    Attributes:
        name: unique among all questions.
        group: the data set or domain in whose mean the question counts.
        kind: the kind of question, "" if unknown.
        picture: a file or an image.
        qa: the question as the model reads it; without boxes if there is a `pixel_box`.
        pixel_box: the evidence in pixels, until the size of the picture is known.
        number: the number of the question in its group, from 0.
    """

    name: str
    group: str
    kind: str
    picture: Path | Image.Image
    qa: QA
    pixel_box: Box | None = None
    number: int = 0

    def loaded(self) -> "EvalQuestion":
        """The question with its picture in memory and its evidence as shares of the picture.

        Raises:
            NanoglimpseError: the picture is damaged.
        """
        image, box = load_picture(self.picture), self.pixel_box
        if box is None:
            return replace(self, picture=image)
        sides = (*image.size, *image.size)
        shares = (min(max(at / side, 0.0), 1.0) for at, side in zip(box, sides, strict=True))
        x0, y0, x1, y1 = shares
        qa = replace(self.qa, boxes=((x0, y0, x1, y1),))
        return replace(self, picture=image, qa=qa, pixel_box=None)


class QuestionSource(Protocol):
    """The data of a comparison.

    Attributes:
        groups: data sets or domains, in order.
        total: the number of questions.
        missing: the missing pictures, one per question that is left out because of it.
        has_boxes: whether any question says where in the picture its evidence is.
        identity: JSON that differs between different data.
    """

    groups: Sequence[str]
    total: int
    missing: Sequence[str]
    has_boxes: bool
    identity: dict

    def questions(self, brief: bool) -> Iterator[EvalQuestion]:
        """All questions with brief or free-form prompts, in an order that never changes."""


class WorldQuestions(QuestionSource):
    """`count` questions of each domain of the synthetic world; of all kinds if `kinds` is None."""

    def __init__(
        self, seed: int, domains: Sequence[str], count: int, kinds: Sequence[str] | None = None
    ):
        self.seed, self.groups, self.count, self.missing = seed, list(domains), count, []
        self.kinds, self.has_boxes = kinds and sorted(kinds), True
        self.total, self.identity = count * len(domains), {"world": seed}
        if kinds:
            self.identity["kinds"] = self.kinds
            for domain in domains:
                if not set(kinds) & set(QUESTION_KINDS[domain]):
                    known = ", ".join(QUESTION_KINDS[domain])
                    raise UsageError(f"--kinds names no kind of domain {domain}, which has {known}")

    def questions(self, brief: bool) -> Iterator[EvalQuestion]:
        """Domain after domain."""
        for domain in self.groups:
            yield from world_questions(self.seed, domain, self.count, brief, self.kinds)


def world_questions(
    seed: int, domain: str, count: int, brief: bool, kinds: Sequence[str] | None = None
) -> Iterator[EvalQuestion]:
    """The first `count` questions of a domain: a few per picture, each of another kind."""
    names = {seeds.start: name for name, seeds in SPLITS.items()}
    number, index = 0, 0
    while number < count:
        picture, rng = render(seed, index, domain=domain), random.Random(f"questions {index}")
        found = sorted({q.kind for q in picture.questions if not kinds or q.kind in kinds})
        for kind in rng.sample(found, min(PER_PICTURE, len(found), count - number)):
            question = rng.choice([q for q in picture.questions if q.kind == kind])
            yield EvalQuestion(
                name=f"{names.get(seed, seed)} {domain} {index} {kind}",
                group=domain,
                kind=kind,
                picture=picture.image,
                qa=as_qa(question, brief),
                number=number,
            )
            number += 1
        index += 1


class FileQuestions(QuestionSource):
    """The questions of files, at most `count` of each group if `count` is given."""

    def __init__(self, paths: Sequence[Path], pictures: Path | None, count: int | None):
        self.missing: list[str] = []
        self._questions: list[EvalQuestion] = []
        numbers: Counter[str] = Counter()
        for path in paths:
            for row in _read(path, pictures or path.parent):
                if not row.picture.is_file():
                    self.missing.append(str(row.picture))
                elif count is None or numbers[row.group] < count:
                    self._questions.append(EvalQuestion(**vars(row), number=numbers[row.group]))
                    numbers[row.group] += 1
        if not self._questions:
            first = f"; the first missing picture is {self.missing[0]}" if self.missing else ""
            raise UsageError(f"{', '.join(map(str, paths))}: no usable questions{first}")
        _check_names(self._questions)
        self.groups, self.total = list(numbers), len(self._questions)
        self.has_boxes = any(q.qa.boxes or q.pixel_box for q in self._questions)
        contents = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
        self.identity = dict(zip([path.name for path in paths], contents, strict=True))

    def questions(self, brief: bool) -> Iterator[EvalQuestion]:
        """Questions in the order of the files."""
        for question in self._questions:
            yield replace(question, qa=question.qa.brief()) if brief else question


def _read(path: Path, pictures: Path) -> Iterator[Row]:
    """Reads a file; the suffix .json stands for VisCoT's benchmark, any other for a .jsonl."""
    if path.suffix == ".json":
        return read_benchmark(path, pictures)
    return read_rows(path, pictures, need_boxes=False)


def _check_names(questions: Sequence[EvalQuestion]) -> None:
    for name, count in Counter(question.name for question in questions).items():
        if count > 1:
            raise UsageError(f"question {name} occurs {count} times; give every file once")
