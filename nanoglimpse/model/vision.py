"""The vision encoder of Qwen2.5-VL: a windowed transformer over patches, and its merger.

Most blocks attend inside windows of 112 × 112 px, a few inside the whole image. Patches therefore
run in window order, the windows sorted by length: all windows of one length are neighbours, and
attention is one batched call a length, at most four lengths an image. Results are handed out in
raster order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from nanoglimpse.config import PixelConfig, VisionConfig
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import Segments, upload
from nanoglimpse.model.layers import MLP, Blocks, Linear, Merger, Module, RMSNorm
from nanoglimpse.model.rope import Grid, axial_rope


class WindowLayout:
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
        self.order = upload(order, device)
        self.inverse = upload(torch.argsort(order), device)
        self.patches = upload(_patches_of(order, unit), device)
        self.windows = Segments([unit * n for n in lengths.tolist()], device)
        by_frame = torch.argsort(frames[order], stable=True)
        scattered = bool((by_frame != torch.arange(len(order))).any())
        self.frames = Segments(
            [h * w for t, h, w in grids for _ in range(t)],
            device,
            upload(_patches_of(by_frame, unit), device) if scattered else None,
        )
        within = torch.arange(unit)
        patch_rows = (rows[order, None] * merge + within // merge).flatten()
        patch_columns = (columns[order, None] * merge + within % merge).flatten()
        cells = upload(patch_rows, device), upload(patch_columns, device)
        self.rope = axial_rope(*cells, config.head_dim)


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
    frame, window, row, column = (torch.cat(parts) for parts in columns_of)
    return frame, window, row, column


def _patches_of(tokens: Tensor, unit: int) -> Tensor:
    """Rows of the patches of visual tokens: each token is `unit` neighbouring patches."""
    return (tokens[:, None] * unit + torch.arange(unit)).flatten()


@lru_cache(maxsize=16)
def window_layout(
    grids: tuple[Grid, ...], config: VisionConfig, device: torch.device
) -> WindowLayout:
    """The layout of these grids, computed once."""
    # Whoever asks first may be inferring, and whoever asks next training: no inference tensors.
    with torch.inference_mode(False):
        return WindowLayout(grids, config, device)


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

    def forward(self, x: Tensor, rope: Rope, segments: Segments) -> Tensor:
        """[P, Cv] -> [P, Cv]"""
        normed, x = self.norm2.add(self.attend(self.norm1(x), rope, segments), x)
        return self.mlp(normed).add_(x)

    def attend(self, x: Tensor, rope: Rope, segments: Segments) -> Tensor:
        """Attention of normed rows inside the sequences of `segments`."""
        return self.proj(self.ops.attention(*self.project(x, rope), segments, causal=False))

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [P, H, D] of normed rows."""
        qkv = self.qkv(x).view(len(x), 3 * self.heads, self.head_dim)
        qk = self.ops.rotate(qkv[:, : 2 * self.heads], rope)
        return qk[:, : self.heads], qk[:, self.heads :], qkv[:, 2 * self.heads :]


def normalise(raw: Tensor, config: PixelConfig) -> Tensor:
    """Pixels as the checkpoint wants them, bit for bit as on a CPU, a still picture repeated.

    Args:
        raw: uint8 [P, channels · frames · side²], one frame or as many as make a temporal patch.
        config: mean, deviation and patch sizes.

    Returns:
        fp32 [P, patch_dim].
    """
    channels = len(config.image_mean)
    # Tensors all of them: a GPU multiplies by the reciprocal of a Python number instead.
    whole, mean, std = (
        upload(torch.tensor(c), raw.device).view(-1, 1, 1)
        for c in ([255.0] * channels, config.image_mean, config.image_std)
    )
    pixels = raw.view(len(raw), channels, -1, config.patch_size**2)
    # Rounded as transformers rounds: x / 255, then the mean, then the deviation, all in fp32. A
    # still picture is normalised before it is repeated.
    pixels = pixels.float().div_(whole).sub_(mean).div_(std)
    return pixels.expand(-1, -1, config.temporal_patch_size, -1).flatten(1)


class BlockStats:
    """Attention and keys of chosen blocks, by which some pruning methods rank visual tokens.

    Attributes:
        received: by block, fp32 [N], the attention that a visual token receives inside its image:
            the sum over queries, the mean over heads and over its patches.
        keys: by block, [N, D], rotated keys, the mean over heads and over its patches.
    """

    def __init__(self, blocks: Sequence[int]):
        self.blocks = tuple(blocks)
        self.received: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}

    def record(self, index: int, block: VisionBlock, x: Tensor, layout: WindowLayout) -> None:
        """Computes the statistics of block `index` from its input x [P, Cv]."""
        q, k, _ = block.project(block.norm1(x), layout.rope)
        order, frames = layout.frames.rows, Segments(layout.frames.lengths, x.device)
        if order is None:
            sums = block.ops.attention_colsum(q, k, frames).mean(1)
        else:
            sums = torch.empty(len(x), device=x.device)
            sums[order] = block.ops.attention_colsum(q[order], k[order], frames).mean(1)
        self.received[index] = sums.unflatten(0, (-1, layout.unit)).mean(1)[layout.inverse]
        self.keys[index] = k.mean(1).unflatten(0, (-1, layout.unit)).mean(1)[layout.inverse]


@dataclass(frozen=True)
class VisionOutput:
    """Output of the vision encoder for N visual tokens.

    Attributes:
        visual: [N, C], input of the decoder.
        taps: [M, N, Cv], features of M tapped blocks.
        block_stats: attention and keys of the blocks that a method ranks by.
        conditions: what a predictor made of the taps; no question changes it.
    """

    visual: Tensor
    taps: Tensor
    block_stats: BlockStats
    conditions: dict[Module, Sequence[Tensor]] = field(default_factory=dict)

    def joined(self, more: "VisionOutput") -> "VisionOutput":
        """The visual tokens of both, these first."""
        stats, both = BlockStats(self.block_stats.blocks), (self.block_stats, more.block_stats)
        for block in stats.blocks:
            stats.received[block] = torch.cat([one.received[block] for one in both])
            stats.keys[block] = torch.cat([one.keys[block] for one in both])
        visual = torch.cat((self.visual, more.visual))
        return VisionOutput(visual, torch.cat((self.taps, more.taps), dim=1), stats)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        stats, made = self.block_stats, self.conditions.values()
        tensors = (self.visual, self.taps, *stats.received.values(), *stats.keys.values())
        return sum(tensor.nbytes for tensor in (*tensors, *chain.from_iterable(made)))


class VisionEncoder(Module):
    """Patches to visual tokens, with features tapped on the way.

    Args:
        config: sizes.
        ops: operations.
        pixels: how raw patches are normalised.
    """

    def __init__(self, config: VisionConfig, ops: Ops, pixels: PixelConfig | None = None):
        super().__init__()
        self.config, self.pixels = config, pixels or PixelConfig()
        self.patch_embed = Linear(config.patch_dim, config.hidden_size, bias=False)
        self.blocks: Blocks[VisionBlock] = Blocks(
            VisionBlock(config, ops) for _ in range(config.depth)
        )
        self.merger = Merger(config.hidden_size, config.merge_unit, config.out_hidden_size, ops)

    def embed(self, patches: Tensor) -> Tensor:
        """Normalised patches [P, patch_dim], or raw ones, to [P, Cv]."""
        if patches.dtype == torch.uint8:
            patches = normalise(patches, self.pixels)
        return self.patch_embed(patches.to(self.patch_embed.weight.dtype))

    def forward(
        self,
        patches: Tensor,
        grids: Sequence[Grid],
        taps: Sequence[int] = (),
        block_stats: BlockStats | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encodes images and videos, packed one after the other.

        Args:
            patches: fp32 [P, patch_dim], each grid's patches in merge units, as the processor makes
                them; or raw uint8 patches of one frame or of a temporal patch.
            grids: (t, h, w) in patches.
            taps: blocks whose output is returned (paper Sec. 4, "hierarchical visual features").
            block_stats: records the attention and the keys of its blocks.

        Returns:
            Visual tokens [N, C], and taps [M, N, Cv] in the order of `taps`: each block's residual
            stream, the mean over the patches of a visual token. Both in raster order.
        """
        layout = window_layout(tuple(grids), self.config, patches.device)
        unit, full = self.config.merge_unit, self.config.fullatt_block_indexes
        x = self.embed(patches)[layout.patches]
        tapped = {}
        for index, block in enumerate(self.blocks):
            if block_stats and index in block_stats.blocks:
                block_stats.record(index, block, x, layout)
            x = block(x, layout.rope, layout.frames if index in full else layout.windows)
            if index in taps:
                tapped[index] = x.unflatten(0, (-1, unit)).mean(1)[layout.inverse]
        visual = self.merger(x)[layout.inverse]
        features = [tapped[index] for index in taps]
        return visual, torch.stack(features) if features else visual.new_empty(0, len(visual), 0)

    def pack(self, ops: Ops) -> None:
        """Lays all matrices out for products with many rows; there are no others here."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(ops)
