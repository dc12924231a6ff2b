"""FLOPs of pictures, prompts and answers, as they run here and as the paper counts them.

A multiply-add is two operations. A decoder layer computes keys and values of the rows that write,
q, o and MLP of the rows that attend, and scores and sums of the pairs of rows in attention; a list
of `LayerRows` says how many. Norms, rotations and softmax are not counted. Of a method's own choice
only the products of GlimpsePrune's are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanoglimpse.config import Config, TextConfig
from nanoglimpse.inference.outputs import Prefill
from nanoglimpse.inference.session import Session
from nanoglimpse.methods.glimpse import GlimpsePrune
from nanoglimpse.model.glimpse import Predictor
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import Grid
from nanoglimpse.model.vision import window_layout


class LayerRows(NamedTuple):
    """What a layer of the decoder does for one sequence.

    Attributes:
        writes: rows whose keys and values it computes.
        attends: how many of them go on to attention and MLP.
        pairs: of a row that attends and a row that it sees.
        before: rows whose keys and values are there already.
    """

    writes: int
    attends: int
    pairs: int
    before: int = 0

    @classmethod
    def all(cls, rows: int, before: int = 0) -> "LayerRows":
        """Rows that all attend, causally."""
        return cls(rows, rows, rows * before + rows * (rows + 1) // 2, before)

    @classmethod
    def some(cls, rows: int, places: Sequence[int]) -> "LayerRows":
        """Rows of which those at these places attend."""
        return cls(rows, len(places), sum(places) + len(places))

    @classmethod
    def last(cls, rows: int, before: int = 0) -> "LayerRows":
        """Rows of which the last one attends."""
        return cls(rows, 1, before + rows, before)

    @classmethod
    def square(cls, rows: int, keys: int) -> "LayerRows":
        """Rows that see all keys, those behind them too: the paper's convention."""
        return cls(rows, rows, rows * keys)


@dataclass(frozen=True)
class RowCounts:
    """The rows of one prompt on their way through L layers.

    Attributes:
        total: T, before pruning.
        visual: N of them.
        processed: visual rows that each layer processes.
        cached: visual rows that each layer's cache holds.
        stops: layers after which a method looked.
        probe: whether a glimpse rode through the layers before that.
        survivors: places of the rows that alone attend in the layer before the only stop, where
            the method looks inside it; None where it waits for its end.
    """

    total: int
    visual: int
    processed: Sequence[int]
    cached: Sequence[int]
    stops: Sequence[int] = ()
    probe: bool = False
    survivors: Sequence[int] | None = None

    @classmethod
    def of(cls, prefill: Prefill, prompt: int = 0) -> "RowCounts":
        """Those of one prompt of a prefill."""
        pruning, batch = prefill.pruning, prefill.batch
        survivors = None
        if any(pruning.layers) and not pruning.needs.hidden and prefill.hidden is None:
            remaining, rows = batch.keep(prefill.kept)
            own = rows.split(remaining.counts)[prompt]
            survivors = (own - sum(batch.counts[:prompt])).tolist()
        return cls(
            total=batch.counts[prompt],
            visual=batch.visual_counts[prompt],
            processed=[layer[prompt] for layer in prefill.processed],
            cached=[layer[prompt] for layer in prefill.cached],
            stops=pruning.layers,
            probe=pruning.probe is not None,
            survivors=survivors,
        )

    @property
    def text(self) -> int:
        """Rows that are not visual tokens."""
        return self.total - self.visual

    @property
    def stop(self) -> int:
        """Layers that have run at the last look; 0 if there is none inside the decoder."""
        return max(self.stops, default=0)

    def prefill(self) -> list[LayerRows]:
        """Each layer up to the first logits; if none has to wait for it, the last for one row."""
        layers = []
        for layer, visual in enumerate(self.processed):
            rows = self.text + visual + (self.probe and layer < self.stop)
            if self.survivors is not None and layer == self.stop - 1:
                layers.append(LayerRows.some(rows, self.survivors))
            elif layer == len(self.processed) - 1 and self.stop < len(self.processed):
                layers.append(LayerRows.last(rows))
            else:
                layers.append(LayerRows.all(rows))
        return layers

    def step(self, number: int) -> list[LayerRows]:
        """Each layer for the answer's token of this number, from 1: it is read to get the next."""
        return [LayerRows.all(1, self.text + visual + number - 1) for visual in self.cached]

    def paper_prefill(self) -> list[LayerRows]:
        """As the paper's public code counts: after pruning the survivors, and the text not."""
        counts = (self.total if n == self.visual else n for n in self.processed)
        return [LayerRows.square(n, n) for n in counts]

    def paper_step(self, number: int) -> list[LayerRows]:
        """As there, from 0: the first token takes a step, too, and a pruned cache has no text."""
        counts = (self.total if n == self.visual else n for n in self.cached)
        return [LayerRows.square(1, n + number) for n in counts]


def session_prefix(session: Session) -> list[LayerRows]:
    """What a session does once; in the last of all layers nothing asks yet."""
    prefix = session.prefix
    layers = [LayerRows.all(prefix.num_rows)] * len(prefix.shared.layers)
    return layers if prefix.shared.stop else [*layers[1:], LayerRows(prefix.num_rows, 0, 0)]


def session_question(session: Session, rows: RowCounts) -> list[LayerRows]:
    """What a question then takes; `rows` are those of its prefill."""
    shared, before = session.prefix.shared, session.prefix.num_rows
    new = rows.total - len(session.prompt)
    if not shared.stop:
        whole = [LayerRows.all(new, before)] * (len(shared.layers) - 1)
        return [*whole, LayerRows.last(new, before)]
    below = [LayerRows.all(new + rows.probe, before)] * len(shared.layers)
    return below + rows.prefill()[shared.stop :]


def decoder(config: TextConfig, layers: Iterable[LayerRows]) -> int:
    """FLOPs of layers of the decoder."""
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    write = 2 * config.hidden_size * 2 * kv
    attend = 2 * config.hidden_size * (2 * query + 3 * config.intermediate_size)
    return sum(n.writes * write + n.attends * attend + 4 * n.pairs * query for n in layers)


def head(config: TextConfig) -> int:
    """FLOPs of one row's logits."""
    return 2 * config.hidden_size * config.vocab_size


def vision(config: Config, grids: Sequence[Grid]) -> int:
    """FLOPs of the vision encoder and its merger: windows attend inside, few layers fully."""
    v = config.vision_config
    layout = window_layout(tuple(grids), v, torch.device("cpu"))
    patches = len(layout.patches)
    linear = v.hidden_size * (4 * v.hidden_size + 3 * v.intermediate_size)
    pairs = {True: sum(n * n for n in layout.frames.lengths)}
    pairs[False] = sum(n * n for n in layout.windows.lengths)
    attention = sum(pairs[i in v.fullatt_block_indexes] for i in range(v.depth)) * v.hidden_size
    unit = v.hidden_size * v.merge_unit
    merger = patches // v.merge_unit * unit * (unit + v.out_hidden_size)
    return 2 * (patches * (v.depth * linear + v.patch_dim * v.hidden_size) + merger) + 4 * attention


def predict(predictor: Predictor, grids: Sequence[Grid]) -> int:
    """FLOPs of GlimpsePrune's predictor."""
    lengths = predictor.layout(tuple(grids), torch.device("cpu"))[1].lengths
    modules = predictor.named_parameters()
    products = sum(p.numel() for name, p in modules if p.dim() == 2)
    attended = sum(block.heads * (block.qk_dim + block.v_dim) for block in predictor.layers)
    return 2 * sum(lengths) * products + 2 * sum(n * n for n in lengths) * attended


def glimpse_logits(model: Model, rows: int) -> int:
    """FLOPs of the glimpse's q and its logits to so many rows, in the layers that are read."""
    text = model.text
    query = text.num_attention_heads * text.head_dim
    return 2 * len(model.glimpse_weights.config.selected_layers) * query * (text.hidden_size + rows)


def count(model: Model, prefill: Prefill, prompt: int, tokens: int) -> dict[str, float]:
    """FLOPs of a prompt and its answer by part; `paper …` are as the paper counts them.

    Args:
        model: that ran.
        prefill: of prompts.
        prompt: which of them.
        tokens: of the answer; the first comes out of the prefill.
    """
    config, rows = model.text, RowCounts.of(prefill, prompt)
    grids, predicted, asked = prefill.batch.grids[prompt], 0, 0
    if isinstance(prefill.pruning.method, GlimpsePrune):
        predicted = predict(model.glimpse_weights.predictor, grids)
        asked = glimpse_logits(model, rows.total)
    return {
        "vision": vision(model.config, grids),
        "prefill": decoder(config, rows.prefill()) + head(config) + predicted + asked,
        "decode": sum(decoder(config, rows.step(n)) + head(config) for n in range(1, tokens)),
        "paper prefill": decoder(config, rows.paper_prefill()) + predicted,
        "paper decode": sum(decoder(config, rows.paper_step(n)) for n in range(tokens)),
    }
