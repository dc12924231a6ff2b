"""What each stage of an answer has to compute and to move, whatever computes it.

A multiply-add is two operations. Attention of the decoder is causal and counts the pairs that a
row sees; the last layer runs for the last row alone, as it does here, and of layer K only what
survives attends. Bytes are weights read once a call, rows read and written once a layer, and the
cache; what a good kernel keeps on the chip is not counted. `paper_prefill` is the convention of the
paper's tables instead (official cal_flops.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .config import Config
from .engine import Engine
from .rope import Grid
from .vision import layout


class Cost(NamedTuple):
    """Operations and bytes."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """The least that a device of so many FLOP/s and bytes/s needs."""
        return max(self.flops / rate, self.bytes / bandwidth)


class Work:
    """Costs of an engine's stages for B copies of one prompt.

    Attributes:
        rows: of each prompt.
        visual: visual tokens of each prompt.
        batch: B.
    """

    def __init__(self, engine: Engine, grids: Sequence[Grid], rows: int, visual: int, batch: int):
        self.engine, self.grids = engine, tuple(grids)
        self.rows, self.visual, self.batch = rows, visual, batch
        self.size = torch.empty(0, dtype=engine.dtype).element_size()
        text = engine.config.text_config
        self.width, self.depth = text.hidden_size, text.num_hidden_layers
        self.kv = 2 * text.num_key_value_heads * text.head_dim
        self.weights = _bytes(engine.decoder.layers) / self.depth
        head = engine.decoder.lm_head or engine.decoder.embed_tokens
        self.head_weights = _bytes(head)
        self.later = self.width * (2 * self.width + 3 * text.intermediate_size)  # q, o, MLP

    def vision(self) -> Cost:
        """The encoder and its merger."""
        v = self.engine.config.vision_config
        plan = layout(self.grids, v, torch.device("cpu"))
        patches, unit = len(plan.patches), v.hidden_size * v.merge_unit
        linear = v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size)
        full = len(v.fullatt_block_indexes)
        pairs = full * sum(n * n for n in plan.frames.lengths)
        pairs += (v.depth - full) * sum(n * n for n in plan.windows.lengths)
        flops = 2 * patches * (v.depth * linear + v.patch_dim * v.hidden_size)
        flops += 4 * pairs * v.hidden_size
        flops += 2 * patches // v.merge_unit * unit * (unit + v.out_hidden_size)
        moved = patches * (v.patch_dim + 2 * v.depth * v.hidden_size) * self.size
        return Cost(self.batch * flops, _bytes(self.engine.vision) + self.batch * moved)

    def layers(self, count: int, rows: int, attending: int | None = None) -> Cost:
        """Decoder layers over sequences of so many rows, of which some only write.

        Args:
            count: of layers.
            rows: of each sequence.
            attending: how many of them go on to attention and MLP; all if None.
        """
        attending = rows if attending is None else attending
        pairs = attending * (rows + 1) / (2 if attending > 1 else 1)
        flops = 2 * (rows * self.width * self.kv + attending * self.later) + 4 * pairs * self.width
        moved = (rows * (self.width + self.kv) + attending * self.width) * self.size
        return Cost(
            count * self.batch * flops, count * ((rows > 0) * self.weights + self.batch * moved)
        )

    def prefill(self, first: int, rows: int) -> Cost:
        """Layers `first`… of a prompt that has so many rows left; the last for its last row."""
        if first >= self.depth:
            return Cost(0, 0)
        return self.layers(self.depth - first - 1, rows) + self.layers(1, rows, 1)

    def below(self, stop: int, left: int) -> Cost:
        """Layers up to `stop`, pruned inside the last of them to `left` rows."""
        return self.layers(stop - 1, self.rows) + self.layers(1, self.rows, left)

    def score(self) -> Cost:
        """The glimpse row's logits and the predictor."""
        config, own = self.engine.config, self.engine.glimpse.config
        n, size, condition = self.visual, own.attn_fuse_size, own.visual_cond_size
        both, taps = size + condition, len(own.selected_visual_layers)
        linear = 2 * both * both + 8 * size * size + config.vision_config.hidden_size * condition
        frames = [h * w // config.vision_config.merge_unit for _, h, w in self.grids]
        flops = taps * (2 * n * linear + 2 * sum(f * f for f in frames) * (both + size))
        flops += 2 * n * self.width * len(own.selected_layers)
        moved = n * (self.kv / 2 + taps * config.vision_config.hidden_size) * self.size
        return Cost(self.batch * flops, _bytes(self.engine.glimpse.predictor) + self.batch * moved)

    def keep(self, stop: int, left: int) -> Cost:
        """The gather of hidden rows and of the cache of `stop` layers: read and written."""
        return Cost(0, 2 * self.batch * left * (stop * self.kv + self.width) * self.size)

    def head(self) -> Cost:
        """Logits of one row a prompt."""
        flops = 2 * self.batch * self.width * self.engine.config.text_config.vocab_size
        return Cost(flops, self.head_weights)

    def step(self, rows: int) -> Cost:
        """One token for every prompt, whose cache holds so many rows in every layer."""
        flops = 2 * (self.width * self.kv + self.later) + 4 * rows * self.width
        cache = rows * self.kv * self.size
        moved = self.depth * (self.weights + self.batch * cache)
        return Cost(self.depth * self.batch * flops, moved) + self.head()


def paper_prefill(config: Config, stop: int, rows: int, left: int) -> float:
    """FLOPs of a prefill as the paper counts them: every pair of rows, all rows in all layers.

    Args:
        config: of the model.
        stop: layers that run over all rows.
        rows: of the prompt.
        left: visual tokens that survive; text is left out above K, as in the official code.
    """
    text = config.text_config
    size, kv = text.hidden_size, text.num_key_value_heads * text.head_dim

    def layer(n: int) -> float:
        linear = 2 * n * size * (2 * size + 2 * kv + 3 * text.intermediate_size)
        return linear + 4 * n * n * size

    return stop * layer(rows) + (text.num_hidden_layers - stop) * layer(left)


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
