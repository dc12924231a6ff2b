"""LoRA adapters in PEFT layout, merged into the weights at load: W + (alpha / r) · B A."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanoglimpse.config import read_json
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.weights.checkpoint import stream
from nanoglimpse.weights.mapping import Part, canonical

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


class Adapter(NamedTuple):
    """A LoRA adapter.

    Attributes:
        file: file of the tensors, for errors.
        scale: alpha / r, or alpha / sqrt(r) if rank-stabilised.
        matrices: A [r, in] and B [out, r] by the canonical name of the adapted layer.
    """

    file: Path
    scale: float
    matrices: dict[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder of adapter_config.json and adapter_model.safetensors.

    Raises:
        NanoglimpseError: a file is missing or broken, or this kind of adapter cannot be merged.
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
    file = folder / TENSORS
    if not file.is_file():
        raise NanoglimpseError(f"{file} is missing")
    loaded = {name: tensor.clone() for _, name, tensor in stream([file])}
    matrices = {}
    for name in [name for name in loaded if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        a, b = loaded.pop(name), loaded.pop(f"{stem}.lora_B.weight", None)
        if b is None:
            raise NanoglimpseError(f"{file}: '{name}' has no lora_B")
        matrices[canonical(stem.removeprefix("base_model.model."))] = (a, b)
    if loaded:
        raise NanoglimpseError(f"{file}: tensor '{min(loaded)}' is not a LoRA matrix")
    return Adapter(file, alpha / (rank**0.5 if config.get("use_rslora") else rank), matrices)


def merge(name: str, parameter: Tensor, adapter: Adapter, table: dict[str, Part]) -> None:
    """Adds an adapter to one parameter, in place.

    Args:
        name: name of the parameter in `table`.
        parameter: the parameter.
        adapter: the adapter.
        table: rows of a parameter by the canonical name of the tensor that fills them.

    Raises:
        NanoglimpseError: the adapter was trained on another model.
    """
    for layer, (a, b) in adapter.matrices.items():
        part = table.get(f"{layer}.weight")
        if part is None:
            raise NanoglimpseError(f"{adapter.file}: this model has no layer '{layer}'")
        if part.name != name:
            continue
        weight = parameter[part.start : part.stop]
        if (len(b), a.shape[1]) != tuple(weight.shape):
            raise NanoglimpseError(
                f"{adapter.file}: '{layer}' is {len(b)} × {a.shape[1]}, but {len(weight)} × "
                f"{weight.shape[1]} in this model; the adapter belongs to another model"
            )
        a, b = (matrix.to(weight.device, torch.float32) for matrix in (a, b))
        weight += (adapter.scale * b @ a).to(weight.dtype)
