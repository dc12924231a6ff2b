"""Where questions with evidence come from: the synthetic world, or a file."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..errors import NanoglimpseError, UsageError
from ..processor import load_picture
from ..world import DOMAINS, SPLITS, render
from ..world.picture import CELL
from .base import ask
from .examples import Asked, Box, Example

HELDOUT = 48


class Source(Protocol):
    """Examples by the number of their micro-batch."""

    def examples(self, micro: int) -> list[Example]:
        """Pictures of one size with equally many questions."""

    def heldout(self) -> list[Example]:
        """A few that `examples` never gives."""


class World:
    """The synthetic world; pictures of a micro-batch share a canvas, and its prompts a form.

    Attributes:
        domains: drawn evenly; one that is named twice is drawn twice as often.
        short: answers are the short ones, although the prompts do not say so.
        brief: share of the micro-batches whose prompts do say so.
    """

    CELLS = ((8, 8), (10, 10), (12, 12), (16, 12), (16, 16), (20, 20))
    CANVASES = tuple((CELL * wide, CELL * high) for wide, high in CELLS)

    def __init__(
        self,
        domains: Sequence[str],
        pictures: int,
        questions: int,
        seed: int,
        *,
        short: bool = False,
        brief: float = 0.0,
    ):
        self.domains, self.pictures, self.questions, self.seed = domains, pictures, questions, seed
        self.short, self.brief = short, brief

    def examples(self, micro: int) -> list[Example]:
        """Pictures of one canvas and domain."""
        rng = random.Random(f"glimpse {self.seed} {micro}")
        domain, canvas = rng.choice(self.domains), rng.choice(self.CANVASES)
        canvas = canvas if domain == "scene" else (max(canvas[0], 280), max(canvas[1], 280))
        numbers = range(micro * self.pictures, (micro + 1) * self.pictures)
        # Beyond the pictures of the base model, which are numbered from 0.
        drawn = [
            render(self.seed + 1, n, domain=domain, canvas=canvas, per_kind=4) for n in numbers
        ]
        # Apart from `rng`: the share changes no picture and no question.
        brief = random.Random(f"brief {self.seed} {micro}").random() < self.brief
        examples = [Example(p.image, ask(p.questions, self.questions, rng, brief)) for p in drawn]
        if not self.short:
            return examples
        return [
            Example(e.image, tuple(replace(a, answer=a.short) for a in e.asked)) for e in examples
        ]

    def heldout(self) -> list[Example]:
        """Free-form questions of the held-out split, one a picture."""
        rng, seed = random.Random(0), SPLITS["heldout"].start
        drawn = (
            render(seed, n, domain=self.domains[n % len(self.domains)]) for n in range(HELDOUT)
        )
        return [Example(p.image, ask(p.questions, 1, rng, False)) for p in drawn]


class File:
    """A JSON line a question, in the plain layout or in that of VisCoT's `*_cot_train.jsonl`.

    Plain: image, question, answer, boxes (normalised) and, if it is part of the answer, short.
    VisCoT: image, question, answer, width, height and bboxs (pixels).

    Attributes:
        rows: what has a picture; the last ones are held out.
        missing: pictures that are not there.
    """

    def __init__(self, path: Path, pictures: Path, seed: int):
        self.path, self.seed, self.rows, self.missing = path, seed, [], []
        for number, line in enumerate(lines_of(path), 1):
            picture, asked = plain_row(line, f"{path}, line {number}")
            if (pictures / picture).is_file():
                self.rows.append((pictures / picture, asked))
            else:
                self.missing.append(str(pictures / picture))
        if not self.rows:
            first = f"; the first picture it misses is {self.missing[0]}" if self.missing else ""
            raise UsageError(f"{path} holds nothing to train on{first}")
        self.held = min(HELDOUT, len(self.rows) // 10)
        self.count = len(self.rows) - self.held

    def examples(self, micro: int) -> list[Example]:
        """One question; every epoch has its own order."""
        epoch, place = divmod(micro, self.count)
        order = list(range(self.count))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return [self._example(order[place])]

    def heldout(self) -> list[Example]:
        """The last rows."""
        return [self._example(i) for i in range(self.count, len(self.rows))]

    def _example(self, index: int) -> Example:
        picture, asked = self.rows[index]
        return Example(load_picture(picture), (asked,))


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def plain_row(line: str, where: str) -> tuple[str, Asked]:
    """A line of JSON as its picture's name and its question; `where` names it in errors."""
    try:
        row = json.loads(line)
        boxes: list[Box] = row["boxes"] if "boxes" in row else _normalised(row)
        answer = str(row["answer"])
        asked = Asked(
            str(row["question"]),
            answer,
            str(row.get("short", answer)),
            tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes),
        )
        return str(row["image"]), asked
    except (ValueError, TypeError) as error:
        raise NanoglimpseError(f"{where} is no question with evidence: {error}") from None
    except KeyError as error:
        raise NanoglimpseError(f"{where} has no key {error}") from None


def _normalised(row: dict) -> list[Box]:
    width, height = row["width"], row["height"]
    return [(x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in row["bboxs"]]


def domains_of(name: str) -> tuple[str, ...]:
    """Domains of "world" or of "world:scene,chart".

    Raises:
        UsageError: there is no such domain.
    """
    chosen = tuple(name.partition(":")[2].split(",")) if ":" in name else DOMAINS
    for domain in chosen:
        if domain not in DOMAINS:
            raise UsageError(f"there is no domain {domain}; take some of {', '.join(DOMAINS)}")
    return chosen
