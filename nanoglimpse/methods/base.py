"""What a pruning method is, and what it sees."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import UsageError
from ..glimpse import Selection
from ..reading import Seen
from ..vision import Watch

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass(frozen=True)
class Choice:
    """What a method answers.

    Attributes:
        kept: bool [N]; None where nothing was chosen.
        importance: [N], logits that say how much each token matters; None if there are none.
        glimpse_logits: [N, HQ], where the method reads a glimpse.
        values: [kept, C], what the kept tokens are from here on, of methods that merge before the
            decoder; None if they stay as they are.
    """

    kept: Tensor | None = None
    importance: Tensor | None = None
    glimpse_logits: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Look:
    """What a method sees at a stop: B packed prompts with N visual tokens.

    Attributes:
        engine: the model.
        stage: which of the method's stops this is, from 0.
        batch: the prompts as they are now.
        hidden: [T, C], the prompts' rows as the next layer would see them; None for a method that
            does not need them.
        source: [N before any stop, C], all visual tokens from the vision encoder.
        source_counts: how many of them each prompt has.
        visual: [N, C], those that are left.
        taps: [M, N, Cv], of the blocks that the method asked for.
        watch: what the method wanted to know of the vision encoder's blocks.
        layers: those that the method reads.
        asking: int64 [B], the rows there that ask: the probes, or else each prompt's last row.
        rule: threshold, cap, minimum and anchors that the user asked for.
        seeds: of methods that draw, one a prompt.
        evidence: bool [N], the visual tokens that the answers need, where they are known.
    """

    engine: "Engine"
    stage: int
    batch: Batch
    hidden: Tensor | None
    source: Tensor
    source_counts: list[int]
    visual: Tensor
    taps: Tensor
    watch: Watch
    layers: dict[int, Seen]
    asking: Tensor
    rule: Selection
    seeds: list[int]
    evidence: Tensor | None

    def of(self, kept: Tensor) -> "Look":
        """The same look, of what earlier stops have left of the visual tokens."""
        known = None if self.evidence is None else self.evidence[kept]
        return replace(self, visual=self.visual[kept], taps=self.taps[:, kept], evidence=known)

    def by_rule(self, importance: Tensor, threshold: float | None = None) -> Tensor:
        """Kept visual tokens bool [N]: a prompt's pictures are pooled, a video is a pool.

        Args:
            importance: [N], logits.
            threshold: instead of the rule's; 0 leaves the choice to the cap.
        """
        rule = self.rule if threshold is None else replace(self.rule, threshold=threshold)
        kept = ~self.batch.prunable
        for pool, sizes in enumerate(self.batch.pool_sizes):
            own = self.batch.pools == pool
            kept[own] = rule(importance[own], sizes, pool in self.batch.clips)
        return kept

    def per_image(self, pick: Callable[[slice, int], Tensor]) -> Tensor:
        """Kept visual tokens bool [N], chosen image by image; a video's pair of frames is one.

        Args:
            pick: from an image's visual tokens and how many of them may stay to their indices in
                the image, int64.
        """
        kept = ~self.batch.prunable
        for own, _ in self.images():
            count = own.stop - own.start
            allowed = min(max(int(self.rule.max_ratio * count), self.rule.min_tokens or 0), count)
            kept[own.start + pick(own, allowed)] = True
        return kept

    def images(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """The visual tokens of each image or pair of frames that may go; its rows and columns."""
        merge, first = self.engine.config.vision_config.spatial_merge_size, 0
        prunable = self.batch.prunable.tolist()
        for frames, height, width in self.batch.all_grids:
            size = (height // merge, width // merge)
            for _ in range(frames):
                own = slice(first, first + size[0] * size[1])
                if prunable[first]:
                    yield own, size
                first = own.stop

    def prompts(self) -> Iterator[slice]:
        """The visual tokens of each prompt."""
        first = 0
        for count in self.batch.visual_counts:
            yield slice(first, first + count)
            first += count

    def question(self, prompt: int) -> Tensor:
        """int64, the rows of a prompt's text behind its last visual token, up to the turn's end.

        In a conversation these are those of the last turn.
        """
        start = sum(self.batch.counts[:prompt])
        own = slice(start, start + self.batch.counts[prompt])
        seen = [row for row in self.batch.visual_rows.tolist() if own.start <= row < own.stop]
        first = seen[-1] + 2 if seen else own.start  # behind <|vision_end|>
        ids = self.batch.token_ids[first : own.stop].tolist()
        ends = [i for i, token in enumerate(ids) if token in self.engine.eos_token_id]
        begin = ends[-2] + 1 if len(ends) > 1 else 0
        stop = ends[-1] if ends and ends[-1] > begin else len(ids)
        return torch.arange(first + begin, first + stop, device=self.visual.device)

    def attention(self, layer: int) -> Tensor:
        """[N], the asking row's softmax attention to the visual tokens, the mean over heads."""
        return self.mean_softmax(self.layers[layer].logits(self.asking))

    def mean_softmax(self, logits: Tensor) -> Tensor:
        """[N], attention to visual tokens from one row's logits a prompt [T, HQ], heads' mean."""
        parts = logits.float().split(self.batch.counts)
        return torch.cat([part.softmax(0).mean(1) for part in parts])[self.batch.visual_rows]


def solve(rising: Callable[[float], float], target: float) -> float:
    """Where a function that rises on 0 to 1 reaches a target, from above; 1 if it does not."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high


class Method:
    """A pruning method. Objects hold options at most, no state of a run.

    Attributes:
        name: to choose it by.
        about: a line: what it is, where it acts, its source.
        capped: it keeps the best of what `max_ratio` allows, and so needs one.
        fixed: what it keeps depends on no cap.
        pooled: it chooses once, by `Look.by_rule`, so that `max_frame_ratio` and `anchors` hold.
        needs_hidden: it looks at `Look.hidden`. If not, it looks inside the last layer before a
            stop, which only what it keeps goes through to the end: exact, and nearly a layer less.
        for_videos: it compares frames, and keeps a picture by itself whole.
    """

    name: str
    about: str
    capped: bool = True
    fixed: bool = False
    pooled: bool = False
    needs_hidden: bool = True
    for_videos: bool = False

    def stops(self, engine: "Engine") -> Sequence[int]:
        """Numbers of layers after which it looks, ascending; 0 is before the decoder."""
        return ()

    def reads(self, engine: "Engine") -> Sequence[int]:
        """Layers whose attention logits of the asking row it wants."""
        return ()

    def taps(self, engine: "Engine") -> Sequence[int]:
        """Blocks of the vision encoder whose features it wants."""
        return ()

    def watches(self, engine: "Engine") -> Sequence[int]:
        """Blocks of the vision encoder whose received attention and keys it wants."""
        return ()

    def probe(self, engine: "Engine") -> Tensor | None:
        """[L, C], added before each layer to a row behind every prompt; None without such a row.

        A method with a probe has one stop.
        """
        return None

    def share(self, engine: "Engine", ratio: float, kv_drop: str) -> float:
        """The share of the visual tokens to keep, so that the cache holds `ratio` in the mean.

        Raises:
            UsageError: it cannot be so little.
        """
        first, depth = self.stops(engine)[0], engine.config.text_config.num_hidden_layers
        if kv_drop == "all" or not first:
            return ratio
        share = (ratio * depth - first) / (depth - first) if depth > first else 0.0
        if share <= 0:
            raise UsageError(
                f"method {self.name} leaves the cache of {first} of {depth} layers alone, so that "
                f"{ratio:g} cannot be reached; give a larger share, or kv_drop all"
            )
        return share

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
    pooled: bool = field(default=True, init=False)
    needs_hidden: bool = field(default=False, init=False)

    def stops(self, engine: "Engine") -> Sequence[int]:
        """After the layer that is read."""
        depth = engine.config.text_config.num_hidden_layers
        return (min(self.layers or -(-2 * depth // 3), depth),)

    def reads(self, engine: "Engine") -> Sequence[int]:
        """The last layer before the stop."""
        return (self.stops(engine)[0] - 1,)

    def choose(self, look: Look) -> Choice:
        """The most attended."""
        (layer,) = look.layers
        attention = look.attention(layer)
        return Choice(look.by_rule(attention, threshold=0.0))
