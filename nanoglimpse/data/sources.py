"""Where training gets its examples: the synthetic world, or a file."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nanoglimpse.data.qa import Example, draw_questions
from nanoglimpse.data.viscot import Row, read_rows
from nanoglimpse.errors import UsageError
from nanoglimpse.pictures.picture import load_picture
from nanoglimpse.world import DOMAINS, SPLITS, render
from nanoglimpse.world.types import CELL

HELDOUT_COUNT = 48
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
    """Examples of a .jsonl with evidence; see `viscot` for its layouts.

    Attributes:
        rows: the questions whose picture exists; the last ones are held out.
        count: the number of rows that are not held out.
        missing: the missing pictures, one per question.
    """

    def __init__(self, path: Path, pictures: Path, seed: int):
        self.seed = seed
        self.rows: list[Row] = []
        self.missing: list[str] = []
        for row in read_rows(path, pictures, need_boxes=True):
            if row.picture.is_file():
                self.rows.append(row)
            else:
                self.missing.append(str(row.picture))
        if not self.rows:
            first = f"; the first missing picture is {self.missing[0]}" if self.missing else ""
            raise UsageError(f"{path} has no usable questions{first}")
        self.count = len(self.rows) - min(HELDOUT_COUNT, len(self.rows) // 10)

    def examples(self, micro: int) -> list[Example]:
        """One question; every epoch has its own order."""
        epoch, index = divmod(micro, self.count)
        order = list(range(self.count))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return [_example(self.rows[order[index]])]

    def heldout(self) -> list[Example]:
        """The last rows."""
        return [_example(row) for row in self.rows[self.count :]]


def _example(row: Row) -> Example:
    return Example(load_picture(row.picture), (row.qa,))


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
