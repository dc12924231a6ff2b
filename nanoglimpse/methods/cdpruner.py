"""CDPruner (arXiv 2506.10967): a determinantal point process conditioned on the question.

There is no public code for Qwen2.5-VL. As its author describes the port (issues of the public
repository), images and instruction both live in the decoder's embedding space: relevance is the
mean cosine of a visual token to the question's token embeddings, with a plus sign (the public
code's minus is for CLIP, whose patch and text features are opposed). The relevance is scaled per
image, the kernel's rows are computed when they are needed, and the greedy MAP of the public code
(incremental Cholesky) is kept above zero by 1e-12.
"""

import torch
from torch import Tensor

from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.similarity import unit
from nanoglimpse.model.model import Model


class CDPruner(PruningMethod):
    """Relevant to the question and unlike each other, before the decoder."""

    name = "cdpruner"
    about = "CDPruner, arXiv 2506.10967: before the decoder, tokens near the question and diverse"

    def needs(self, model: Model) -> Needs:
        """The question's embeddings, before the decoder."""
        return Needs(hidden=True, question=True)

    def choose(self, context: PruningContext) -> Decision:
        """Greedy, image by image."""
        texts = {
            own.start: unit(context.hidden[context.question(number)])
            for number, own in enumerate(context.prompts())
        }

        def pick(own: slice, count: int) -> Tensor:
            text = texts[max(start for start in texts if start <= own.start)]
            x = unit(context.visual[own])
            return conditional(x, (x @ text.T).mean(1), count)

        return Decision(context.per_image(pick))


def conditional(x: Tensor, relevance: Tensor, count: int) -> Tensor:
    """int64 [count], the greedy MAP of a DPP in the order it is chosen.

    Args:
        x: [N, D], unit rows.
        relevance: [N], on any scale.
        count: how many.
    """
    low, high = relevance.min(), relevance.max()
    r = (relevance - low + 1e-6) / (high - low).clamp_min(1e-6)
    rows, gain = x * r[:, None], r * r
    spanned = x.new_zeros(count, x.shape[1])
    chosen: list[Tensor] = []
    for step in range(count):
        pick = gain.argmax()
        new = rows[pick] - (spanned[:step] @ rows[pick]) @ spanned[:step]
        spanned[step] = new / gain[pick].clamp_min(1e-12).sqrt()
        gain = (gain - (rows @ spanned[step]).square()).clamp_min(1e-12)
        chosen.append(pick)
        gain[torch.stack(chosen)] = -torch.inf
    return torch.stack(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=x.device)
