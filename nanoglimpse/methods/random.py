"""Random visual tokens, the baseline that every method has to beat."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .base import Choice, Look, Method

if TYPE_CHECKING:
    from ..engine import Engine


class Random(Method):
    """Draws without replacement, where GlimpsePrune looks: after two thirds of the layers."""

    name = "random"
    about = "random tokens after K = ⌈2L/3⌉ layers; a baseline"
    pooled = True
    needs_hidden = False

    def stops(self, engine: "Engine") -> Sequence[int]:
        """K."""
        return (-(-2 * engine.config.text_config.num_hidden_layers // 3),)

    def choose(self, look: Look) -> Choice:
        """By the seed alone, so that a prompt in a batch is drawn for as if it were alone."""
        generator, scores = torch.Generator(), []
        for count, seed in zip(look.batch.visual_counts, look.seeds, strict=True):
            scores.append(torch.rand(count, generator=generator.manual_seed(seed)))
        drawn = torch.cat(scores).to(look.visual.device)
        return Choice(look.by_rule(drawn, threshold=0.0))
