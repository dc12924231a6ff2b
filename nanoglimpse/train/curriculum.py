"""The stages of base training: pictures grow during the run, and questions come after them."""

from dataclasses import dataclass

from nanoglimpse.world.types import CELL

# The cost of a question in visual tokens: it has about forty rows, but these pass only the decoder,
# while a visual token is also four patches in the vision encoder.
QUESTION_WORK = 8


@dataclass(frozen=True)
class Draw:
    """A kind of picture.

    Attributes:
        domain: the domain of the world.
        canvases: widths and heights to draw from.
        num_things, size: as in `world.render`.
        weight: how often it is drawn, relative to the other kinds of its stage.
    """

    domain: str
    canvases: tuple[tuple[int, int], ...]
    num_things: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    weight: int = 1


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        share: the share of the steps, relative to the other stages.
        work: the size of a micro-batch in visual tokens; a question counts as QUESTION_WORK.
        questions: the number of questions per picture; 0 trains the vision encoder only.
        aux_weight: weight of the two auxiliary losses at the beginning and the end of the stage.
        draws: the kinds of pictures.
    """

    share: float
    work: int
    questions: int
    aux_weight: tuple[float, float]
    draws: tuple[Draw, ...]

    def pictures(self, canvas: tuple[int, int]) -> int:
        """How many pictures of a canvas make up a micro-batch.

        Processes wait for the slowest, so that all micro-batches should cost the same.
        """
        tokens = (canvas[0] // CELL) * (canvas[1] // CELL)
        return max(1, self.work // (tokens + QUESTION_WORK * self.questions))


def _squares(*sides: int) -> tuple[tuple[int, int], ...]:
    return tuple((side, side) for side in sides)


_OBLONG = ((448, 336), (336, 448), (308, 420), (560, 420), (448, 672), (672, 504))
_LARGE = (*_squares(448, 560, 672), *_OBLONG)
# The pictures of the stages, which grow from one stage to the next.
_ONE_LARGE_THING = (Draw("scene", _squares(112), (1, 1), (84, 106)),)
_ONE_THING = (
    Draw("scene", _squares(112), (1, 1), (44, 106)),
    Draw("document", ((168, 140), (224, 168)), (2, 4)),
    Draw("chart", ((168, 168), (224, 168)), (2, 4)),
)
_FEW_THINGS = (
    Draw("scene", _squares(224), (2, 4), (44, 92)),
    Draw("document", ((224, 224), (280, 168)), (3, 6)),
    Draw("chart", ((224, 224), (280, 168)), (3, 4)),
)
_MEDIUM = (
    Draw("scene", (*_squares(224, 280, 336), (336, 224), (224, 336)), (2, 6), weight=2),
    Draw("document", (*_squares(224, 280, 336), (280, 336)), (3, 10), weight=3),
    Draw("chart", (*_squares(224, 280, 336), (336, 252)), (3, 6), weight=2),
)
_LAST = (
    Draw("scene", (*_squares(224, 280, 336), *_LARGE), weight=2),
    Draw("document", (*_squares(280, 336, 392), *_LARGE), weight=3),
    Draw("chart", (*_squares(280, 336, 392), *_LARGE), weight=2),
)
# For reading: scenes are fewer, and the print is smaller to begin with.
_SMALLEST_PRINT = (
    Draw("scene", _squares(112), (1, 1), (44, 106)),
    Draw("scene", _squares(224), (2, 5)),
    Draw("document", ((168, 112), (224, 112), (168, 140)), (1, 4), weight=5),
    Draw("chart", ((112, 112), (168, 112), (168, 140)), (1, 3), weight=3),
)
_SMALL_PRINT = (
    Draw("scene", _squares(224, 280), (2, 6), weight=2),
    Draw("document", ((224, 168), (224, 224), (280, 168), (280, 280)), (3, 8), weight=5),
    Draw("chart", ((224, 168), (224, 224), (280, 224)), (3, 6), weight=3),
)
_SMALL_MIXED = (
    Draw("scene", _squares(224), (2, 5)),
    Draw("document", ((224, 168), (224, 224), (280, 168)), (3, 6), weight=2),
    Draw("chart", ((224, 168), (224, 224), (280, 168)), (3, 5), weight=2),
)
_MEDIUM_MIXED = (
    Draw("scene", (*_squares(224, 280, 336), (336, 224), (224, 336)), (2, 6)),
    Draw("document", (*_squares(224, 280, 336), (280, 336)), (3, 10), weight=2),
    Draw("chart", (*_squares(224, 280, 336), (336, 252)), (3, 6)),
)
# For a model with random weights. It learns digits much sooner from pictures of a single attention
# window with one thing in it.
_WHOLE = (
    Stage(share=0.1, work=512, questions=0, aux_weight=(1.0, 1.0), draws=_ONE_LARGE_THING),
    Stage(share=0.1, work=1024, questions=0, aux_weight=(1.0, 1.0), draws=_ONE_THING),
    Stage(share=0.2, work=1100, questions=8, aux_weight=(1.0, 0.7), draws=_FEW_THINGS),
    Stage(share=0.35, work=1600, questions=8, aux_weight=(0.7, 0.4), draws=_MEDIUM),
    Stage(share=0.25, work=1000, questions=8, aux_weight=(0.4, 0.2), draws=_LAST),
)
# For a model that knows scenes. Small print comes first, without questions: questions cost five
# times as much and teach nothing until the print can be read.
_READING = (
    Stage(share=15, work=1024, questions=0, aux_weight=(1.0, 1.0), draws=_SMALLEST_PRINT),
    Stage(share=20, work=1100, questions=0, aux_weight=(1.0, 1.0), draws=_SMALL_PRINT),
    Stage(share=30, work=1100, questions=8, aux_weight=(1.0, 1.0), draws=_SMALL_MIXED),
    Stage(share=70, work=1600, questions=8, aux_weight=(1.0, 0.7), draws=_MEDIUM_MIXED),
    Stage(share=90, work=1300, questions=8, aux_weight=(0.7, 0.3), draws=_LAST),
)
# For a model that answers but cannot read new words: first without questions and on all sizes
# ("letters"), then with questions and starting from small pictures ("spelling").
_ALL_SIZES = (*_SMALLEST_PRINT, *_SMALL_PRINT, *_LAST, *_LAST)
CURRICULA = {
    "whole": _WHOLE,
    "late": _WHOLE[-2:],
    "reading": _READING,
    "letters": (Stage(share=1, work=1200, questions=0, aux_weight=(1.0, 1.0), draws=_ALL_SIZES),),
    "spelling": _READING[2:],
}
