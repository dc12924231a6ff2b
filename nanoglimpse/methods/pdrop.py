"""PyramidDrop (arXiv 2410.17247): after each quarter of the layers fewer tokens.

After the public code (modeling_llama_pdrop.py): at a stage the next layer's own norm and
projections, with rotary embedding, say what the last prompt token attends to, and the best stay.
There the shares are 1, ½, ¼, ⅛ of all tokens; under a cap they fall geometrically to the cap.
Unlike there, positions are kept, several images share one budget, and rows leave the cache of all
layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from ..batch import last_rows
from ..errors import UsageError
from ..rope import mrope
from .base import Choice, Look, Method

if TYPE_CHECKING:
    from ..engine import Engine

STAGES, LAST_SHARE = 3, 1 / 8


class PyramidDrop(Method):
    """Three stages inside the decoder."""

    name = "pdrop"
    about = "PyramidDrop, arXiv 2410.17247: in three stages, what the last prompt token attends to"
    capped = False

    def stops(self, engine: "Engine") -> Sequence[int]:
        """After each quarter of the layers but the last."""
        depth = engine.config.text_config.num_hidden_layers
        return tuple(max(round(depth * stage / (STAGES + 1)), stage) for stage in (1, 2, 3))

    def share(self, engine: "Engine", ratio: float, kv_drop: str) -> float:
        """What the last stage has to leave; the mean over layers grows with it, so it is halved."""
        if kv_drop == "all":
            return ratio
        depth = engine.config.text_config.num_hidden_layers
        ends = (0, *self.stops(engine), depth)
        spans = [after - before for before, after in pairwise(ends)]
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            held = sum(span * middle ** (i / STAGES) for i, span in enumerate(spans)) / depth
            low, high = (middle, high) if held < ratio else (low, middle)
        if high < 1e-6:
            raise UsageError(
                f"method pdrop leaves the cache of {spans[0]} of {depth} layers alone, so that "
                f"{ratio:g} cannot be reached; give a larger max_ratio, or kv_drop all"
            )
        return high

    def choose(self, look: Look) -> Choice:
        """The best of this stage."""
        stage = look.stage + 1
        final = LAST_SHARE if look.rule.max_ratio is None else look.rule.max_ratio
        share = final ** (stage / STAGES)
        before = final ** ((stage - 1) / STAGES)
        block, batch = look.engine.decoder.layers[self.stops(look.engine)[look.stage]], look.batch
        rope = mrope(batch.positions, look.engine.config.text_config)
        last = last_rows(batch.counts, look.hidden.device)
        _, k, _ = block.project(look.hidden, rope)
        pairs = zip(block.query(look.hidden[last], rope[last]), k.split(batch.counts), strict=True)
        logits = torch.cat([look.engine.ops.row_logits(*pair) for pair in pairs])
        seen = replace(look, rule=replace(look.rule, max_ratio=share / before))
        return Choice(seen.by_rule(look.mean_softmax(logits), threshold=0.0))
