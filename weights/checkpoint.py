"""Streams weights from safetensors into the parameters of a model.

A model is built on the meta device. A parameter is allocated on its device when its first tensor is
read, and tensors are cast and copied into it one at a time: no weight is in memory twice.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanoglimpse.config import read_json
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.weights.mapping import Part, canonical

Progress = Callable[[int, int], None]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: one file, or those of its index.

    Raises:
        NanoglimpseError: there are none, or one is missing.
    """
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise NanoglimpseError(f"{folder / INDEX}: key 'weight_map' is missing or empty")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            raise NanoglimpseError(f"{file} is missing; a checkpoint needs {SINGLE} or {INDEX}")
    return files


def stream(
    files: list[Path], progress: Progress = lambda done, total: None
) -> Iterator[tuple[str, str, Tensor]]:
    """All tensors of safetensors files as (file, name, tensor), in the order of the files.

    A file is opened again for each tensor: the pages of a mapping that have been read count as
    memory of the process until it is closed, which would add whole files to the peak.

    Args:
        files: safetensors files.
        progress: called with the bytes read so far, and their total.

    Raises:
        NanoglimpseError: a file is corrupt or cannot be read.
    """
    done, total = 0, sum(file.stat().st_size for file in files)
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                names = list(handle.offset_keys())
            for name in names:
                with safe_open(file, "pt") as handle:
                    tensor = handle.get_tensor(name)
                yield str(file), name, tensor
                done += tensor.nbytes
                progress(done, total)
        except (SafetensorError, OSError) as error:
            raise NanoglimpseError(f"{file} is corrupt or cannot be read: {error}") from None
    progress(total, total)


def fill(
    module: nn.Module,
    source: Iterable[tuple[str, str, Tensor]],
    table: dict[str, Part],
    unused: Callable[[str], bool],
    dtype: torch.dtype,
    device: torch.device,
    whole: Callable[[str, Tensor], dict[str, Tensor]] = lambda name, tensor: {name: tensor},
) -> None:
    """Loads all parameters of `module`, which is on the meta device, and freezes them.

    Args:
        module: gets its parameters in `dtype` on `device`.
        source: (file, name, tensor).
        table: rows of a parameter by the canonical name of the tensor that fills them.
        unused: whether the model ignores a tensor by design.
        whole: called with each parameter when it is complete; returns what `module` gets for it.

    Raises:
        NanoglimpseError: a tensor is missing, unknown, or does not have the shape of its parameter.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    missing, file = dict(table), ""
    state: dict[str, Tensor] = {}
    ready: dict[str, Tensor] = {}
    left = Counter(part.name for part in table.values())
    for file, raw_name, tensor in source:
        name = canonical(raw_name)
        if unused(name):
            continue
        if name not in missing:
            raise NanoglimpseError(f"{file}: tensor '{raw_name}' has no place in this model")
        part = missing.pop(name)
        if part.name not in state:
            state[part.name] = torch.empty(shapes[part.name], dtype=dtype, device=device)
        put(state[part.name][part.start : part.stop], tensor, f"{file}: tensor '{raw_name}'")
        left[part.name] -= 1
        if not left[part.name]:
            ready |= whole(part.name, state.pop(part.name))
    if missing:
        raise NanoglimpseError(
            f"{file}: {len(missing)} tensors are missing, the first is '{min(missing)}'"
        )
    module.requires_grad_(False)
    module.load_state_dict(ready, strict=True, assign=True)


def put(target: Tensor, tensor: Tensor, what: str) -> None:
    """Copies `tensor` into `target`, a view of a parameter; a convolution kernel is flattened.

    Raises:
        NanoglimpseError: the shapes differ.
    """
    flat = tensor.flatten(1) if tensor.ndim > 2 else tensor
    if flat.shape != target.shape:
        raise NanoglimpseError(
            f"{what} has shape {list(tensor.shape)}, but the model needs {list(target.shape)}"
        )
    target.copy_(flat)
