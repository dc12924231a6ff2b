"""Writes trained weights as checkpoints for the engine and for transformers."""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from nanoglimpse.files import write_whole
from nanoglimpse.weights.mapping import parts


def checkpoint_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a module by checkpoint name; fused matrices are split again."""
    parameters = dict(module.named_parameters())
    return {
        name: parameters[part.name].detach()[part.start : part.stop].to("cpu", dtype).clone()
        for name, part in parts(module).items()
    }


def save_base(folder: Path, module: nn.ModuleDict) -> None:
    """Writes the vision encoder and the decoder to model.safetensors in bf16.

    Raises:
        NanoglimpseError: the file cannot be written.
    """
    model = nn.ModuleDict({name: module[name] for name in ("vision", "decoder")})
    tensors = checkpoint_tensors(model, torch.bfloat16)
    name, config = "visual.patch_embed.proj.weight", module["vision"].config
    side = config.patch_size
    shape = (-1, config.in_channels, config.temporal_patch_size, side, side)
    tensors[name] = tensors[name].view(shape)
    write_whole(folder / "model.safetensors", save(tensors, {"format": "pt"}))
