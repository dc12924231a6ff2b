"""GlimpsePrune (arXiv 2508.01548): the glimpse token, the predictor, and the rule that selects.

A learnable row rides at the end of the prompt through the first K decoder layers. Its raw attention
logits to the visual tokens, with features tapped from the vision encoder as conditions, go through
a small predictor (VIP, paper Fig. 3b), whose output says which visual tokens this question needs.
Where paper and official code differ, this is what the released weights were trained with: the row's
vectors pass a projection and a norm, the logits are raw (no softmax), and the predictor attends
inside each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import ANCHORS, Config, GlimpseConfig
from .errors import UsageError
from .kernels.ops import Ops, Packing, Rope
from .layers import MLP, FusedLinear, Linear, Module, RMSNorm
from .rope import Grid, axial_rope
from .vision import layout


class PredictorBlock(Module):
    """Self-attention whose q and k also see a visual condition (paper Fig. 3c), then an MLP."""

    def __init__(self, size: int, condition: int, heads: int, ops: Ops):
        super().__init__()
        self.heads, self.ops = heads, ops
        self.qk_dim, self.v_dim = (size + condition) // heads, size // heads
        self.norm1 = RMSNorm(size, 1e-6, ops)
        self.norm2 = RMSNorm(size, 1e-6, ops)
        self.qk = FusedLinear(size + condition, (size + condition,) * 2, bias=False)
        self.v = Linear(size, size, bias=False)
        self.o = Linear(size, size, bias=False)
        self.mlp = MLP(size, 2 * size, bias=True, ops=ops)

    def forward(self, x: Tensor, condition: Tensor, rope: Rope, packing: Packing) -> Tensor:
        """x [N, E], condition [N, F] -> [N, E]"""
        normed, x = self.norm2.add(self.attend(self.norm1(x), condition, rope, packing), x)
        return self.mlp(normed).add_(x)

    def attend(self, x: Tensor, condition: Tensor, rope: Rope, packing: Packing) -> Tensor:
        """Attention of normed rows to the rows of their own image."""
        qk = self.qk(torch.cat((x, condition), -1)).view(len(x), 2 * self.heads, self.qk_dim)
        q, k = self.ops.rotate(qk, rope).split(self.heads, dim=1)
        v = self.v(x).view(len(x), self.heads, self.v_dim)
        return self.o(self.ops.attention(q, k, v, packing, causal=False))


class Predictor(Module):
    """VIP: the importance of every visual token, from glimpse logits and tapped features."""

    def __init__(self, config: Config, glimpse: GlimpseConfig, ops: Ops):
        super().__init__()
        size, condition = glimpse.attn_fuse_size, glimpse.visual_cond_size
        heads, blocks = glimpse.attn_fuse_num_heads, len(glimpse.selected_visual_layers)
        inputs = config.text_config.num_attention_heads * len(glimpse.selected_layers)
        self.attn_in_proj = Linear(inputs, size)
        self.cond_in_projs = nn.ModuleList(
            Linear(config.vision_config.hidden_size, condition) for _ in range(blocks)
        )
        self.layers = nn.ModuleList(
            PredictorBlock(size, condition, heads, ops) for _ in range(blocks)
        )
        self.attn_out_proj = Linear(size, 1)
        self.vision_config = config.vision_config
        self.attends_globally = glimpse.attn_fuse_global
        self.reads_logits = glimpse.use_attention_logits
        self.head_dim = (size + condition) // heads

    def forward(
        self, glimpse_logits: Tensor, taps: Tensor, grids: Sequence[Grid], counts: Sequence[int]
    ) -> Tensor:
        """Importance of visual tokens.

        The released predictors read raw logits. With `use_attention_logits` false these become
        log-probabilities among the visual tokens of their prompt (the official code takes a
        log-softmax for LLaVA): how high they are all together, which no softmax sees and which
        other kinds of pictures change, says nothing then.

        Args:
            glimpse_logits: [N, HQ · layers], raw.
            taps: [M, N, Cv], one for each block of the predictor.
            grids: (t, h, w) in patches of the images that the N visual tokens make up.
            counts: how many of them each prompt has.

        Returns:
            [N], logits: the sigmoid is left to the selection.
        """
        rope, packing = self.plan(tuple(grids), glimpse_logits.device)
        if not self.reads_logits:
            prompts = glimpse_logits.float().split(list(counts))
            shares = torch.cat([prompt.log_softmax(0) for prompt in prompts])
            glimpse_logits = shares.to(glimpse_logits.dtype)
        x = self.attn_in_proj(glimpse_logits)
        for project, block, tap in zip(self.cond_in_projs, self.layers, taps, strict=True):
            x = block(x, project(tap), rope, packing)
        return self.attn_out_proj(x).squeeze(-1)

    def plan(self, grids: tuple[Grid, ...], device: torch.device) -> tuple[Rope, Packing]:
        """Tables over rows and columns of the merged grids, and the sequences, in raster order."""
        vision = self.vision_config
        sizes = [
            (h // vision.spatial_merge_size, w // vision.spatial_merge_size) for _, h, w in grids
        ]
        frames = [size for size, (t, _, _) in zip(sizes, grids, strict=True) for _ in range(t)]
        none = torch.empty(0, dtype=torch.int64)  # so that text alone passes, too
        rows = [none, *(torch.arange(h).repeat_interleave(w) for h, w in frames)]
        columns = [none, *(torch.arange(w).repeat(h) for h, w in frames)]
        rope = axial_rope(torch.cat(rows).to(device), torch.cat(columns).to(device), self.head_dim)
        if self.attends_globally:
            return rope, Packing([h * w for h, w in frames], device)
        windows = layout(grids, vision, device)
        lengths = [n // vision.merge_unit for n in windows.windows.lengths]
        return rope, Packing(lengths, device, windows.order)


class Glimpse(Module):
    """What GlimpsePrune adds to a model.

    Attributes:
        predictor: VIP.
        selection: the rule that the weights' config.json states.
        vectors: [L, C], added to the glimpse row before each layer; the first is the row itself.
            RMSNorm(W·E + b) of the trained embeddings, which no question changes (Sec. 4, App. C).
    """

    def __init__(self, config: Config, glimpse: GlimpseConfig, ops: Ops):
        super().__init__()
        text = config.text_config
        self.config = glimpse
        self.selection = Selection(
            threshold=glimpse.reduce_threshold,
            max_ratio=glimpse.max_remain_ratio,
            min_tokens=glimpse.min_remain_num,
            anchors=glimpse.anchor_positions,
        )
        self.predictor = Predictor(config, glimpse, ops)
        self.vectors = nn.Parameter(torch.zeros(text.num_hidden_layers, text.hidden_size))


@dataclass(frozen=True)
class Selection:
    """The rule that turns importance into kept visual tokens, pooled over a prompt.

    Attributes:
        threshold: keep what has a probability above it.
        max_ratio: if more than this share passes, keep exactly the best int(max_ratio · N) instead.
        max_frame_ratio: the same of every pair of a clip's frames, before `max_ratio` counts.
        min_tokens: if fewer are left, keep the best `min_tokens`; stronger than both, but first of
            what each pair of frames may keep.
        anchors: corners of every image, of "tl", "tr", "bl", "br", that join whatever their score.
    """

    threshold: float = 0.5
    max_ratio: float | None = None
    max_frame_ratio: float | None = None
    min_tokens: int | None = 1
    anchors: tuple[str, ...] = ()

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold {self.threshold} is no probability; give 0 to 1")
        for name in ("max_ratio", "max_frame_ratio"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"{name} {share} is no share; give 0 to 1")
        if self.min_tokens is not None and self.min_tokens < 0:
            raise UsageError(f"min_tokens {self.min_tokens} is negative")
        if not set(self.anchors) <= set(ANCHORS):
            raise UsageError(f"anchors {self.anchors} are not among {', '.join(ANCHORS)}")

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
        if self.max_ratio is not None and total and int(kept.sum()) / total > self.max_ratio:
            kept = _best(importance, int(self.max_ratio * total), allowed)
        if self.min_tokens and int(kept.sum()) < min(self.min_tokens, total):
            kept = _best(importance, self.min_tokens, allowed)
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
    """Bool [..., N], the `count` most important; of equals the first, so that runs agree.

    Args:
        importance: [..., N].
        count: how many.
        preferred: bool [N], what comes before all others.
    """
    order = importance.argsort(dim=-1, descending=True, stable=True)
    if preferred is not None:
        order = torch.cat((order[preferred[order]], order[~preferred[order]]))
    kept = torch.zeros(importance.shape, dtype=torch.bool, device=importance.device)
    return kept.scatter_(-1, order[..., :count], True)
