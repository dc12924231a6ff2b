"""SparseVLM (arXiv 2410.04417), version 1.5 of its code: text rates what is seen.

Raters are the question's tokens whose embeddings are closest to the picture (softmax over text of
V·Tᵀ, the mean over visual tokens, above the mean over text). After three layers the visual tokens
that the raters attend to most stay. Of the others the better three tenths are clustered (DPC-KNN)
into a tenth as many, and the mean of a cluster goes on in the place of its centre.

The code has fixed lists of counts for 576 tokens, of layers of 32, and inserts the clusters behind
the kept tokens with positions that are no longer theirs. Here the list 300, 200, 110 is scaled to
the cap, the clusters are counted in, layers are scaled to the model's depth, and a cluster has its
centre's position.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UsageError
from ..kernels.ops import Rope
from .base import Choice, Look, Method, solve
from .clusters import density_peaks
from .similarity import best, rest

if TYPE_CHECKING:
    from ..engine import Engine

LAYERS = (2, 6, 15)
RECYCLED, CLUSTERED = 0.3, 0.1


class SparseVLM(Method):
    """Three stages rated by the question, what they drop partly recycled.

    Attributes:
        levels: what each stage leaves, in terms of what the last one does.
    """

    name = "sparsevlm"
    about = "SparseVLM 1.5, arXiv 2410.04417: three stages, rated by the question, rest clustered"
    levels: tuple[float, ...] = (300 / 110, 200 / 110, 1.0)

    def stops(self, engine: "Engine") -> Sequence[int]:
        """After layers 2, 6 and 15 of 32, scaled and apart."""
        depth, stops = engine.config.text_config.num_hidden_layers, [0]
        for layer in LAYERS:
            stops.append(max(round(depth * layer / 32), stops[-1] + 1))
        return stops[1:]

    def reads(self, engine: "Engine") -> Sequence[int]:
        """The layers before the stops."""
        return [stop - 1 for stop in self.stops(engine)]

    def share(self, engine: "Engine", ratio: float, kv_drop: str) -> float:
        """What the last stage leaves, clusters included."""
        if kv_drop == "all":
            return ratio
        depth = engine.config.text_config.num_hidden_layers
        first, second, third = self.stops(engine)
        spans = (second - first, third - second, depth - third)
        stages = list(zip(spans, self.levels, strict=True))
        final = solve(
            lambda x: first + sum(span * min(level * x, 1.0) for span, level in stages),
            ratio * depth,
        )
        if final < 1e-6:
            raise UsageError(
                f"method {self.name} leaves the cache of {first} of {depth} layers alone, so that "
                f"{ratio:g} cannot be reached; give a larger max_ratio, or kv_drop all"
            )
        return final

    def choose(self, look: Look) -> Choice:
        """The stage's choice, prompt by prompt."""
        ((_, layer),) = look.layers.items()
        values, kept, seen = look.hidden[look.batch.visual_rows].clone(), ~look.batch.prunable, 0
        first = 0
        for prompt, own in enumerate(look.prompts()):
            whole = look.source_counts[prompt]
            raters = self.raters(look, prompt, look.source[seen : seen + whole])
            mine = own.start + look.batch.prunable[own].nonzero().flatten()
            rows = look.batch.visual_rows[mine]
            score = torch.zeros(len(mine), layer.block.heads, device=mine.device)
            for rater, weights in zip(raters, layer.attention(raters, prompt), strict=True):
                score += self.weighed(weights[rows - first], layer.rope, rater, rows)
            allowed = int(look.rule.max_ratio * self.levels[look.stage] * whole)
            allowed = max(allowed, look.rule.min_tokens or 0)
            kept[self.stay(values, mine, score, allowed)] = True
            seen, first = seen + whole, first + look.batch.counts[prompt]
        return Choice(kept, values=values[kept])

    def weighed(self, attention: Tensor, rope: Rope, rater: Tensor, rows: Tensor) -> Tensor:
        """What a rater's attention [N, HQ] to rows, int64 [N], counts."""
        return attention

    def stay(self, values: Tensor, mine: Tensor, score: Tensor, allowed: int) -> Tensor:
        """Which of a prompt's visual tokens stay, by scores [N, HQ]; `values` [in place]."""
        return recycle(values, mine, score.mean(1), allowed)

    def raters(self, look: Look, prompt: int, source: Tensor) -> Tensor:
        """int64, rows of the question's tokens that are closer to the picture than the mean."""
        rows = look.question(prompt)
        if not len(source) or not len(rows):
            return rows[:0]
        text = look.engine.decoder.embed_tokens(look.batch.token_ids[rows]).float()
        closeness = (source.float() @ text.T).softmax(1).mean(0)
        return rows[closeness >= closeness.mean()]


def recycle(values: Tensor, own: Tensor, score: Tensor, allowed: int) -> Tensor:
    """Which of `own` stay, at most `allowed`; centres of clusters become the mean [in place]."""
    if allowed >= len(own):
        return own
    dropped = len(own) - allowed
    again = int(RECYCLED * dropped) + 1
    clusters = min(int(CLUSTERED * again) + 1, allowed)
    chosen = best(score, allowed - clusters)
    others = rest(len(own), chosen)
    others = others[best(score[others], min(again, len(others)))]
    centres, member = density_peaks(values[own[others]].float(), clusters)
    for number, centre in enumerate(centres.tolist()):
        group = own[others[member == number]]
        values[own[others[centre]]] = values[group].float().mean(0).to(values.dtype)
    return own[torch.cat((chosen, others[centres]))]
