"""What a base model is shown, in which order: pictures grow with the model, and so do questions."""

from dataclasses import dataclass

from ..world.picture import CELL

# Its forty rows pass the decoder; a visual token passes the vision encoder as four patches, too.
QUESTION_WORK = 8


@dataclass(frozen=True)
class Draw:
    """One kind of picture: its domain, canvases, number of things and size of objects in pixels.

    `often` is how often it is drawn, relative to the others of its stage.
    """

    domain: str
    canvases: tuple[tuple[int, int], ...]
    things: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    often: int = 1


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        share: of the steps, relative to the others.
        work: of a micro-batch, in visual tokens; a question counts as QUESTION_WORK of them.
        questions: of a picture; 0 trains the vision encoder alone.
        aid: weight of the two auxiliary losses, at the stage's beginning and end.
        draws: what is drawn.
    """

    share: float
    work: int
    questions: int
    aid: tuple[float, float]
    draws: tuple[Draw, ...]

    def pictures(self, canvas: tuple[int, int]) -> int:
        """How many of this canvas a micro-batch takes: processes wait for the slowest."""
        tokens = (canvas[0] // CELL) * (canvas[1] // CELL)
        return max(1, self.work // (tokens + QUESTION_WORK * self.questions))


def _squares(*sides: int) -> tuple[tuple[int, int], ...]:
    return tuple((side, side) for side in sides)


_LARGE = (
    *_squares(448, 560, 672),
    (448, 336),
    (336, 448),
    (308, 420),
    (560, 420),
    (448, 672),
    (672, 504),
)
_LAST = (
    Draw("scene", (*_squares(224, 280, 336), *_LARGE), often=2),
    Draw("document", (*_squares(280, 336, 392), *_LARGE), often=3),
    Draw("chart", (*_squares(280, 336, 392), *_LARGE), often=2),
)
# From nothing: digits are found where one window has one of them, much sooner than elsewhere.
_WHOLE = (
    Stage(
        share=0.1,
        work=512,
        questions=0,
        aid=(1.0, 1.0),
        draws=(Draw("scene", _squares(112), (1, 1), (84, 106)),),
    ),
    Stage(
        share=0.1,
        work=1024,
        questions=0,
        aid=(1.0, 1.0),
        draws=(
            Draw("scene", _squares(112), (1, 1), (44, 106)),
            Draw("document", ((168, 140), (224, 168)), (2, 4)),
            Draw("chart", ((168, 168), (224, 168)), (2, 4)),
        ),
    ),
    Stage(
        share=0.2,
        work=1100,
        questions=8,
        aid=(1.0, 0.7),
        draws=(
            Draw("scene", _squares(224), (2, 4), (44, 92)),
            Draw("document", ((224, 224), (280, 168)), (3, 6)),
            Draw("chart", ((224, 224), (280, 168)), (3, 4)),
        ),
    ),
    Stage(
        share=0.35,
        work=1600,
        questions=8,
        aid=(0.7, 0.4),
        draws=(
            Draw("scene", (*_squares(224, 280, 336), (336, 224), (224, 336)), (2, 6), often=2),
            Draw("document", (*_squares(224, 280, 336), (280, 336)), (3, 10), often=3),
            Draw("chart", (*_squares(224, 280, 336), (336, 252)), (3, 6), often=2),
        ),
    ),
    Stage(share=0.25, work=1000, questions=8, aid=(0.4, 0.2), draws=_LAST),
)
# For a model that knows scenes. Small print comes first, without questions: they cost five times as
# much, and are in vain until it is read.
_READING = (
    Stage(
        share=15,
        work=1024,
        questions=0,
        aid=(1.0, 1.0),
        draws=(
            Draw("scene", _squares(112), (1, 1), (44, 106)),
            Draw("scene", _squares(224), (2, 5)),
            Draw("document", ((168, 112), (224, 112), (168, 140)), (1, 4), often=5),
            Draw("chart", ((112, 112), (168, 112), (168, 140)), (1, 3), often=3),
        ),
    ),
    Stage(
        share=20,
        work=1100,
        questions=0,
        aid=(1.0, 1.0),
        draws=(
            Draw("scene", _squares(224, 280), (2, 6), often=2),
            Draw("document", ((224, 168), (224, 224), (280, 168), (280, 280)), (3, 8), often=5),
            Draw("chart", ((224, 168), (224, 224), (280, 224)), (3, 6), often=3),
        ),
    ),
    Stage(
        share=30,
        work=1100,
        questions=8,
        aid=(1.0, 1.0),
        draws=(
            Draw("scene", _squares(224), (2, 5)),
            Draw("document", ((224, 168), (224, 224), (280, 168)), (3, 6), often=2),
            Draw("chart", ((224, 168), (224, 224), (280, 168)), (3, 5), often=2),
        ),
    ),
    Stage(
        share=70,
        work=1600,
        questions=8,
        aid=(1.0, 0.7),
        draws=(
            Draw("scene", (*_squares(224, 280, 336), (336, 224), (224, 336)), (2, 6)),
            Draw("document", (*_squares(224, 280, 336), (280, 336)), (3, 10), often=2),
            Draw("chart", (*_squares(224, 280, 336), (336, 252)), (3, 6)),
        ),
    ),
    Stage(share=90, work=1300, questions=8, aid=(0.7, 0.3), draws=_LAST),
)
# For one that answers, but reads no words that are new to it: first without questions, on all
# sizes ("letters"), then with them, on small pictures first ("spelling").
_LETTERS = (
    Stage(
        share=1,
        work=1200,
        questions=0,
        aid=(1.0, 1.0),
        draws=(*_READING[0].draws, *_READING[1].draws, *_LAST, *_LAST),
    ),
)
CURRICULA = {
    "whole": _WHOLE,
    "late": _WHOLE[-2:],
    "reading": _READING,
    "letters": _LETTERS,
    "spelling": _READING[2:],
}
