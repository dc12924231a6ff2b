"""SparseVLM (arXiv 2410.04417), versions 1.5 and 2.0 of its code: the text rates visual tokens.

Raters are the question's tokens whose embeddings are closest to the picture (softmax over text of
V·Tᵀ, the mean over visual tokens, above the mean over text). After three layers the visual tokens
that the raters attend to most stay. Of the others the better three tenths are clustered (DPC-KNN)
into a tenth as many, and the mean of a cluster goes on in the place of its centre.

The code has fixed lists of counts for 576 tokens, of layers of 32, and inserts the clusters behind
the kept tokens with positions that are no longer theirs. Here the list 300, 200, 110 is scaled to
the cap, the clusters are counted in, layers are scaled to the model's depth, and a cluster has its
centre's position.

SparseVLM+ is version 2.0. It clusters nothing and keeps positions. Attention is divided by what
rotary embedding alone makes of two rows, the product of all-ones vectors at their positions, and of
the heads only those count that attend to the picture most, 14 of the 28 of Qwen2.5-VL-7B, here
half. The product may pass zero at a distance; as in the code, tokens where it is negative come
last. The list of counts is 300, 200, 118; all else is as in version 1.5.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.schedule import scaled, solve, unreachable
from nanoglimpse.methods.similarity import best, density_peaks, rest
from nanoglimpse.model.model import Model

LAYERS = (2, 6, 15)
RECYCLED, CLUSTERED = 0.3, 0.1


class SparseVLM(PruningMethod):
    """Three stages rated by the question, what they drop partly recycled.

    Attributes:
        levels: what each stage leaves, in terms of what the last one does.
    """

    name = "sparsevlm"
    about = "SparseVLM 1.5, arXiv 2410.04417: three stages, rated by the question, rest clustered"
    levels: tuple[float, ...] = (300 / 110, 200 / 110, 1.0)

    def layers(self, model: Model) -> Sequence[int]:
        """After layers 2, 6 and 15 of 32, scaled and apart."""
        return scaled(LAYERS, 32, model.depth)

    def needs(self, model: Model) -> Needs:
        """Attention of the layer before each stage, and hidden rows, which clusters average."""
        return Needs(attention=tuple(stop - 1 for stop in self.layers(model)), hidden=True)

    def stage_ratio(self, model: Model, ratio: float, kv_drop: str) -> float:
        """What the last stage leaves, clusters included."""
        if kv_drop == "all":
            return ratio
        depth = model.depth
        first, second, third = self.layers(model)
        spans = (second - first, third - second, depth - third)
        stages = list(zip(spans, self.levels, strict=True))
        final = solve(
            lambda x: first + sum(span * min(level * x, 1.0) for span, level in stages),
            ratio * depth,
        )
        if final < 1e-6:
            raise unreachable(self.name, first, depth, ratio)
        return final

    def choose(self, context: PruningContext) -> Decision:
        """The stage's choice, prompt by prompt."""
        ((_, layer),) = context.layers.items()
        values = context.hidden[context.batch.visual_rows].clone()
        kept, seen, first = ~context.prunable, 0, 0
        for prompt, own in enumerate(context.prompts()):
            whole = context.original_counts[prompt]
            raters = self.raters(context, prompt, context.vision.visual[seen : seen + whole])
            mine = own.start + context.prunable[own].nonzero().flatten()
            rows = context.batch.visual_rows[mine]
            score = torch.zeros(len(mine), layer.block.heads, device=mine.device)
            for rater, weights in zip(raters, layer.attention(raters, prompt), strict=True):
                score += self.weighed(weights[rows - first], layer.rope, rater, rows)
            allowed = int(context.max_ratio * self.levels[context.stage] * whole)
            allowed = max(allowed, context.rule.min_tokens or 0)
            kept[self.stay(values, mine, score, allowed)] = True
            seen, first = seen + whole, first + context.batch.counts[prompt]
        return Decision(kept, values=values[kept])

    def weighed(self, attention: Tensor, rope: Rope, rater: Tensor, rows: Tensor) -> Tensor:
        """What a rater's attention [N, HQ] to rows, int64 [N], counts."""
        return attention

    def stay(self, values: Tensor, mine: Tensor, score: Tensor, allowed: int) -> Tensor:
        """Which of a prompt's visual tokens stay, by scores [N, HQ]; `values` [in place]."""
        return recycle(values, mine, score.mean(1), allowed)

    def raters(self, context: PruningContext, prompt: int, source: Tensor) -> Tensor:
        """int64, rows of the question's tokens that are closer to the picture than the mean."""
        rows = context.question(prompt)
        if not len(source) or not len(rows):
            return rows[:0]
        text = context.model.decoder.embed_tokens(context.batch.token_ids[rows]).float()
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


class SparseVLMPlus(SparseVLM):
    """Three stages rated by the question, without the pull of positions."""

    name = "sparsevlm+"
    about = "SparseVLM 2.0: the same, attention without the pull of positions, rest dropped"
    levels = (300 / 118, 200 / 118, 1.0)

    def weighed(self, attention: Tensor, rope: Rope, rater: Tensor, rows: Tensor) -> Tensor:
        """Attention without the distance."""
        return attention / pull(rope, rater, rows)[:, None]

    def stay(self, values: Tensor, mine: Tensor, score: Tensor, allowed: int) -> Tensor:
        """The best."""
        return mine[best(leading(score), allowed)]


def pull(rope: Rope, row: Tensor, rows: Tensor) -> Tensor:
    """fp32 [N], what rotation leaves of the product of one row and others, all ones; at most 1."""
    near = rope.cos[rows, 0] @ rope.cos[row, 0] + rope.sin[rows, 0] @ rope.sin[row, 0]
    return near / rope.cos.shape[-1]


def leading(score: Tensor) -> Tensor:
    """fp32 [N], the mean of scores [N, HQ] over the half of the heads with the largest sums."""
    heads = best(score.sum(0), max(score.shape[1] // 2, 1))
    return score[:, heads].mean(1)
