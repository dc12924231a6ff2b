"""VisPruner (arXiv 2412.01818): half the tokens by attention, half by what they add.

After the public code (llava_arch.py) and its author's advice for Qwen2.5-VL: importance is the
attention received in the last vision block. Of the rest, ordered by importance, at most eight a
round leave: even places are compared with odd ones, and the even ones most like an odd one go. The
features compared are those before the merger. Unlike there, odd lengths work, and similarities are
computed in tiles.
"""

import torch
from torch import Tensor

from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.similarity import best, nearest
from nanoglimpse.model.model import Model

IMPORTANT, A_ROUND = 0.5, 8


class VisPruner(PruningMethod):
    """Important and diverse tokens, before the decoder."""

    name = "vispruner"
    about = "VisPruner, arXiv 2412.01818: before the decoder, half most attended, half most diverse"

    def needs(self, model: Model) -> Needs:
        """Attention of the last block of the vision encoder, and its features."""
        last = (len(model.vision.blocks) - 1,)
        return Needs(vision_blocks=last, taps=last)

    def choose(self, context: PruningContext) -> Decision:
        """Image by image."""
        (block,) = context.block_stats.blocks

        def pick(own: slice, count: int) -> Tensor:
            order = best(context.block_stats.received[block][own], own.stop - own.start)
            important = int(count * IMPORTANT)
            features = context.taps[0, own]
            spread = thin_out(features, order[important:], count - important)
            return torch.cat((order[:important], spread))

        return Decision(context.per_image(pick))


def thin_out(features: Tensor, order: Tensor, count: int) -> Tensor:
    """int64 [count], what is left of `order` when those most like another have gone."""
    while len(order) > count:
        even, odd = order[::2], order[1::2]
        leave = min(A_ROUND, len(order) - count, len(even))
        alike, _ = nearest(features[even], features[odd] if len(odd) else features[even])
        order = torch.cat((even[best(alike, len(even))[leave:]], odd))
    return order
