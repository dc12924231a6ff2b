"""The ground truth as a method: an upper bound for whoever looks for the evidence."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError
from .base import Choice, Look, Method

if TYPE_CHECKING:
    from ..engine import Engine

SURE = 20.0


class Oracle(Method):
    """Keeps the visual tokens under the evidence, where GlimpsePrune looks."""

    name = "oracle"
    about = "the tokens under the ground-truth boxes after K = ⌈2L/3⌉ layers; an upper bound"
    capped = False
    fixed = True
    pooled = True
    needs_hidden = False

    def stops(self, engine: "Engine") -> Sequence[int]:
        """K."""
        return (-(-2 * engine.config.text_config.num_hidden_layers // 3),)

    def choose(self, look: Look) -> Choice:
        """The evidence, which the caller has to give."""
        if look.evidence is None:
            raise UsageError("method oracle needs the evidence: prefill(…, evidence=mask)")
        importance = torch.where(look.evidence, SURE, -SURE)
        return Choice(look.by_rule(importance), importance)
