"""What a pruning method is, and what it sees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch import Batch
from ..glimpse import Selection

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass(frozen=True)
class Choice:
    """What a method answers.

    Attributes:
        kept: bool [N].
        importance: [N], logits that say how much each token matters; None if there are none.
        glimpse_logits: [N, HQ], where the method reads a glimpse.
    """

    kept: Tensor
    importance: Tensor | None = None
    glimpse_logits: Tensor | None = None


@dataclass(frozen=True)
class Look:
    """What a method sees at a stop: B packed prompts with N visual tokens.

    Attributes:
        engine: the model.
        batch: the prompts as they are now.
        visual: [N, C], from the vision encoder.
        taps: [M, N, Cv], of the blocks that the method asked for.
        rows: by layer that the method reads, the raw attention logits [T, HQ] of the asking row,
            which is the glimpse if there is one and else each prompt's last, to its prompt's rows.
        rule: threshold, cap, minimum and anchors that the user asked for.
        seeds: of methods that draw, one a prompt.
        evidence: bool [N], the visual tokens that the answers need, where they are known.
    """

    engine: "Engine"
    batch: Batch
    visual: Tensor
    taps: Tensor
    rows: dict[int, Tensor]
    rule: Selection
    seeds: list[int]
    evidence: Tensor | None

    def of(self, kept: Tensor) -> "Look":
        """The same look, of what earlier stops have left of the visual tokens."""
        known = None if self.evidence is None else self.evidence[kept]
        return replace(self, visual=self.visual[kept], taps=self.taps[:, kept], evidence=known)

    def by_rule(self, importance: Tensor, threshold: float | None = None) -> Tensor:
        """Kept visual tokens bool [N]: each prompt's pictures are pooled, videos all stay.

        Args:
            importance: [N], logits.
            threshold: instead of the rule's; 0 leaves the choice to the cap.
        """
        rule = self.rule if threshold is None else replace(self.rule, threshold=threshold)
        kept = ~self.batch.prunable
        for sizes, own in zip(self.batch.image_sizes, self.prompts(), strict=True):
            prunable = self.batch.prunable[own]
            kept[own][prunable] = rule(importance[own][prunable], sizes)
        return kept

    def prompts(self) -> Iterator[slice]:
        """The visual tokens of each prompt."""
        first = 0
        for count in self.batch.visual_counts:
            yield slice(first, first + count)
            first += count

    def attention(self, layer: int) -> Tensor:
        """[N], the asking row's softmax attention to the visual tokens, the mean over heads."""
        parts = self.rows[layer].float().split(self.batch.counts)
        return torch.cat([part.softmax(0).mean(1) for part in parts])[self.batch.visual_rows]


class Method:
    """A pruning method. Objects hold options at most, no state of a run.

    Attributes:
        name: to choose it by.
        about: a line: what it is, where it acts, its source.
        capped: it keeps the best of what `max_ratio` allows, and so needs one.
    """

    name: str
    about: str
    capped: bool = True

    def stops(self, engine: "Engine") -> Sequence[int]:
        """Numbers of layers after which it looks, ascending; 0 is before the decoder."""
        return ()

    def reads(self, engine: "Engine") -> Sequence[int]:
        """Layers whose attention logits of the asking row it wants."""
        return ()

    def taps(self, engine: "Engine") -> Sequence[int]:
        """Blocks of the vision encoder whose features it wants."""
        return ()

    def probe(self, engine: "Engine") -> Tensor | None:
        """[L, C], added before each layer to a row behind every prompt; None without such a row.

        A method with a probe has one stop.
        """
        return None

    def choose(self, look: Look) -> Choice:
        """What stays."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttentionMethod(Method):
    """Keeps what one row of one layer attends to most, after that layer."""

    name: str
    about: str
    layers: int | None = None
    capped: bool = field(default=True, init=False)

    def stops(self, engine: "Engine") -> Sequence[int]:
        """After the layer that is read."""
        depth = engine.config.text_config.num_hidden_layers
        return (min(self.layers or -(-2 * depth // 3), depth),)

    def reads(self, engine: "Engine") -> Sequence[int]:
        """The last layer before the stop."""
        return (self.stops(engine)[0] - 1,)

    def choose(self, look: Look) -> Choice:
        """The most attended."""
        (layer,) = look.rows
        attention = look.attention(layer)
        return Choice(look.by_rule(attention, threshold=0.0))
