"""LoRA adapters in PEFT layout, merged into the weights at load: W + s · B A.

With DoRA, the rows of that are then scaled to lengths of their own.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanoglimpse.config import AdapterConfig, Layer, Stored, headers, read_adapter_config, shown
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.weights.checkpoint import flat
from nanoglimpse.weights.mapping import Part, canonical

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Change(NamedTuple):
    """What an adapter does to one matrix W [out, in].

    Attributes:
        what: names it in errors.
        scale: s.
        a, b: A [r, in] and B [out, r].
        lengths: [out], of the rows; None without DoRA.
    """

    what: str
    scale: float
    a: Tensor
    b: Tensor
    lengths: Tensor | None

    def merge(self, weight: Tensor) -> None:
        """Changes W, in place; in fp32, and rounded once."""
        a, b = (matrix.to(weight.device, torch.float32) for matrix in (self.a, self.b))
        change = self.scale * b @ a
        if self.lengths is None:
            weight += change.to(weight.dtype)
            return
        change += weight
        lengths = self.lengths.to(weight.device, torch.float32)[:, None]
        weight.copy_(change * (lengths / change.norm(dim=1, keepdim=True)))


class Adapter(NamedTuple):
    """An adapter.

    Attributes:
        changes: by the canonical name of the adapted layer.
        replaced: tensors that take the place of others, by their canonical names.
    """

    changes: dict[str, Change]
    replaced: dict[str, Stored]

    @property
    def unties(self) -> bool:
        """Whether the head and the embeddings differ afterwards."""
        replaced = {"lm_head.weight", "model.embed_tokens.weight"} & self.replaced.keys()
        return "lm_head" in self.changes or bool(replaced)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder of adapter_config.json and adapter_model.safetensors.

    Raises:
        NanoglimpseError: a file is missing or broken, or this kind of adapter cannot be merged.
    """
    config, file = read_adapter_config(folder / CONFIG), folder / TENSORS
    if not file.is_file():
        raise NanoglimpseError(f"{file} is missing")
    layers, replaced = config.sort(headers([file]), _canonical)
    return Adapter({name: _change(config, name, found) for name, found in layers.items()}, replaced)


def _canonical(name: str) -> str:
    """The canonical name of a layer, also where the adapter is one of the model without a head."""
    name = re.sub(r"^(model\.)?language_model\.", "model.", canonical(name))
    return re.sub(r"^(layers|embed_tokens|norm)\b", r"model.\1", name)


def _change(config: AdapterConfig, name: str, found: Layer) -> Change:
    later = re.sub("^model", "model.language_model", re.sub("^visual", "model.visual", name))
    rank, scale = config.rank_and_scale([found.name, name, later])
    what, tensors = f"{found.file}: {shown(name)}", found.tensors
    for kind, axis in (("A", 0), ("B", 1)):
        shape = tensors[kind].shape
        if len(shape) < 2 or shape[axis] != rank:
            raise NanoglimpseError(
                f"{what} has a lora_{kind} of shape {list(shape)}, but rank {rank} in {CONFIG}"
            )
    read = {kind: flat(stored.read()) for kind, stored in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in read.values()):
        raise NanoglimpseError(f"{what} is not finite; the training has diverged")
    lengths = read.get("magnitude_vector")
    return Change(what, scale, read["A"], read["B"], None if lengths is None else lengths.flatten())


def place(
    adapter: Adapter, table: dict[str, Part], model: nn.Module
) -> dict[str, list[tuple[Part, Change]]]:
    """The changes by the name of the parameter, with its rows.

    Args:
        adapter: the adapter.
        table: rows of a parameter by the canonical name of the tensor that fills them.
        model: has the parameters.

    Raises:
        NanoglimpseError: the adapter was trained on another model.
    """
    changes: dict[str, list[tuple[Part, Change]]] = {}
    for layer, change in adapter.changes.items():
        part = table.get(f"{layer}.weight")
        if part is None or layer == "model.embed_tokens":
            raise NanoglimpseError(f"{change.what}: this model has no such linear layer")
        wanted = (part.stop - part.start, *model.get_parameter(part.name).shape[1:])
        found = (len(change.b), change.a.shape[1])
        rows = len(change.b) if change.lengths is None else len(change.lengths)
        if found != wanted or rows != wanted[0]:
            raise NanoglimpseError(
                f"{change.what} is {found[0]} × {found[1]}, but {' × '.join(map(str, wanted))} in "
                "this model; the adapter belongs to another model"
            )
        changes.setdefault(part.name, []).append((part, change))
    return changes
