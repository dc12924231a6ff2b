"""FLOPs of pictures, prompts and answers, as they run here and as the paper counts them.

A multiply-add is two operations. A decoder layer computes keys and values of the rows that write,
q, o and MLP of the rows that attend, and scores and sums of the pairs of rows in attention; a list
of `LayerRows` has their numbers. Norms, rotations and softmax are not counted. Of the pruning
methods, only the matrix products of GlimpsePrune are counted.
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
    """The rows of one sequence in a layer of the decoder.

    Attributes:
        writes: rows whose keys and values are computed.
        attends: number of these rows that go on to attention and MLP.
        pairs: pairs of an attending row and a row that it sees.
        before: rows whose keys and values are in the cache already.
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
        """Rows of which only those at these places attend."""
        return cls(rows, len(places), sum(places) + len(places))

    @classmethod
    def last(cls, rows: int, before: int = 0) -> "LayerRows":
        """Rows of which only the last one attends."""
        return cls(rows, 1, before + rows, before)

    @classmethod
    def square(cls, rows: int, keys: int) -> "LayerRows":
        """Rows that see all keys, also later ones, as the paper counts."""
        return cls(rows, rows, rows * keys)


@dataclass(frozen=True)
class RowCounts:
    """The rows of one prompt in the L layers of the decoder.

    Attributes:
        total: T, before pruning.
        visual: N, the visual rows among them.
        processed: visual rows in the prefill of each layer.
        cached: visual rows in the cache of each layer.
        stops: layers after which the method prunes.
        probe: whether a glimpse row runs through the layers before the last stop.
        survivors: places of the only rows that attend in the layer before the stop, if the method
            prunes inside that layer; None if it waits for the end of the layer.
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
        """The rows of one prompt of a prefill."""
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
        """Layers before the last stop; 0 if there is none inside the decoder."""
        return max(self.stops, default=0)

    def prefill(self) -> list[LayerRows]:
        """Each layer up to the first logits; in the last layer, usually only one row attends."""
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
        """Each layer for the decode step with answer token `number`, from 1."""
        return [LayerRows.all(1, self.text + visual + number - 1) for visual in self.cached]

    def paper_prefill(self) -> list[LayerRows]:
        """As the public code of the paper counts: after pruning, visual tokens without the text."""
        counts = (self.total if n == self.visual else n for n in self.processed)
        return [LayerRows.square(n, n) for n in counts]

    def paper_step(self, number: int) -> list[LayerRows]:
        """As there, from 0: the first token takes a step, and a pruned cache has no text."""
        counts = (self.total if n == self.visual else n for n in self.cached)
        return [LayerRows.square(1, n + number) for n in counts]


def session_prefix(session: Session) -> list[LayerRows]:
    """Each layer of the prefix of a session; no row attends in the last layer of the decoder."""
    prefix = session.prefix
    layers = [LayerRows.all(prefix.num_rows)] * len(prefix.shared.layers)
    return layers if prefix.shared.stop else [*layers[1:], LayerRows(prefix.num_rows, 0, 0)]


def session_question(session: Session, rows: RowCounts) -> list[LayerRows]:
    """Each layer of a question to a session; `rows` are those of its prefill."""
    shared, before = session.prefix.shared, session.prefix.num_rows
    new = rows.total - len(session.prompt)
    if not shared.stop:
        whole = [LayerRows.all(new, before)] * (len(shared.layers) - 1)
        return [*whole, LayerRows.last(new, before)]
    below = [LayerRows.all(new + rows.probe, before)] * len(shared.layers)
    return below + rows.prefill()[shared.stop :]


def decoder(config: TextConfig, layers: Iterable[LayerRows]) -> int:
    """FLOPs of decoder layers."""
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    write = 2 * config.hidden_size * 2 * kv
    attend = 2 * config.hidden_size * (2 * query + 3 * config.intermediate_size)
    return sum(n.writes * write + n.attends * attend + 4 * n.pairs * query for n in layers)


def head(config: TextConfig) -> int:
    """FLOPs of the logits of one row."""
    return 2 * config.hidden_size * config.vocab_size


def vision(config: Config, grids: Sequence[Grid]) -> int:
    """FLOPs of the vision encoder and its merger; most layers have window attention."""
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
    """FLOPs of the predictor of GlimpsePrune."""
    lengths = predictor.layout(tuple(grids), torch.device("cpu"))[1].lengths
    modules = predictor.named_parameters()
    products = sum(p.numel() for name, p in modules if p.dim() == 2)
    attended = sum(block.heads * (block.qk_dim + block.v_dim) for block in predictor.layers)
    return 2 * sum(lengths) * products + 2 * sum(n * n for n in lengths) * attended


def glimpse_logits(model: Model, rows: int) -> int:
    """FLOPs of the glimpse query and its logits to `rows` rows, in the selected layers."""
    text = model.text
    query = text.num_attention_heads * text.head_dim
    return 2 * len(model.glimpse_weights.config.selected_layers) * query * (text.hidden_size + rows)


def count(model: Model, prefill: Prefill, prompt: int, tokens: int) -> dict[str, float]:
    """FLOPs of a prompt and its answer by part; parts named `paper …` as the paper counts them.

    Args:
        model: the model.
        prefill: prefill of one or several prompts.
        prompt: number of the prompt.
        tokens: tokens of the answer; the first one comes from the prefill.
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
