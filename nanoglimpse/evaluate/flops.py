"""FLOPs of a prompt and its answer, exactly and in the paper's convention.

A multiply-add counts as two. What a method spends on its own choice is counted for GlimpsePrune
(its predictor) alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import Config, TextConfig
from ..glimpse import Predictor
from ..rope import Grid
from ..vision import layout


@dataclass(frozen=True)
class Rows:
    """The rows of one prompt on their way through L layers.

    Attributes:
        total: T, before pruning.
        visual: N of them.
        processed: visual rows that each layer processes.
        cached: visual rows that each layer's cache holds.
        stops: layers after which a method looked.
        probe: whether a glimpse rode through the layers before that.
    """

    total: int
    visual: int
    processed: Sequence[int]
    cached: Sequence[int]
    stops: Sequence[int] = ()
    probe: bool = False

    @property
    def text(self) -> int:
        """Rows that are not visual tokens."""
        return self.total - self.visual


def count(
    config: Config, rows: Rows, grids: Sequence[Grid], tokens: int, predictor: Predictor | None
) -> dict[str, float]:
    """FLOPs by part; `paper …` are the same work as the paper counts it.

    Args:
        config: of the model.
        rows: of the prompt.
        grids: (t, h, w) in patches of its pictures.
        tokens: of the answer.
        predictor: GlimpsePrune's, if it ran.
    """
    chosen = predict(predictor, grids) if predictor else 0
    return {
        "vision": vision(config, grids),
        "prefill": prefill(config.text_config, rows) + chosen,
        "decode": decode(config.text_config, rows, tokens),
        "paper prefill": paper_prefill(config.text_config, rows) + chosen,
        "paper decode": paper_decode(config.text_config, rows, tokens),
    }


def vision(config: Config, grids: Sequence[Grid]) -> int:
    """The vision encoder with its merger: windows attend inside themselves, few layers fully."""
    v = config.vision_config
    plan = layout(tuple(grids), v, torch.device("cpu"))
    patches = len(plan.patches)
    linear = v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size)
    pairs = {True: sum(n * n for n in plan.frames.lengths)}
    pairs[False] = sum(n * n for n in plan.windows.lengths)
    attention = sum(pairs[i in v.fullatt_block_indexes] for i in range(v.depth)) * v.hidden_size
    unit = v.hidden_size * v.merge_unit
    merger = patches // v.merge_unit * unit * (unit + v.out_hidden_size)
    return 2 * (patches * (v.depth * linear + v.patch_dim * v.hidden_size) + merger) + 4 * attention


def prefill(config: TextConfig, rows: Rows) -> int:
    """The decoder up to the first logits: causal pairs, the last layer for the last row alone."""
    depth, first = config.num_hidden_layers, max(rows.stops, default=0)
    flops = 2 * config.hidden_size * config.vocab_size
    for layer, visual in enumerate(rows.processed):
        n = rows.text + visual + (rows.probe and layer < first)
        if layer == depth - 1 and first < depth:
            flops += _write(config, n) + _attend(config, 1, n)
        else:
            flops += _write(config, n) + _attend(config, n, n * (n + 1) // 2)
    return flops


def decode(config: TextConfig, rows: Rows, tokens: int) -> int:
    """The tokens after the first, which comes out of the prefill."""
    flops = 0
    for step in range(1, tokens):
        flops += 2 * config.hidden_size * config.vocab_size
        for visual in rows.cached:
            flops += _write(config, 1) + _attend(config, 1, rows.text + visual + step)
    return flops


def predict(predictor: Predictor, grids: Sequence[Grid]) -> int:
    """GlimpsePrune's predictor."""
    lengths = predictor.plan(tuple(grids), torch.device("cpu"))[1].lengths
    modules = predictor.named_parameters()
    products = sum(p.numel() for name, p in modules if p.dim() == 2)
    attended = sum(block.heads * (block.qk_dim + block.v_dim) for block in predictor.layers)
    return 2 * sum(lengths) * products + 2 * sum(n * n for n in lengths) * attended


def paper_prefill(config: TextConfig, rows: Rows) -> int:
    """As the public code of the paper counts.

    Decoder layers alone, attention without the causal half, the last layer for all rows; after
    pruning the visual survivors count and the text does not.
    """
    return sum(
        _paper_layer(config, rows.total, rows.total)
        if visual == rows.visual
        else _paper_layer(config, visual, visual)
        for visual in rows.processed
    )


def paper_decode(config: TextConfig, rows: Rows, tokens: int) -> int:
    """As there: one step for every token, the first too; of a pruned cache the survivors alone."""
    flops = 0
    for visual in rows.cached:
        cached = rows.total if visual == rows.visual else visual
        flops += sum(_paper_layer(config, 1, cached + step) for step in range(tokens))
    return flops


def _write(c: TextConfig, n: int) -> int:
    """k and v of n rows."""
    return 2 * n * c.hidden_size * 2 * c.num_key_value_heads * c.head_dim


def _attend(c: TextConfig, n: int, pairs: int) -> int:
    """q, o and the MLP of n rows; scores and sums of so many pairs of rows."""
    return 2 * n * c.hidden_size * (2 * c.hidden_size + 3 * c.intermediate_size) + (
        4 * pairs * c.hidden_size
    )


def _paper_layer(c: TextConfig, n: int, keys: int) -> int:
    return _write(c, n) + _attend(c, n, n * keys)
