"""PyramidDrop (arXiv 2410.17247): fewer visual tokens after each quarter of the layers.

After the public code (modeling_llama_pdrop.py): at a stage, the next layer's own norm and
projections, with rotary embedding, give the attention of the last prompt token, and the most
attended tokens stay. There the shares are 1, ½, ¼, ⅛ of all tokens; under a cap they fall
geometrically to the cap. Unlike there, positions are kept, several images share one budget, and
rows leave the cache of all layers.
"""

from collections.abc import Sequence
from itertools import pairwise

from nanoglimpse.inputs.prompt import last_rows
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.schedule import solve, unreachable
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import mrope

STAGES, LAST_SHARE = 3, 1 / 8


class PyramidDrop(PruningMethod):
    """Three stages inside the decoder."""

    name = "pdrop"
    about = "PyramidDrop, arXiv 2410.17247: in three stages, what the last prompt token attends to"
    budget = "adaptive"

    def layers(self, model: Model) -> Sequence[int]:
        """After each quarter of the layers but the last."""
        stages = range(1, STAGES + 1)
        return tuple(max(round(model.depth * stage / (STAGES + 1)), stage) for stage in stages)

    def needs(self, model: Model) -> Needs:
        """Hidden rows, which the next layer's projections score."""
        return Needs(hidden=True)

    def stage_ratio(self, model: Model, ratio: float, kv_drop: str) -> float:
        """The share that the last stage leaves."""
        if kv_drop == "all":
            return ratio
        depth = model.depth
        spans = [after - before for before, after in pairwise((0, *self.layers(model), depth))]
        last = solve(
            lambda x: sum(span * x ** (i / STAGES) for i, span in enumerate(spans)) / depth, ratio
        )
        if last < 1e-6:
            raise unreachable(self.name, spans[0], depth, ratio)
        return last

    def choose(self, context: PruningContext) -> Decision:
        """The most attended of this stage."""
        stage, cap = context.stage + 1, context.rule.max_ratio
        final = LAST_SHARE if cap is None else cap
        share, before = final ** (stage / STAGES), final ** ((stage - 1) / STAGES)
        model, batch, hidden = context.model, context.batch, context.hidden
        block = model.decoder.layers[self.layers(model)[context.stage]]
        rope = mrope(batch.positions, model.text)
        last = last_rows(batch.counts, hidden.device)
        _, k, _ = block.project(hidden, rope)
        q, segments = block.query(hidden[last], rope[last]), Segments(batch.counts, hidden.device)
        logits = model.ops.row_logits(q, k, segments)
        again = context.with_ratio(share / before)
        return Decision(again.select(context.mean_softmax(logits), threshold=0.0))
