"""GlimpsePrune (arXiv 2508.01548); how it works stands in nanoglimpse/glimpse.py."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Choice, Look, Method

if TYPE_CHECKING:
    from ..engine import Engine


class GlimpsePrune(Method):
    """After K layers a predictor reads the glimpse row's attention and decides."""

    name = "glimpse"
    about = "GlimpsePrune, arXiv 2508.01548: after K layers keeps what the question needs"
    capped = False
    pooled = True
    needs_hidden = False

    def stops(self, engine: "Engine") -> Sequence[int]:
        """K."""
        return (engine.glimpse.config.layers,)

    def reads(self, engine: "Engine") -> Sequence[int]:
        """The layers that its weights were trained on."""
        return engine.glimpse.config.selected_layers

    def taps(self, engine: "Engine") -> Sequence[int]:
        """The predictor's conditions."""
        return engine.glimpse.config.selected_visual_layers

    def probe(self, engine: "Engine") -> Tensor:
        """The glimpse."""
        return engine.glimpse.vectors

    def choose(self, look: Look) -> Choice:
        """What the predictor finds important."""
        glimpse, visual_rows = look.engine.glimpse, look.batch.visual_rows
        logits = [
            look.layers[layer].logits(look.asking)[visual_rows]
            for layer in glimpse.config.selected_layers
        ]
        logits = torch.cat(logits, dim=-1)
        batch = look.batch
        importance = glimpse.predictor(logits, look.taps, batch.all_grids, batch.visual_counts)
        return Choice(look.by_rule(importance), importance, logits)
