"""LoRA adapters in PEFT layout, merged into the weights at load: W + (alpha / r) · B A."""

from pathlib import Path

import torch
from torch import nn

from ..config import read_json
from ..errors import NanoglimpseError
from .checkpoint import stream
from .names import Part, canonical

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_UNSUPPORTED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}


def merge(module: nn.Module, folder: Path, table: dict[str, Part]) -> None:
    """Adds the adapter in `folder` to the weights of `module`.

    Args:
        module: loaded.
        folder: holds adapter_config.json and adapter_model.safetensors.
        table: canonical tensor name to its rows of a parameter.

    Raises:
        NanoglimpseError: the adapter is of a kind that cannot be merged, or of another base.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise NanoglimpseError(f"{folder / CONFIG}: peft_type is not LORA")
    for key, value in _UNSUPPORTED.items():
        if config.get(key) and config[key] != value:
            raise NanoglimpseError(f"{folder / CONFIG}: {key} {config[key]!r} cannot be merged")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not rank or not alpha:
        raise NanoglimpseError(f"{folder / CONFIG}: r and lora_alpha must be given")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    file = folder / TENSORS
    if not file.is_file():
        raise NanoglimpseError(f"{file} is missing")
    loaded = {name: tensor for _, name, tensor in stream([file])}
    parameters = dict(module.named_parameters())
    for name in [n for n in loaded if n.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        part = table.get(canonical(stem.removeprefix("base_model.model.")) + ".weight")
        a, b = loaded.pop(name), loaded.pop(f"{stem}.lora_B.weight", None)
        if part is None or b is None:
            raise NanoglimpseError(f"{file}: tensor '{name}' belongs to no layer of this model")
        weight = parameters[part.name][part.start : part.stop]
        if (len(b), a.shape[1]) != tuple(weight.shape):
            raise NanoglimpseError(
                f"{file}: '{stem}' adapts a {len(b)} × {a.shape[1]} matrix, the model's is "
                f"{len(weight)} × {weight.shape[1]}; the adapter is of another base"
            )
        delta = scale * b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
        weight += delta.to(weight.dtype)
    if loaded:
        raise NanoglimpseError(f"{file}: tensor '{min(loaded)}' is no LoRA matrix of this model")
