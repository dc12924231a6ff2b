"""What a pruning method reads, what it decides, and the rule by which it may select."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoglimpse.config import ANCHORS
from nanoglimpse.errors import UsageError
from nanoglimpse.inputs.prompt import PackedBatch
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.model.decoder import Block
from nanoglimpse.model.model import Model
from nanoglimpse.model.vision import BlockStats, VisionOutput


@dataclass(frozen=True)
class SelectionRule:
    """Which visual tokens of a pool are kept, given their importance.

    Attributes:
        threshold: a token is kept if its probability, the sigmoid of its importance, is above this.
        max_ratio: if a larger share of the pool passes, exactly the best int(max_ratio · N) are
            kept instead; no cap if None.
        max_frame_ratio: the same for each pair of a video's frames, before `max_ratio` is applied.
        min_tokens: if fewer are kept, the best `min_tokens` are. It overrides both caps, but tokens
            that `max_frame_ratio` allows come first.
        anchors: corners of every image, "tl", "tr", "bl" or "br", that are kept in addition.

    Raises:
        UsageError: a value is out of its range.
    """

    threshold: float = 0.5
    max_ratio: float | None = None
    max_frame_ratio: float | None = None
    min_tokens: int | None = 1
    anchors: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("threshold", "max_ratio", "max_frame_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} must be in [0, 1], got {value}")
        if self.min_tokens is not None and self.min_tokens < 0:
            raise UsageError(f"min_tokens must be at least 0, got {self.min_tokens}")
        if not set(self.anchors) <= set(ANCHORS):
            known = ", ".join(ANCHORS)
            raise UsageError(f"anchors must be among {known}, got {', '.join(self.anchors)}")

    def __call__(
        self, importance: Tensor, sizes: Sequence[tuple[int, int]], clip: bool = False
    ) -> Tensor:
        """Kept visual tokens of one pool.

        Args:
            importance: [N], logits.
            sizes: (rows, columns) of visual tokens of each image, or pair of frames, in order.
            clip: whether the pool is a video.

        Returns:
            bool [N]
        """
        total = len(importance)
        allowed = torch.ones(total, dtype=torch.bool, device=importance.device)
        if clip and self.max_frame_ratio is not None:
            frames = importance.view(len(sizes), -1)
            allowed = _best(frames, int(self.max_frame_ratio * frames.shape[1])).flatten()
        kept = (importance.float().sigmoid() > self.threshold) & allowed
        # Both cases are computed, since the host would have to wait to know which one it is.
        if self.max_ratio is not None and total:
            best = _best(importance, int(self.max_ratio * total), allowed)
            kept = torch.where(kept.sum() / total > self.max_ratio, best, kept)
        if self.min_tokens:
            best = _best(importance, self.min_tokens, allowed)
            kept = torch.where(kept.sum() < min(self.min_tokens, total), best, kept)
        first = 0
        for rows, columns in sizes:
            corner = {
                "tl": 0,
                "tr": columns - 1,
                "bl": (rows - 1) * columns,
                "br": rows * columns - 1,
            }
            for anchor in self.anchors:
                kept[first + corner[anchor]] = True
            first += rows * columns
        return kept


def _best(importance: Tensor, count: int, preferred: Tensor | None = None) -> Tensor:
    """Bool [..., N], the `count` most important; the first of equals, so that runs agree.

    Args:
        importance: [..., N].
        count: how many.
        preferred: bool [N], tokens that come before all others.
    """
    order = importance.argsort(dim=-1, descending=True, stable=True)
    if preferred is not None:
        order = order[preferred[order].byte().argsort(descending=True, stable=True)]
    kept = torch.zeros(importance.shape, dtype=torch.bool, device=importance.device)
    return kept.scatter_(-1, order[..., :count], True)


@dataclass(frozen=True)
class Decision:
    """Which visual tokens stay.

    Attributes:
        kept: bool [N].
        importance: [N], logits that say how much each token matters; None if there are none.
        glimpse_logits: [N, HQ], raw attention of the glimpse row; None without one.
        values: [kept, C], new values of the kept tokens, for methods that merge before the decoder;
            None if they do not change.
    """

    kept: Tensor
    importance: Tensor | None = None
    glimpse_logits: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class LayerAttention:
    """Attention of a decoder layer, computed for the rows that a method asks for.

    Attributes:
        block: the layer.
        hidden: its input, [T, C], or [T + B, C] with a probe row after each prompt.
        rope: tables of these rows.
        k: their keys, [T, H, D] or [T + B, H, D].
        segments: the prompts that these rows make up.
        rows: int64 [T], where the prompts' rows are among them.
        scores: query rows, int64 [B], whose logits [T, HQ] or [T + B, HQ] are known, and these;
            None if none are.
    """

    block: Block
    hidden: Tensor
    rope: Rope
    k: Tensor
    segments: Segments
    rows: Tensor
    scores: tuple[Tensor, Tensor] | None

    def logits(self, rows: Tensor) -> Tensor:
        """Raw logits [T, HQ] of one row a prompt, int64 [B] in `hidden`, to its prompt's rows."""
        if self.scores is not None and self.scores[0] is rows:
            logits = self.scores[1]
        else:
            q = self.block.query(self.hidden[rows], self.rope[rows])
            logits = self.block.ops.row_logits(q, self.k, self.segments)
        return logits if len(logits) == len(self.rows) else logits[self.rows]

    def attention(self, rows: Tensor, prompt: int) -> Iterator[Tensor]:
        """Causal softmax of rows of one prompt, int64 [R]: one after another, [seen, HQ]."""
        first, block = sum(self.segments.lengths[:prompt]), self.block
        queries = block.query(self.hidden[rows], self.rope[rows])[:, None]
        for q, row in zip(queries, rows.tolist(), strict=True):
            seen = Segments([row + 1 - first], rows.device)
            yield block.ops.row_logits(q, self.k[first : row + 1], seen).float().softmax(0)


@dataclass(frozen=True)
class PruningContext:
    """What a method reads at a pruning layer: B packed prompts with N visual tokens.

    Before the decoder, `batch`, `hidden`, `query_rows`, `evidence` and `question` are for methods
    whose needs say `question=True`. All others see the pictures only, whether a question is known
    or not, so that a session can prune pictures before it is asked anything.

    Attributes:
        model: the model.
        rule: threshold, cap, minimum and anchors that the user asked for.
        stage: which of the method's pruning layers this is, from 0.
        vision: output of the vision encoder for all visual tokens, those dropped included.
        kept: bool, which of these earlier stages have kept.
        original_counts: how many visual tokens each prompt had before any pruning.
        layers: attention of the layers in `Needs.attention`.
        packed: the prompts as earlier stages left them; see `batch`.
        scored_rows: int64 [B]; see `query_rows`.
        hidden_rows: [T, C], or None; see `hidden`.
        has_question: whether what depends on the question may be read.
    """

    model: Model
    rule: SelectionRule
    stage: int
    vision: VisionOutput
    kept: Tensor
    original_counts: list[int]
    layers: dict[int, LayerAttention]
    packed: PackedBatch
    scored_rows: Tensor
    hidden_rows: Tensor | None
    has_question: bool = True

    @property
    def batch(self) -> PackedBatch:
        """The prompts as earlier stages left them."""
        self._require_question()
        return self.packed

    @property
    def query_rows(self) -> Tensor:
        """int64 [B], the rows whose attention is scored: probes, or each prompt's last row."""
        self._require_question()
        return self.scored_rows

    @property
    def hidden(self) -> Tensor:
        """[T, C], the prompts' rows as the next layer reads them.

        Raises:
            UsageError: the method's needs do not name them.
        """
        self._require_question()
        if self.hidden_rows is None:
            raise UsageError("hidden rows are kept for methods whose needs say hidden=True")
        return self.hidden_rows

    @property
    def evidence(self) -> Tensor | None:
        """Bool [N], the visual tokens that the answers need; None where that is unknown."""
        self._require_question()
        return self.packed.evidence

    def _require_question(self) -> None:
        if not self.has_question:
            raise UsageError(
                "before the decoder a method sees no question, unless its needs say question=True"
            )

    @property
    def prunable(self) -> Tensor:
        """Bool [N], the visual tokens that may be dropped."""
        return self.packed.prunable

    @property
    def pools(self) -> Tensor:
        """int64 [N]; tokens with one number compete with each other, those with -1 all stay."""
        return self.packed.pools

    @property
    def visual_counts(self) -> list[int]:
        """Visual tokens of each prompt."""
        return self.packed.visual_counts

    @property
    def seeds(self) -> list[int]:
        """For methods that draw, one a prompt."""
        return self.packed.seeds

    @property
    def visual(self) -> Tensor:
        """[N, C], the visual tokens as the vision encoder made them."""
        return self.vision.visual[self.kept] if self.stage else self.vision.visual

    @property
    def taps(self) -> Tensor:
        """[M, N, Cv], features of the blocks in `Needs.taps`."""
        return self.vision.taps[:, self.kept] if self.stage else self.vision.taps

    @property
    def block_stats(self) -> BlockStats:
        """Received attention and keys of the blocks in `Needs.vision_blocks`."""
        return self.vision.block_stats

    @property
    def max_ratio(self) -> float:
        """The cap; 1 without one."""
        return 1.0 if self.rule.max_ratio is None else self.rule.max_ratio

    def with_ratio(self, max_ratio: float) -> "PruningContext":
        """The same context under another cap."""
        return replace(self, rule=replace(self.rule, max_ratio=max_ratio))

    def select(self, importance: Tensor, threshold: float | None = None) -> Tensor:
        """Kept visual tokens bool [N] by the rule: a prompt's pictures are pooled, a video is one.

        Args:
            importance: [N], logits.
            threshold: in place of the rule's; 0 leaves the choice to the cap.
        """
        rule = self.rule if threshold is None else replace(self.rule, threshold=threshold)
        kept, packed = ~self.prunable, self.packed
        counts = packed.pool_counts
        # Tokens of a pool are neighbours in this order; those that all stay have the number -1.
        order = self.pools.argsort(stable=True)[len(importance) - sum(counts) :]
        for pool, own in enumerate(order.split(counts)):
            kept[own] = rule(importance[own], packed.pool_sizes[pool], pool in packed.clips)
        return kept

    def per_image(self, pick: Callable[[slice, int], Tensor]) -> Tensor:
        """Kept visual tokens bool [N], chosen image by image; a video's pair of frames is one.

        The images of a prompt up to any one hold together no more than the rule allows for their
        tokens: rounding each for itself could exceed the cap, or waste it. What an image is allowed
        does not depend on those that follow, which a session may not know yet.

        Args:
            pick: given an image's visual tokens and how many of them may stay, returns their
                indices in the image, int64.
        """
        kept, images = ~self.prunable, [own for own, _ in self.images()]
        for prompt in self.prompts():
            seen = spent = 0
            for own in (one for one in images if prompt.start <= one.start < prompt.stop):
                seen += own.stop - own.start
                cap = max(int(self.max_ratio * seen), self.rule.min_tokens or 0)
                allowed = min(max(cap - spent, 0), own.stop - own.start)
                spent += allowed
                kept[own.start + pick(own, allowed)] = True
        return kept

    def images(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """The visual tokens of each image or pair of frames that may be pruned, and its size.

        The size is rows and columns, in visual tokens.
        """
        merge, first = self.model.config.vision_config.spatial_merge_size, 0
        prunable = self.prunable.tolist()
        for frames, height, width in self.packed.all_grids:
            size = (height // merge, width // merge)
            for _ in range(frames):
                own = slice(first, first + size[0] * size[1])
                if prunable[first]:
                    yield own, size
                first = own.stop

    def prompts(self) -> Iterator[slice]:
        """The visual tokens of each prompt."""
        first = 0
        for count in self.packed.visual_counts:
            yield slice(first, first + count)
            first += count

    def question(self, prompt: int) -> Tensor:
        """int64, rows of a prompt's text after its last visual token, up to the end of the turn.

        In a conversation these are the rows of the last turn.
        """
        start = sum(self.batch.counts[:prompt])
        own = slice(start, start + self.batch.counts[prompt])
        seen = [row for row in self.batch.visual_rows.tolist() if own.start <= row < own.stop]
        first = seen[-1] + 2 if seen else own.start  # after <|vision_end|>
        ids = self.batch.token_ids[first : own.stop].tolist()
        ends = [i for i, token in enumerate(ids) if token in self.model.eos_token_id]
        begin = ends[-2] + 1 if len(ends) > 1 else 0
        stop = ends[-1] if ends and ends[-1] > begin else len(ids)
        return torch.arange(first + begin, first + stop, device=self.visual.device)

    def attention(self, layer: int) -> Tensor:
        """[N], softmax attention of the query row to the visual tokens, the mean over heads."""
        return self.mean_softmax(self.layers[layer].logits(self.query_rows))

    def mean_softmax(self, logits: Tensor) -> Tensor:
        """[N], attention to visual tokens from one row's logits a prompt [T, HQ], heads' mean."""
        parts = logits.float().split(self.batch.counts)
        return torch.cat([part.softmax(0).mean(1) for part in parts])[self.batch.visual_rows]
