"""The questions of a comparison: from the synthetic world, VisCoT's benchmark, or a .jsonl."""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from nanoglimpse.data.qa import QA, as_qa
from nanoglimpse.data.viscot import Row, read_questions
from nanoglimpse.errors import UsageError
from nanoglimpse.world import QUESTION_KINDS, SPLITS, render

PER_PICTURE = 4


@dataclass(frozen=True)
class EvalQuestion:
    """A question of a comparison.

    Attributes:
        name: unique among all questions.
        group: the data set or domain in whose mean the question counts.
        kind: the kind of question, "" if unknown.
        picture: a file or an image.
        qa: the question as the model reads it.
        row: the row of a file whose picture has not been opened yet.
        number: the number of the question in its group, from 0.
        outside: whether its boxes are all outside the picture.
    """

    name: str
    group: str
    kind: str
    picture: Path | Image.Image
    qa: QA
    row: Row | None = None
    number: int = 0
    outside: bool = False

    def loaded(self) -> "EvalQuestion":
        """The question with its picture in memory and its evidence as shares of the picture.

        Raises:
            UsageError, NanoglimpseError: as `Row.opened`.
        """
        if self.row is None:
            return self
        opened = self.row.opened()
        qa = replace(self.qa, boxes=opened.boxes)
        return replace(self, picture=opened.image, qa=qa, row=None, outside=opened.outside)


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
        prefixes = _prefixes(paths)
        for path, prefix in zip(paths, prefixes, strict=True):
            for row in read_questions(path, pictures or path.parent, prefix).checked():
                if not os.path.isfile(row.picture):
                    self.missing.append(str(row.picture))
                elif count is None or numbers[row.group] < count:
                    own = (row.name, row.group, row.kind, row.picture, row.qa, row)
                    self._questions.append(EvalQuestion(*own, number=numbers[row.group]))
                    numbers[row.group] += 1
        if not self._questions:
            first = f"; the first missing picture is {self.missing[0]}" if self.missing else ""
            raise UsageError(f"{', '.join(map(str, paths))}: no usable questions{first}")
        self.groups, self.total = list(numbers), len(self._questions)
        rows = [(question.qa.boxes, question.row) for question in self._questions]
        self.has_boxes = any(boxes or (row and row.pixel_boxes) for boxes, row in rows)
        contents = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths]
        names = [path.name for path in paths]
        names = names if len({*names}) == len(names) else list(map(str, paths))
        self.identity = dict(zip(names, contents, strict=True))

    def questions(self, brief: bool) -> Iterator[EvalQuestion]:
        """Questions in the order of the files."""
        for question in self._questions:
            yield replace(question, qa=question.qa.brief()) if brief else question


def _prefixes(paths: Sequence[Path]) -> list[str]:
    """What the names of the questions of each file begin with: its name, where no two have one.

    Raises:
        UsageError: a file is given twice.
    """
    for number, path in enumerate(paths):
        if any(path.resolve() == other.resolve() for other in paths[:number]):
            raise UsageError(f"{path} is given twice; give every file once")
    stems = Counter(path.stem for path in paths)
    return [path.stem if stems[path.stem] == 1 else str(path) for path in paths]
