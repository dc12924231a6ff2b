"""Baselines: no pruning, chance, the ground truth, and no visual tokens at all."""

from collections.abc import Sequence

import torch

from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.varlen import upload
from nanoglimpse.methods.base import Decision, PruningContext, PruningMethod
from nanoglimpse.methods.schedule import two_thirds
from nanoglimpse.model.model import Model

SURE = 20.0


class Dense(PruningMethod):
    """Keeps every visual token."""

    name = "dense"
    about = "keeps every visual token"
    budget = "fixed"

    def layers(self, model: Model) -> Sequence[int]:
        """Nowhere."""
        return ()


class AfterTwoThirds(PruningMethod):
    """Prunes where GlimpsePrune does."""

    def layers(self, model: Model) -> Sequence[int]:
        """K."""
        return (two_thirds(model.depth),)


class Random(AfterTwoThirds):
    """Draws without replacement, where GlimpsePrune looks: after two thirds of the layers."""

    name = "random"
    about = "random tokens after K = ⌈2L/3⌉ layers; a baseline"
    pooled = True

    def choose(self, context: PruningContext) -> Decision:
        """By the seed alone, so that a prompt in a batch is drawn for as if it were alone."""
        generator, scores = torch.Generator(), []
        for count, seed in zip(context.visual_counts, context.seeds, strict=True):
            scores.append(torch.rand(count, generator=generator.manual_seed(seed)))
        drawn = upload(torch.cat(scores), context.visual.device)
        return Decision(context.select(drawn, threshold=0.0))


class Oracle(AfterTwoThirds):
    """Keeps the visual tokens under the evidence, where GlimpsePrune looks."""

    name = "oracle"
    about = "the tokens under the ground-truth boxes after K = ⌈2L/3⌉ layers; an upper bound"
    budget = "fixed"
    pooled = True

    def choose(self, context: PruningContext) -> Decision:
        """The evidence, which the caller has to give."""
        evidence = context.evidence
        if evidence is None:
            raise UsageError("method oracle needs the evidence: prefill(…, evidence=mask)")
        importance = torch.where(evidence, SURE, -SURE)
        return Decision(context.select(importance), importance)


class Nothing(AfterTwoThirds):
    """Drops every visual token where GlimpsePrune looks: after two thirds of the layers."""

    name = "nothing"
    about = "no visual tokens after K = ⌈2L/3⌉ layers; how much is known without them"
    budget = "fixed"

    def choose(self, context: PruningContext) -> Decision:
        """Nothing but videos, which no method prunes."""
        return Decision(~context.prunable)
