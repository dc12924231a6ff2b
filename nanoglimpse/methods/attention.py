"""What one row attends to most: FastV, and the training-free row of GlimpsePrune's Tab. 5."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.schedule import two_thirds
from nanoglimpse.model.model import Model


@dataclass(frozen=True)
class AttentionMethod(PruningMethod):
    """Keeps what the last prompt token attends to most in one layer, after that layer.

    Attributes:
        after: number of layers; ⌈2L/3⌉ if None.
    """

    name: str
    about: str
    after: int | None = None
    pooled: bool = field(default=True, init=False)

    def layers(self, model: Model) -> Sequence[int]:
        """After the layer whose attention is read."""
        return (min(self.after or two_thirds(model.depth), model.depth),)

    def needs(self, model: Model) -> Needs:
        """Attention of the last layer that has run."""
        return Needs(attention=(self.layers(model)[0] - 1,))

    def choose(self, context: PruningContext) -> Decision:
        """The most attended."""
        (layer,) = context.layers
        return Decision(context.select(context.attention(layer), threshold=0.0))
