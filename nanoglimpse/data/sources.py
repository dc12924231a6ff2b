"""Where training gets its examples: the synthetic world, or a file."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path
from typing import Protocol

from nanoglimpse.data.qa import Example, draw_questions
from nanoglimpse.data.viscot import Row, read_questions
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.world import DOMAINS, SPLITS, render
from nanoglimpse.world.types import CELL

HELDOUT_COUNT, NAMED = 48, 5
CELLS = ((8, 8), (10, 10), (12, 12), (16, 12), (16, 16), (20, 20))
CANVASES = tuple((CELL * wide, CELL * high) for wide, high in CELLS)


class ExampleSource(Protocol):
    """Training examples, each micro-batch a function of its number."""

    def examples(self, micro: int) -> list[Example]:
        """Pictures of one size, each with the same number of questions."""

    def heldout(self) -> list[Example]:
        """A few examples that `examples` never returns."""


@dataclass(frozen=True)
class WorldExamples(ExampleSource):
    """Examples of the synthetic world; a micro-batch has one canvas and one form of prompt.

    Attributes:
        domains: drawn evenly; a domain that is named twice is drawn twice as often.
        pictures: pictures in a micro-batch.
        questions: questions about each picture.
        seed: of the pictures and the questions.
        short: whether free-form prompts, too, are answered with the short answer.
        brief: the share of micro-batches with brief prompts.
    """

    domains: Sequence[str]
    pictures: int
    questions: int
    seed: int
    short: bool = False
    brief: float = 0.0

    def examples(self, micro: int) -> list[Example]:
        """Pictures of one canvas and domain."""
        rng = random.Random(f"glimpse {self.seed} {micro}")
        domain, canvas = rng.choice(self.domains), rng.choice(CANVASES)
        canvas = canvas if domain == "scene" else (max(canvas[0], 280), max(canvas[1], 280))
        numbers = range(micro * self.pictures, (micro + 1) * self.pictures)
        # The base model was trained on the pictures of `seed` itself.
        pictures = [
            render(self.seed + 1, n, domain=domain, canvas=canvas, per_kind=4) for n in numbers
        ]
        # Not drawn from `rng`, so that the share of brief prompts changes no picture or question.
        brief = random.Random(f"brief {self.seed} {micro}").random() < self.brief
        examples = []
        for picture in pictures:
            qas = draw_questions(picture.questions, self.questions, rng, brief)
            if self.short:
                qas = tuple(replace(qa, answer=qa.short) for qa in qas)
            examples.append(Example(picture.image, qas))
        return examples

    def heldout(self) -> list[Example]:
        """Pictures of the held-out split with one free-form question each."""
        rng, seed = random.Random(0), SPLITS["heldout"].start
        pictures = (
            render(seed, n, domain=self.domains[n % len(self.domains)])
            for n in range(HELDOUT_COUNT)
        )
        return [Example(p.image, draw_questions(p.questions, 1, rng, False)) for p in pictures]


class FileExamples(ExampleSource):
    """Examples of a file of questions; see `viscot` for its layouts.

    Every picture is decoded once before the first step, so that none of them ends the training.

    Args:
        path: the file.
        pictures: the folder of its pictures.
        seed: of the order of the questions.
        progress: called with the numbers of checked and of all pictures.

    Attributes:
        rows: the usable questions; the last ones are held out.
        count: the number of rows that are not held out.
        missing: the missing pictures, one per question.
        damaged: why a picture cannot be used, one per question.
        boxless, outside: names of the questions without boxes, and of those all of whose boxes are
            outside the picture. They have no evidence.
        located: the number of questions with evidence.
    """

    def __init__(
        self,
        path: Path,
        pictures: Path,
        seed: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.seed = seed
        rows = read_questions(path, pictures).checked()
        self.missing = [str(row.picture) for row in rows if not isfile(row.picture)]
        found = [row for row in rows if isfile(row.picture)]
        self.rows: list[Row] = []
        self.damaged: list[str] = []
        self.boxless: list[str] = []
        self.outside: list[str] = []
        self.located = 0
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            for done, (row, checked) in enumerate(zip(found, pool.map(_check, found), strict=True)):
                self._take(row, checked)
                progress(done + 1, len(found))
        if not self.rows:
            reasons = [f"the first missing picture is {name}" for name in self.missing[:1]]
            reasons += self.damaged[:1]
            raise UsageError("; ".join([f"{path} has no usable questions", *reasons]))
        self.count = len(self.rows) - min(HELDOUT_COUNT, len(self.rows) // 10)

    def _take(self, row: Row, checked: "str | Evidence") -> None:
        if isinstance(checked, str):
            self.damaged.append(checked)
            return
        self.rows.append(row)
        self.located += checked.located
        if checked.outside:
            self.outside.append(row.name)
        if not row.has_boxes:
            self.boxless.append(row.name)

    def lacks(self) -> Iterator[str]:
        """A line for each kind of question that is left out or has no evidence."""
        for names, what in (
            (self.missing, "questions are left out, since their pictures are missing"),
            (self.damaged, "questions are left out"),
            (self.boxless, "questions have no boxes and train the language loss alone"),
            (self.outside, "questions have boxes outside their picture only, so no evidence"),
        ):
            if names:
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                yield f"{len(names)} {what}: {', '.join(names[:NAMED])}{more}"

    def examples(self, micro: int) -> list[Example]:
        """One question; every epoch has its own order."""
        epoch, index = divmod(micro, self.count)
        order = list(range(self.count))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return [_example(self.rows[order[index]])]

    def heldout(self) -> list[Example]:
        """The last rows."""
        return [_example(row) for row in self.rows[self.count :]]


@dataclass(frozen=True)
class Evidence:
    """Whether a question has evidence, and whether all its boxes are outside the picture."""

    located: bool
    outside: bool


def _check(row: Row) -> Evidence | str:
    """What is known of a row once its picture has been decoded, or why it cannot be used."""
    try:
        opened = row.opened()
    except NanoglimpseError as error:
        return str(error)
    return Evidence(bool(opened.boxes), opened.outside)


def _example(row: Row) -> Example:
    opened = row.opened()
    return Example(opened.image, (replace(row.qa, boxes=opened.boxes),))


def domains_of(data: str) -> tuple[str, ...]:
    """The domains of "world" or of "world:scene,chart".

    Raises:
        UsageError: a domain does not exist.
    """
    domains = tuple(data.partition(":")[2].split(",")) if ":" in data else DOMAINS
    for domain in domains:
        if domain not in DOMAINS:
            raise UsageError(f"unknown domain {domain}; choose from {', '.join(DOMAINS)}")
    return domains
