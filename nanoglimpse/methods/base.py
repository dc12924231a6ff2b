"""The contract of a pruning method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nanoglimpse.methods.context import Decision, PruningContext
from nanoglimpse.methods.schedule import unreachable
from nanoglimpse.model.model import Model


@dataclass(frozen=True)
class Needs:
    """What a method reads; everything else is neither computed nor kept for it.

    Attributes:
        attention: decoder layers whose attention it reads, at the first pruning layer after each.
        taps: blocks of the vision encoder whose features it reads.
        vision_blocks: blocks of the vision encoder whose received attention and keys it reads.
        hidden: it reads `PruningContext.hidden`. Without it a method chooses inside the last layer
            before a pruning layer, and only the survivors run that layer to its end: exact, and
            nearly a layer less.
        question: it reads the question at pruning layer 0, so that pictures cannot be pruned before
            a question is known.
    """

    attention: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    vision_blocks: tuple[int, ...] = ()
    hidden: bool = False
    question: bool = False


class PruningMethod:
    """A pruning method. Objects hold options at most, and no state of a run.

    Attributes:
        name: by which it is chosen.
        about: one line: what it keeps, where it acts, its source.
        budget: "cap" if it keeps as much as `max_ratio` allows and therefore needs one, "adaptive"
            if it decides how much and `max_ratio` is an upper bound, "fixed" if no cap changes it.
        pooled: it chooses once, by `PruningContext.select`, so that `max_frame_ratio` and `anchors`
            apply.
        for_videos: it compares frames, and keeps a single picture whole.
    """

    name: str
    about: str
    budget: Literal["cap", "adaptive", "fixed"] = "cap"
    pooled: bool = False
    for_videos: bool = False

    def layers(self, model: Model) -> Sequence[int]:
        """Numbers of decoder layers after which it prunes, ascending; 0 is before the decoder."""
        return (0,)

    def needs(self, model: Model) -> Needs:
        """What it reads."""
        return Needs()

    def probe(self, model: Model) -> Tensor | None:
        """[L, C], added before each layer to one row after every prompt; None without such a row.

        A method with a probe has one pruning layer.
        """
        return None

    def stage_ratio(self, model: Model, ratio: float, kv_drop: str) -> float:
        """The share of visual tokens to keep so that the caches of all layers hold `ratio` on mean.

        Raises:
            UsageError: it cannot be reached.
        """
        first, depth = self.layers(model)[0], model.depth
        if kv_drop == "all" or not first:
            return ratio
        share = (ratio * depth - first) / (depth - first) if depth > first else 0.0
        if share <= 0:
            raise unreachable(self.name, first, depth, ratio)
        return share

    def choose(self, context: PruningContext) -> Decision:
        """Which visual tokens stay."""
        raise NotImplementedError
