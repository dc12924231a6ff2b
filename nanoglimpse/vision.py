"""The vision encoder of Qwen2.5-VL: a windowed transformer over patches, and its merger.

Most blocks attend inside windows of 112 × 112 px, a few inside the whole image. Patches therefore
run in window order, the windows sorted by length: all windows of one length are neighbours, and
attention is one batched call a length, at most four lengths an image. Results are handed out in
raster order.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from .config import VisionConfig
from .kernels.ops import Ops, Packing, Rope
from .layers import MLP, Linear, Merger, Module, RMSNorm
from .pixels import FoldedEmbedding, PixelConfig, normalise
from .rope import Grid, axial_rope


class Layout:
    """Row order, sequences and rotation tables of a list of grids; P patches, N visual tokens.

    Attributes:
        unit: patches of a visual token.
        order: int64 [N], the visual token (raster order) that stands at each place.
        inverse: int64 [N], the place of each visual token.
        patches: int64 [P], the patch that stands at each row.
        windows: patches that attend to each other in a window block.
        frames: patches that attend to each other in a full block: one image, one pair of frames.
        rope: tables [P, D].
    """

    def __init__(self, grids: Sequence[Grid], config: VisionConfig, device: torch.device):
        unit, merge = config.merge_unit, config.spatial_merge_size
        self.unit = unit
        side = config.window_size // config.patch_size // merge
        frames, windows, rows, columns = _cells(grids, merge, side)
        count = torch.bincount(windows) if len(windows) else windows
        # Long windows first; inside a length by window, inside a window in raster order.
        order = torch.argsort(-count[windows] * (len(count) + 1) + windows, stable=True)
        _, lengths = torch.unique_consecutive(windows[order], return_counts=True)
        self.order = order.to(device)
        self.inverse = torch.argsort(order).to(device)
        self.patches = _patches_of(order, unit).to(device)
        self.windows = Packing([unit * n for n in lengths.tolist()], device)
        by_frame = torch.argsort(frames[order], stable=True)
        scattered = bool((by_frame != torch.arange(len(order))).any())
        self.frames = Packing(
            [h * w for t, h, w in grids for _ in range(t)],
            device,
            _patches_of(by_frame, unit).to(device) if scattered else None,
        )
        within = torch.arange(unit)
        patch_rows = (rows[order, None] * merge + within // merge).flatten()
        patch_columns = (columns[order, None] * merge + within % merge).flatten()
        self.rope = axial_rope(patch_rows.to(device), patch_columns.to(device), config.head_dim)


def _cells(grids: Sequence[Grid], merge: int, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frame, window, row and column of every visual token, in raster order."""
    columns_of = [[torch.empty(0, dtype=torch.int64)] for _ in range(4)]
    frame_base = window_base = 0
    for t, h, w in grids:
        h, w = h // merge, w // merge
        across = -(-w // side)
        per_frame = -(-h // side) * across
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        frame, row, column = (axis.flatten() for axis in axes)
        window = frame * per_frame + row // side * across + column // side
        for column_of, value in zip(
            columns_of, (frame + frame_base, window + window_base, row, column), strict=True
        ):
            column_of.append(value)
        frame_base, window_base = frame_base + t, window_base + t * per_frame
    return tuple(torch.cat(parts) for parts in columns_of)


def _patches_of(tokens: Tensor, unit: int) -> Tensor:
    """Rows of the patches of visual tokens: each token is `unit` neighbouring patches."""
    return (tokens[:, None] * unit + torch.arange(unit)).flatten()


@lru_cache(maxsize=16)
def layout(grids: tuple[Grid, ...], config: VisionConfig, device: torch.device) -> Layout:
    """The layout of these grids, computed once."""
    # Whoever asks first may be inferring, and whoever asks next training: no inference tensors.
    with torch.inference_mode(False):
        return Layout(grids, config, device)


class VisionBlock(Module):
    """One block of the encoder; where its rows attend is the caller's choice."""

    def __init__(self, config: VisionConfig, ops: Ops):
        super().__init__()
        size = config.hidden_size
        self.norm1 = RMSNorm(size, 1e-6, ops)
        self.norm2 = RMSNorm(size, 1e-6, ops)
        self.qkv = Linear(size, 3 * size)
        self.proj = Linear(size, size)
        self.mlp = MLP(size, config.intermediate_size, bias=True, ops=ops)
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.ops = ops

    def forward(self, x: Tensor, rope: Rope, packing: Packing) -> Tensor:
        """[P, Cv] -> [P, Cv]"""
        normed, x = self.norm2.add(self.attend(self.norm1(x), rope, packing), x)
        return self.mlp(normed).add_(x)

    def attend(self, x: Tensor, rope: Rope, packing: Packing) -> Tensor:
        """Attention of normed rows inside the sequences of `packing`."""
        return self.proj(self.ops.attention(*self.project(x, rope), packing, causal=False))

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [P, H, D] of normed rows."""
        qkv = self.qkv(x).view(len(x), 3 * self.heads, self.head_dim)
        qk = self.ops.rotate(qkv[:, : 2 * self.heads], rope)
        return qk[:, : self.heads], qk[:, self.heads :], qkv[:, 2 * self.heads :]


class Watch:
    """What some pruning methods rank visual tokens by, read before chosen blocks run.

    Attributes:
        received: by block, fp32 [N], the attention that a visual token receives inside its image:
            the sum over queries, the mean over heads and over its patches.
        keys: by block, [N, D], rotated keys, the mean over heads and over its patches.
    """

    def __init__(self, blocks: Sequence[int]):
        self.blocks = tuple(blocks)
        self.received: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}

    def see(self, index: int, block: VisionBlock, x: Tensor, plan: Layout) -> None:
        """Reads block `index`, whose input is x [P, Cv]."""
        q, k, _ = block.project(block.norm1(x), plan.rope)
        order, frames = plan.frames.rows, Packing(plan.frames.lengths, x.device)
        if order is None:
            sums = block.ops.received_attention(q, k, frames).mean(1)
        else:
            sums = torch.empty(len(x), device=x.device)
            sums[order] = block.ops.received_attention(q[order], k[order], frames).mean(1)
        self.received[index] = sums.unflatten(0, (-1, plan.unit)).mean(1)[plan.inverse]
        self.keys[index] = k.mean(1).unflatten(0, (-1, plan.unit)).mean(1)[plan.inverse]


class VisionEncoder(Module):
    """Patches to visual tokens, with features tapped on the way."""

    def __init__(self, config: VisionConfig, ops: Ops):
        super().__init__()
        self.config = config
        self.patch_embed = Linear(config.patch_dim, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config, ops) for _ in range(config.depth))
        self.merger = Merger(config.hidden_size, config.merge_unit, config.out_hidden_size, ops)
        self.pixels, self.folded = PixelConfig(), None

    def take_pixels(self, config: PixelConfig, fold: Ops | None = None) -> None:
        """What raw patches are to be normalised by; folded into the embedding if `fold` is given.

        Folding is exact to rounding, and saves passes over the pixels and, of stills, half of the
        embedding.
        """
        self.pixels = config
        self.folded = FoldedEmbedding(self.patch_embed, config, fold) if fold else None

    def embed(self, patches: Tensor) -> Tensor:
        """Patches, normalised or raw, to [P, Cv]."""
        if patches.dtype == torch.uint8:
            if self.folded:
                return self.folded(patches)
            patches = normalise(patches, self.pixels)
        return self.patch_embed(patches.to(self.patch_embed.weight.dtype))

    def forward(
        self,
        patches: Tensor,
        grids: Sequence[Grid],
        taps: Sequence[int] = (),
        watch: Watch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encodes images and videos, packed one after the other.

        Args:
            patches: [P, patch_dim], each grid's patches in merge units, as the processor does; or
                raw ones.
            grids: (t, h, w) in patches.
            taps: blocks whose output is wanted (paper Sec. 4, "hierarchical visual features").
            watch: is filled with what it wants to know of blocks on the way.

        Returns:
            Visual tokens [N, C] and taps [M, N, Cv] in the order asked for: each tapped block's
            residual stream, the mean over the patches of a visual token. Both in raster order.
        """
        plan = layout(tuple(grids), self.config, patches.device)
        unit, full = self.config.merge_unit, self.config.fullatt_block_indexes
        x = self.embed(patches)[plan.patches]
        tapped = {}
        for index, block in enumerate(self.blocks):
            if watch and index in watch.blocks:
                watch.see(index, block, x, plan)
            x = block(x, plan.rope, plan.frames if index in full else plan.windows)
            if index in taps:
                tapped[index] = x.unflatten(0, (-1, unit)).mean(1)[plan.inverse]
        visual = self.merger(x)[plan.inverse]
        features = [tapped[index] for index in taps]
        return visual, torch.stack(features) if features else visual.new_empty(0, len(visual), 0)

    def pack(self, ops: Ops) -> None:
        """Lays all matrices out for products with many rows, which is all that happens here."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(ops)
