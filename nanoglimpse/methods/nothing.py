"""No visual tokens at all: what a model answers from the question and what it read before."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Choice, Look, Method

if TYPE_CHECKING:
    from ..engine import Engine


class Nothing(Method):
    """Drops every visual token where GlimpsePrune looks: after two thirds of the layers."""

    name = "nothing"
    about = "no visual tokens after K = ⌈2L/3⌉ layers; how much is known without them"
    capped = False
    fixed = True
    needs_hidden = False

    def stops(self, engine: "Engine") -> Sequence[int]:
        """K."""
        return (-(-2 * engine.config.text_config.num_hidden_layers // 3),)

    def choose(self, look: Look) -> Choice:
        """Nothing but videos, which no method prunes."""
        return Choice(~look.batch.prunable)
