"""VScan (arXiv 2505.22654): two stages, before the decoder and in its middle.

After the public code for Qwen2.5-VL (qwen2_5_vl_custom.py). First half the tokens are the most
attended of their 4 × 4 window in the first block that attends to the whole image, the other half
the most attended of the last one, and each token that goes joins the most similar one that stays,
which becomes their mean. Then the next layer's projections, without rotary embedding, say what the
last prompt token attends to. Shares are those of the code, a third of the first stage's in the
second, scaled to the cap. Unlike there, attention is that of the block as it runs, grids of less
than four rows work, windows that cannot fill their quota leave it to the best of the others, and
each image has its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch import last_rows
from .base import Choice, Look, Method
from .similarity import best, nearest, rest

if TYPE_CHECKING:
    from ..engine import Engine

WINDOW, SECOND_SHARE = 4, 1 / 3


class VScan(Method):
    """Local and global tokens, then what the text looks at."""

    name = "vscan"
    about = "VScan, arXiv 2505.22654: local and global tokens, others merged; then half way again"

    def stops(self, engine: "Engine") -> Sequence[int]:
        """Before the decoder, and after half its layers."""
        return (0, -(-engine.config.text_config.num_hidden_layers // 2))

    def watches(self, engine: "Engine") -> Sequence[int]:
        """The first and the last block that attend to the whole image."""
        blocks = sorted(engine.config.vision_config.fullatt_block_indexes)
        return (blocks[0], blocks[-1])

    def share(self, engine: "Engine", ratio: float, kv_drop: str) -> float:
        """What the second stage leaves of all tokens."""
        if kv_drop == "all":
            return ratio
        depth, half = engine.config.text_config.num_hidden_layers, self.stops(engine)[1]
        first = ratio * depth / (half + (depth - half) * SECOND_SHARE)
        if first <= 1:
            return first * SECOND_SHARE
        return max((ratio * depth - half) / (depth - half), 0.0)

    def choose(self, look: Look) -> Choice:
        """The stage's choice."""
        final = look.rule.max_ratio
        first = min(final / SECOND_SHARE, 1.0)
        if look.stage:
            again = replace(look, rule=replace(look.rule, max_ratio=final / first))
            return Choice(again.by_rule(again.mean_softmax(self._ranking(look)), threshold=0.0))
        return self._scan(replace(look, rule=replace(look.rule, max_ratio=first)))

    def _ranking(self, look: Look) -> Tensor:
        """Logits [T, HQ] of each prompt's last row in the next layer, unrotated."""
        block, batch = look.engine.decoder.layers[self.stops(look.engine)[1]], look.batch
        last = last_rows(batch.counts, look.hidden.device)
        q = block.linear_heads(look.hidden[last], 0, block.heads)
        k = block.linear_heads(look.hidden, block.heads, block.heads + block.kv_heads)
        pairs = zip(q, k.split(batch.counts), strict=True)
        return torch.cat([look.engine.ops.row_logits(*pair) for pair in pairs])

    def _scan(self, look: Look) -> Choice:
        local, whole = (look.watch.received[block] for block in self.watches(look.engine))
        values = look.visual.clone()
        sizes = {own.start: size for own, size in look.images()}

        def pick(own: slice, count: int) -> Tensor:
            near = of_windows(local[own], *sizes[own.start], count // 2)
            score = whole[own].clone()
            score[near] = -torch.inf
            chosen = torch.cat((near, best(score, count - len(near))))
            average(values[own], chosen)
            return chosen

        kept = look.per_image(pick)
        return Choice(kept, values=values[kept])


def of_windows(score: Tensor, height: int, width: int, count: int) -> Tensor:
    """int64 [count], the best of each window of a grid; what is left of windows joins the last."""
    down, across = max(height // WINDOW, 1), max(width // WINDOW, 1)
    rows = (torch.arange(height) // WINDOW).clamp_max(down - 1)
    columns = (torch.arange(width) // WINDOW).clamp_max(across - 1)
    window = (rows[:, None] * across + columns).flatten().tolist()
    limit, taken = -(-count // (down * across)), [0] * (down * across)
    order = best(score, len(score)).tolist()
    chosen: list[int] = []
    for token in order:
        if len(chosen) < count and taken[window[token]] < limit:
            taken[window[token]] += 1
            chosen.append(token)
    spare = set(order) - set(chosen)
    chosen += [token for token in order if token in spare][: count - len(chosen)]
    return torch.tensor(chosen, dtype=torch.int64, device=score.device)


def average(values: Tensor, chosen: Tensor) -> None:
    """Makes each chosen token [in place] the mean of itself and of those most like it."""
    others = rest(len(values), chosen)
    if not len(others) or not len(chosen):
        return
    _, joins = nearest(values[others], values[chosen])
    sums = values[chosen].float().index_add_(0, joins, values[others].float())
    counts = 1 + torch.bincount(joins, minlength=len(chosen))
    values[chosen] = (sums / counts[:, None]).to(values.dtype)
