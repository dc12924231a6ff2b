"""GlimpsePrune (arXiv 2508.01548): the glimpse token, the predictor, and the rule that selects.

A learnable row rides at the end of the prompt through the first K decoder layers. Its raw attention
logits to the visual tokens, with features tapped from the vision encoder as conditions, go through
a small predictor (VIP, paper Fig. 3b), whose output says which visual tokens this question needs.
Where paper and official code differ, this is what the released weights were trained with: the row's
vectors pass a projection and a norm, the logits are raw (no softmax), and the predictor attends
inside each image.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from nanoglimpse.config import Config, GlimpseConfig, VisionConfig
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import Segments, upload
from nanoglimpse.model.layers import MLP, Blocks, FusedLinear, Linear, Module, RMSNorm
from nanoglimpse.model.rope import Grid, axial_rope
from nanoglimpse.model.vision import window_layout


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

    def forward(self, x: Tensor, condition: Tensor, rope: Rope, segments: Segments) -> Tensor:
        """x [N, E], condition [N, F] -> [N, E]"""
        normed, x = self.norm2.add(self.attend(self.norm1(x), condition, rope, segments), x)
        return self.mlp(normed).add_(x)

    def attend(self, x: Tensor, condition: Tensor, rope: Rope, segments: Segments) -> Tensor:
        """Attention of normed rows to the rows of their own image."""
        qk = self.qk(torch.cat((x, condition), -1)).view(len(x), 2 * self.heads, self.qk_dim)
        q, k = self.ops.rotate(qk, rope).split(self.heads, dim=1)
        v = self.v(x).view(len(x), self.heads, self.v_dim)
        return self.o(self.ops.attention(q, k, v, segments, causal=False))


class Predictor(Module):
    """VIP: the importance of every visual token, from glimpse logits and tapped features."""

    def __init__(self, config: Config, glimpse: GlimpseConfig, ops: Ops):
        super().__init__()
        size, condition = glimpse.attn_fuse_size, glimpse.visual_cond_size
        heads, blocks = glimpse.attn_fuse_num_heads, len(glimpse.selected_visual_layers)
        inputs = config.text_config.num_attention_heads * len(glimpse.selected_layers)
        self.attn_in_proj = Linear(inputs, size)
        self.cond_in_projs: Blocks[Linear] = Blocks(
            Linear(config.vision_config.hidden_size, condition) for _ in range(blocks)
        )
        self.layers: Blocks[PredictorBlock] = Blocks(
            PredictorBlock(size, condition, heads, ops) for _ in range(blocks)
        )
        self.attn_out_proj = Linear(size, 1)
        self.vision_config = config.vision_config
        self.attends_globally = glimpse.attn_fuse_global
        self.reads_logits = glimpse.use_attention_logits
        self.head_dim = (size + condition) // heads

    def forward(
        self,
        glimpse_logits: Tensor,
        conditions: Sequence[Tensor],
        grids: Sequence[Grid],
        counts: Sequence[int],
    ) -> Tensor:
        """Importance of visual tokens.

        The released predictors read raw logits. With `use_attention_logits` false these become
        log-probabilities among the visual tokens of their prompt (the official code takes a
        log-softmax for LLaVA): how high they are all together, which no softmax sees and which
        other kinds of pictures change, says nothing then.

        Args:
            glimpse_logits: [N, HQ · layers], raw.
            conditions: from `condition`, for the same visual tokens.
            grids: (t, h, w) in patches of the images that the N visual tokens make up.
            counts: how many of them each prompt has.

        Returns:
            [N], logits: the sigmoid is left to the selection.
        """
        rope, segments = self.layout(tuple(grids), glimpse_logits.device)
        if not self.reads_logits:
            prompts = glimpse_logits.float().split(list(counts))
            shares = torch.cat([prompt.log_softmax(0) for prompt in prompts])
            glimpse_logits = shares.to(glimpse_logits.dtype)
        x = self.attn_in_proj(glimpse_logits)
        for block, condition in zip(self.layers, conditions, strict=True):
            x = block(x, condition, rope, segments)
        return self.attn_out_proj(x).squeeze(-1)

    def condition(self, taps: Tensor) -> list[Tensor]:
        """[M, N, Cv] -> [N, F] for each of the M blocks, which depends on no question."""
        pairs = zip(self.cond_in_projs, taps, strict=True)
        return [project(tap) for project, tap in pairs]

    def layout(self, grids: tuple[Grid, ...], device: torch.device) -> tuple[Rope, Segments]:
        """Tables over rows and columns of the merged grids, and the sequences, in raster order."""
        sizes = (self.vision_config, self.attends_globally, self.head_dim)
        return predictor_layout(grids, *sizes, device)


@lru_cache(maxsize=16)
def predictor_layout(
    grids: tuple[Grid, ...],
    vision: VisionConfig,
    attends_globally: bool,
    head_dim: int,
    device: torch.device,
) -> tuple[Rope, Segments]:
    """As `Predictor.layout`, computed once."""
    merge = vision.spatial_merge_size
    frames = [(h // merge, w // merge) for t, h, w in grids for _ in range(t)]
    none = torch.empty(0, dtype=torch.int64)  # so that text alone passes, too
    rows = [none, *(torch.arange(h).repeat_interleave(w) for h, w in frames)]
    columns = [none, *(torch.arange(w).repeat(h) for h, w in frames)]
    with torch.inference_mode(False):  # as `window_layout`
        cells = upload(torch.cat(rows), device), upload(torch.cat(columns), device)
        rope = axial_rope(*cells, head_dim)
        if attends_globally:
            return rope, Segments([h * w for h, w in frames], device)
        windows = window_layout(grids, vision, device)
        lengths = [n // vision.merge_unit for n in windows.windows.lengths]
        return rope, Segments(lengths, device, windows.order)


class Glimpse(Module):
    """What GlimpsePrune adds to a model.

    Attributes:
        predictor: VIP.
        config: of the weights; states the selection rule.
        vectors: [L, C], added to the glimpse row before each layer; the first is the row itself.
            RMSNorm(W·E + b) of the trained embeddings, which no question changes (Sec. 4, App. C).
    """

    def __init__(self, config: Config, glimpse: GlimpseConfig, ops: Ops):
        super().__init__()
        text = config.text_config
        self.config = glimpse
        self.predictor = Predictor(config, glimpse, ops)
        self.vectors = nn.Parameter(torch.zeros(text.num_hidden_layers, text.hidden_size))
