"""A question with its answer and its evidence, and which visual tokens the evidence covers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from nanoglimpse.config import Config
from nanoglimpse.model.rope import Grid
from nanoglimpse.world.types import BRIEF_SUFFIX, Box, Question

# How often the kinds of the world's questions are drawn; 1 if not listed. Kinds that take longer to
# learn are drawn more often. A model of nano's size did not learn "left" and "above" beside the
# other kinds, so they are not drawn at all.
KIND_WEIGHTS = {
    "left": 0.0,
    "above": 0.0,
    "number": 2.0,
    "count": 3.0,
    "value": 3.0,
    "item": 5.0,
    "bar": 3.0,
    "largest": 3.0,
    "smallest": 3.0,
    "total": 9.0,
}


@dataclass(frozen=True)
class QA:
    """A question as the model reads it, and the answer it should give.

    Attributes:
        question: the text of the prompt.
        answer: the expected reply.
        short: the part of the answer that matters.
        boxes: the evidence, as shares of width and height.
        answers, shorts: all right answers and all right short ones, if there are several.
    """

    question: str
    answer: str
    short: str
    boxes: tuple[Box, ...]
    answers: tuple[str, ...] = ()
    shorts: tuple[str, ...] = ()

    def brief(self) -> "QA":
        """The same question with a request for a single word, and its short answer."""
        question = self.question + BRIEF_SUFFIX
        return replace(self, question=question, answer=self.short, answers=self.shorts)


@dataclass(frozen=True)
class Example:
    """A picture and questions about it."""

    image: Image.Image
    qas: tuple[QA, ...]


def as_qa(question: Question, brief: bool) -> QA:
    """Converts a question of the world, with a brief or a free-form prompt."""
    qa = QA(question.text, question.answer, question.short, question.boxes)
    return qa.brief() if brief else qa


def draw_questions(
    questions: Sequence[Question], count: int, rng: random.Random, brief: bool
) -> tuple[QA, ...]:
    """Draws questions by the weights of their kinds; none repeats before all have been drawn.

    Args:
        questions: the world's questions about one picture.
        count: how many to draw.
        rng: the source of randomness.
        brief: whether all prompts are brief or all are free-form.
    """
    questions = [q for q in questions if KIND_WEIGHTS.get(q.kind, 1.0)]
    weights = [KIND_WEIGHTS.get(q.kind, 1.0) for q in questions]
    drawn: list[Question] = []
    remaining: list[int] = []
    while len(drawn) < count:
        remaining = remaining or list(range(len(questions)))
        index = rng.choices(remaining, [weights[i] for i in remaining])[0]
        remaining.remove(index)
        drawn.append(questions[index])
    return tuple(as_qa(question, brief) for question in drawn)


def token_mask(boxes: Sequence[Box], grid: Grid, config: Config) -> Tensor:
    """Bool [N], the visual tokens that the boxes cover.

    As in the official code both ends of a box are inclusive, so that a box which ends exactly on
    the border of a cell also marks the next cell. What is outside the picture marks nothing.
    """
    merge = config.vision_config.spatial_merge_size
    height, width = grid[1] // merge, grid[2] // merge
    mask = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        if x1 >= 0 and y1 >= 0:
            columns = slice(int(max(x0, 0) * width), min(int(x1 * width), width - 1) + 1)
            rows = slice(int(max(y0, 0) * height), min(int(y1 * height), height - 1) + 1)
            mask[rows, columns] = True
    return mask.flatten()
