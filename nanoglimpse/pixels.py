"""From RGB pixels to patches, and what the patch embedding does with patches as they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from .errors import UsageError
from .kernels.ops import Ops
from .layers import Linear
from .rope import Grid

# Raw pixels are centred before a product: an integer of bf16 either way, but smaller ones.
CENTRE = 128


@dataclass(frozen=True)
class PixelConfig:
    """preprocessor_config.json; the defaults are those of the released Qwen2.5-VL checkpoints.

    `raw` is no part of the file: patches stay pixels, and the vision encoder does the rest.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 12845056
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    raw: bool = False


def patchify(frames: Sequence[Image.Image], grid: Grid, config: PixelConfig) -> Tensor:
    """Patches of a picture, or of a pair of frames, in the order of the merge units.

    Args:
        frames: one picture, or as many as make a temporal patch; RGB, as large as the grid.
        grid: (1, h, w).
        config: mean, deviation and patch sizes.

    Returns:
        fp32 [h · w, channels · frames · side²], a still picture repeated; uint8 [h · w, channels ·
        side²] for each of the frames given, side by side, if they are to stay raw.
    """
    side, merge = config.patch_size, config.merge_size
    units = []
    for frame in frames:
        pixels = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(grid[1] // merge, merge, side, grid[2] // merge, merge, side, 3)
        units.append(pixels.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, side * side))
    raw = torch.cat(units, 2).flatten(1) if len(units) > 1 else units[0].flatten(1)
    return raw if config.raw else normalise(raw, config)


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
        torch.tensor(c, device=raw.device).view(-1, 1, 1)
        for c in ([255.0] * channels, config.image_mean, config.image_std)
    )
    pixels = raw.view(len(raw), channels, -1, config.patch_size**2)
    # Rounded as transformers rounds: x / 255, then the mean, then the deviation, all in fp32. A
    # still picture is normalised before it is repeated.
    pixels = pixels.float().div_(whole).sub_(mean).div_(std)
    return pixels.expand(-1, -1, config.temporal_patch_size, -1).flatten(1)


def joined(patches: Sequence[Tensor]) -> Tensor:
    """Patches one after the other; raw ones of stills are repeated where frames come in pairs.

    Raises:
        UsageError: some are raw, others normalised.
    """
    some = [p for p in patches if len(p)] or list(patches[:1])
    if len(some) == 1:
        return some[0]
    if len({p.dtype for p in some}) > 1:
        raise UsageError("raw and normalised patches cannot be read together; prepare all alike")
    width = max(p.shape[1] for p in some)
    return torch.cat([p if p.shape[1] == width else _repeated(p, width) for p in some])


def _repeated(raw: Tensor, width: int) -> Tensor:
    channels = len(PixelConfig.image_mean)
    frames = width // raw.shape[1]
    return raw.view(len(raw), channels, 1, -1).expand(-1, -1, frames, -1).flatten(1)


class FoldedEmbedding:
    """The patch embedding of raw pixels: mean, deviation and the repeated frame are in its weights.

    W ((x / 255 - m) / s) = W / (255 s) · (x - 128) + W · (128 - 255 m) / (255 s), and a frame that
    is shown twice meets the sum of both halves of W.
    """

    def __init__(self, embedding: Linear, config: PixelConfig, ops: Ops):
        weight = embedding.weight.detach()
        channels, frames = len(config.image_mean), config.temporal_patch_size
        mean, std = (
            torch.tensor(c, dtype=torch.float64, device=weight.device).view(-1, 1, 1)
            for c in (config.image_mean, config.image_std)
        )
        wide = weight.double().view(len(weight), channels, frames, -1) / (255 * std)
        bias = (wide * (CENTRE - 255 * mean)).flatten(1).sum(1)
        self.products = {
            part.flatten(1).shape[1]: self._linear(part.flatten(1), bias, weight, ops)
            for part in (wide, wide.sum(2))
        }

    @staticmethod
    def _linear(weight: Tensor, bias: Tensor, like: Tensor, ops: Ops) -> Linear:
        linear = Linear(0, 0)
        for name, value in (("weight", weight), ("bias", bias)):
            setattr(linear, name, nn.Parameter(value.type_as(like), requires_grad=False))
        linear.pack(ops)
        return linear

    def __call__(self, raw: Tensor) -> Tensor:
        """uint8 [P, channels · frames · side²], one frame or a temporal patch, to [P, Cv]."""
        linear = self.products[raw.shape[1]]
        return linear(raw.to(linear.bias.dtype).sub_(CENTRE))
