"""Reads and writes glimpse weights in the published layout and in our own.

Published (official model_gp.py, `save_new_modules`): config.json and new_modules_gp.pt, a dict of
`attn_fuser`, `learnable_embeddings`, `le_proj` and `le_norm`. Ours: the same config.json and
glimpse.safetensors with the same tensors under their dotted names.
"""

import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoglimpse.config import (
    Config,
    GlimpseConfig,
    as_safetensors,
    load_archive,
    read_glimpse_config,
    shown,
)
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.files import write_whole_folder
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.model.glimpse import Glimpse
from nanoglimpse.weights.checkpoint import Checkpoint, check, fill, flat
from nanoglimpse.weights.mapping import parts

PUBLISHED, OWN = "new_modules_gp.pt", "glimpse.safetensors"
_SECTIONS = ("attn_fuser", "learnable_embeddings", "le_norm", "le_proj")
_VECTORS = ("learnable_embeddings", "le_proj.weight", "le_proj.bias", "le_norm.weight")


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """File and tensors of the glimpse weights in `folder`, by dotted name.

    Raises:
        NanoglimpseError: there are none, or the file is corrupt or contains more than tensors.
    """
    own, published = folder / OWN, folder / PUBLISHED
    if own.is_file():
        return own, {name: tensor.clone() for _, name, tensor in Checkpoint([own])}
    if published.is_file():
        return published, _flatten(published)
    raise NanoglimpseError(f"{folder} contains no glimpse weights, {OWN} or {PUBLISHED}")


def _flatten(file: Path) -> dict[str, Tensor]:
    # Values are read where they are used, after the comparison of their shapes.
    content = load_archive(file)
    if not isinstance(content, dict) or set(content) != set(_SECTIONS):
        raise NanoglimpseError(f"{file}: expected a dict of {', '.join(_SECTIONS)}")
    tensors: dict[str, Tensor] = {}
    for section, value in content.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        tensors |= {f"{section}.{name}".rstrip("."): tensor for name, tensor in entries}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise NanoglimpseError(f"{file}: {shown(name)} is not a tensor")
        if tensor.nbytes > tensor.untyped_storage().nbytes() or not tensor.is_floating_point():
            raise NanoglimpseError(f"{file}: {shown(name)} is larger than stored, or no floats")
    return tensors


def load_glimpse(
    folder: Path, base: Config, ops: Ops, dtype: torch.dtype, device: torch.device
) -> Glimpse:
    """Glimpse token and predictor for the model `base`.

    Raises:
        UsageError: they were trained for another model.
        NanoglimpseError: a file is missing or broken, or a tensor missing, unknown or misshapen.
    """
    own_base, config = read_glimpse_config(folder / "config.json")
    _check_base(own_base, base, folder)
    file, tensors = read_tensors(folder)
    with torch.device("meta"):
        glimpse = Glimpse(base, config, ops)
    vectors = _vectors(file, tensors, own_base, config)
    glimpse.vectors = nn.Parameter(vectors.to(device, dtype), requires_grad=False)
    # With deep supervision, each block has a head in training; inference uses the last one.
    head = f"attn_fuser.attn_out_projs.{max(len(config.selected_visual_layers) - 1, 0)}."
    renamed = (
        (str(file), name.replace(head, "attn_fuser.attn_out_proj."), tensor)
        for name, tensor in tensors.items()
    )

    def is_unused(name: str) -> bool:
        return config.deep_supervision and name.startswith("attn_fuser.attn_out_projs.")

    module = nn.ModuleDict({"predictor": glimpse.predictor})
    fill(module, renamed, parts(module), is_unused, dtype, device)
    return glimpse


def _check_base(own: Config, base: Config, folder: Path) -> None:
    for section, names in {
        "text_config": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
        "vision_config": ("hidden_size", "depth", "spatial_merge_size", "window_size"),
    }.items():
        for name in names:
            wanted, found = (getattr(getattr(c, section), name) for c in (own, base))
            if wanted != found:
                raise UsageError(
                    f"the glimpse weights in {folder} are for another model: "
                    f"{section} {name} is {wanted} there and {found} here"
                )


def _vectors(file: Path, tensors: dict[str, Tensor], base: Config, config: GlimpseConfig) -> Tensor:
    """RMSNorm(W·E + b) of each layer with a vector, fp32 [L, C]; removes the tensors it reads."""
    text, size, read = base.text_config, base.text_config.hidden_size, []
    shapes = ((len(config.le_layers), size), (size, size), (size,), (size,))
    for name, shape in zip(_VECTORS, shapes, strict=True):
        if name not in tensors:
            raise NanoglimpseError(f"{file}: tensor '{name}' is missing")
        tensor = tensors.pop(name)
        check(tensor.shape, shape, f"{file}: tensor '{name}'")
        read.append(flat(tensor).float())
    embeddings, weight, bias, scale = read
    vectors = torch.zeros(text.num_hidden_layers, size)
    vectors[list(config.le_layers)] = F.rms_norm(
        F.linear(embeddings, weight, bias), (size,), scale, text.rms_norm_eps
    )
    return vectors


def save_glimpse(folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Writes both layouts as one folder, which appears whole or not at all.

    Args:
        folder: folder to write; files of other names that it holds are kept.
        tensors: tensors by dotted name, as from `read_tensors`.
        config: content of config.json.

    Raises:
        NanoglimpseError: the folder cannot be written.
    """
    sections: dict = {name: {} for name in _SECTIONS}
    for name, tensor in tensors.items():
        section, _, rest = name.partition(".")
        if rest:
            sections[section][rest] = tensor
        else:
            sections[section] = tensor
    pickled = io.BytesIO()
    torch.save(sections, pickled)
    own = as_safetensors(tensors, {})
    files = {
        PUBLISHED: pickled.getvalue(),
        OWN: own,
        "config.json": json.dumps(config, indent=2).encode(),
    }
    write_whole_folder(folder, files)
