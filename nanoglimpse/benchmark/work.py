"""What each stage of an answer has to compute and to move, whatever computes it.

`nanoglimpse.flops` counts the operations. Bytes are weights read once a call, rows read and written
once a layer, and the cache; what a good kernel keeps on the chip is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nanoglimpse import flops as cost
from nanoglimpse.engine import Engine
from nanoglimpse.flops import LayerRows, RowCounts
from nanoglimpse.model.rope import Grid, visual_tokens


@dataclass(frozen=True)
class Cost:
    """Operations and bytes."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """The least time on a device with `rate` FLOP/s and `bandwidth` bytes/s."""
        return max(self.flops / rate, self.bytes / bandwidth)


class Work:
    """Costs of an engine's stages for B copies of one prompt.

    Attributes:
        grids: the grids of the prompt's pictures.
        rows: the prompt's rows in each layer.
        batch: B.
        kv: elements of keys and values in a row of the cache of one layer.
        weights: bytes of a layer of the decoder.
    """

    def __init__(self, engine: Engine, grids: Sequence[Grid], rows: RowCounts, batch: int):
        self.engine, self.grids, self.rows, self.batch = engine, tuple(grids), rows, batch
        self.text, self.size = engine.config.text_config, engine.dtype.itemsize
        self.width = self.text.hidden_size
        self.kv = 2 * self.text.num_key_value_heads * self.text.head_dim
        self.weights = _bytes(engine.decoder.layers) / self.text.num_hidden_layers

    def vision(self) -> Cost:
        """The encoder and its merger."""
        v = self.engine.config.vision_config
        patches = v.merge_unit * sum(visual_tokens(grid, self.engine.config) for grid in self.grids)
        moved = patches * (v.patch_dim + 2 * v.depth * v.hidden_size) * self.size
        flops = cost.vision(self.engine.config, self.grids)
        return Cost(self.batch * flops, _bytes(self.engine.vision) + self.batch * moved)

    def layers(self, layers: Sequence[LayerRows]) -> Cost:
        """Layers of the decoder."""
        cached = sum(n.writes + n.before for n in layers) * self.kv
        hidden = sum(n.writes + n.attends for n in layers) * self.width
        moved = len(layers) * self.weights + self.batch * (cached + hidden) * self.size
        return Cost(self.batch * cost.decoder(self.text, layers), moved)

    def score(self) -> Cost:
        """The glimpse row's logits and the predictor."""
        model, glimpse = self.engine.model, self.engine.model.glimpse_weights
        taps = len(glimpse.config.selected_visual_layers) * model.config.vision_config.hidden_size
        flops = cost.predict(glimpse.predictor, self.grids)
        flops += cost.glimpse_logits(model, self.rows.total)
        moved = self.rows.visual * (self.kv / 2 + taps) * self.size
        return Cost(self.batch * flops, _bytes(glimpse.predictor) + self.batch * moved)

    def keep(self) -> Cost:
        """The gather that reads and writes hidden rows and the cache of the layers below it."""
        row = self.rows.stop * self.kv + self.width
        return Cost(0, 2 * self.batch * len(self.rows.survivors or ()) * row * self.size)

    def head(self) -> Cost:
        """The logits of one row of each prompt."""
        head = self.engine.decoder.lm_head or self.engine.decoder.embed_tokens
        return Cost(self.batch * cost.head(self.text), _bytes(head))

    def step(self, number: int) -> Cost:
        """The decode step of the answers' token of this number, from 1."""
        return self.layers(self.rows.step(number)) + self.head()


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
