"""Polymorphic pruning: what is seen first, then what the text is like; the rest is clustered.

It has no public code, and its paper leaves much open; what is chosen here stands in brackets.
Before the decoder the tokens that receive most attention [in the last vision block] stay, and the
others are clustered by density peaks, kept and clustered as 54 : 10. After layers 3, 7 and 13 of 28
[scaled to the depth], visual tokens are compared with the question's [by their hidden states]: the
softmax over text of V·Tᵀ/√C. Text that is likened to more than the mean rates, visual tokens are
ranked by the mean over raters, and those that go are clustered again [54 : 10]. A cluster's mean
stands where its centre stood. The first stage keeps twice what a layer holds in the mean; [each
later one the same share of the one before, so that the mean is met].
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.schedule import scaled, solve
from nanoglimpse.methods.similarity import best, density_peaks, rest
from nanoglimpse.model.model import Model

LAYERS, DEPTH, FIRST, CLUSTERED = (3, 7, 13), 28, 2.0, 10 / 64


class Polymorphic(PruningMethod):
    """One stage by attention, three by likeness to the text."""

    name = "polymorphic"
    about = "Polymorphic, two kinds of stages: before the decoder by attention, then by the text"

    def layers(self, model: Model) -> Sequence[int]:
        """Before the decoder, and after layers 3, 7 and 13 of 28, scaled and apart."""
        return [0, *scaled(LAYERS, DEPTH, model.depth)]

    def needs(self, model: Model) -> Needs:
        """Attention of the last block of the vision encoder, then hidden rows."""
        return Needs(vision_blocks=(len(model.vision.blocks) - 1,), hidden=True)

    def levels(self, model: Model) -> list[float]:
        """What each stage leaves, in terms of what the last one does."""
        spans, depth = self.spans(model), model.depth
        decay = solve(lambda x: FIRST * sum(s * x**i for i, s in enumerate(spans)), depth)
        return [decay ** (i - len(LAYERS)) for i in range(len(spans))]

    def spans(self, model: Model) -> list[int]:
        """Layers behind each stage, up to the next."""
        ends = [*self.layers(model), model.depth]
        return [end - start for start, end in pairwise(ends)]

    def stage_ratio(self, model: Model, ratio: float, kv_drop: str) -> float:
        """What the last stage leaves."""
        if kv_drop == "all":
            return ratio
        stages = list(zip(self.spans(model), self.levels(model), strict=True))
        depth = model.depth
        return solve(
            lambda x: sum(span * min(level * x, 1) for span, level in stages), ratio * depth
        )

    def choose(self, context: PruningContext) -> Decision:
        """The stage's choice: image by image, then prompt by prompt."""
        ratio = min(self.levels(context.model)[context.stage] * context.max_ratio, 1.0)
        if context.stage:
            return self._by_text(context, ratio)
        (score,) = context.block_stats.received.values()
        values = context.visual.clone()
        kept = context.with_ratio(ratio).per_image(
            lambda own, count: condense(values[own], score[own], count)
        )
        return Decision(kept, values=values[kept])

    def _by_text(self, context: PruningContext, ratio: float) -> Decision:
        values, kept = context.hidden[context.batch.visual_rows].clone(), ~context.prunable
        for prompt, own in enumerate(context.prompts()):
            mine = own.start + context.prunable[own].nonzero().flatten()
            allowed = max(
                int(ratio * context.original_counts[prompt]), context.rule.min_tokens or 0
            )
            seen = values[mine]
            score = likeness(seen, context.hidden[context.question(prompt)])
            kept[mine[condense(seen, score, allowed)]] = True
            values[mine] = seen
        return Decision(kept, values=values[kept])


def likeness(seen: Tensor, text: Tensor) -> Tensor:
    """fp32 [N], what the raters among rows of text [T, C] say of rows seen [N, C]."""
    alike = (seen.float() @ text.float().T / seen.shape[1] ** 0.5).softmax(1)
    liked = alike.mean(0)
    return alike[:, liked >= liked.mean()].mean(1).nan_to_num()  # where there is no text


def condense(values: Tensor, score: Tensor, allowed: int) -> Tensor:
    """Which rows of values [N, C] stay, int64; centres of the others' clusters become the mean."""
    if allowed >= len(values):
        return torch.arange(len(values), device=values.device)
    clusters = round(CLUSTERED * allowed)
    chosen = best(score, allowed - clusters)
    if not clusters:
        return chosen
    others = rest(len(values), chosen)
    centres, member = density_peaks(values[others].float(), clusters)
    sums = torch.zeros(clusters, values.shape[1], device=values.device)
    sums.index_add_(0, member, values[others].float())
    counts = torch.bincount(member, minlength=clusters)
    values[others[centres]] = (sums / counts[:, None]).to(values.dtype)
    return torch.cat((chosen, others[centres]))
