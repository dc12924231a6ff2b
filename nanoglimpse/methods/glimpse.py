"""GlimpsePrune (arXiv 2508.01548); its networks are in nanoglimpse/model/glimpse.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.model.model import Model


class GlimpsePrune(PruningMethod):
    """After K layers a predictor reads the glimpse row's attention and decides."""

    name = "glimpse"
    about = "GlimpsePrune, arXiv 2508.01548: after K layers keeps what the question needs"
    budget = "adaptive"
    pooled = True

    def layers(self, model: Model) -> Sequence[int]:
        """K."""
        return (model.glimpse_weights.config.layers,)

    def needs(self, model: Model) -> Needs:
        """Attention of the layers that the weights were trained on, and the predictor's taps."""
        config = model.glimpse_weights.config
        return Needs(attention=config.selected_layers, taps=config.selected_visual_layers)

    def probe(self, model: Model) -> Tensor:
        """The glimpse."""
        return model.glimpse_weights.vectors

    def choose(self, context: PruningContext) -> Decision:
        """What the predictor finds important."""
        glimpse, visual_rows = context.model.glimpse_weights, context.batch.visual_rows
        selected = (context.layers[layer] for layer in glimpse.config.selected_layers)
        logits = torch.cat([x.logits(context.query_rows)[visual_rows] for x in selected], dim=-1)
        batch, made, predictor = context.batch, context.vision.conditions, glimpse.predictor
        if predictor not in made:
            made[predictor] = predictor.condition(context.taps)
        importance = predictor(logits, made[predictor], batch.all_grids, batch.visual_counts)
        return Decision(context.select(importance), importance, logits)
