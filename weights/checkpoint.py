"""Streams weights from safetensors into the parameters of a model.

A model is built on the meta device, and compared with the headers of the files. Only then is a
parameter allocated on its device, when its first tensor is read, and tensors are cast and copied
into it one at a time: no weight is in memory twice.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoglimpse.config import Stored, headers, shown
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.weights.mapping import Part, canonical

Progress = Callable[[int, int], None]


class Checkpoint:
    """Tensors of safetensors files; iterating reads them, as (file, name, tensor).

    Args:
        files: safetensors files.
        progress: called with the bytes read so far, and their total.

    Attributes:
        files: the files.
        stored: the tensors by their canonical names, in the order of the files.

    Raises:
        NanoglimpseError: a file is corrupt or cannot be read, holds something else than floating
            point numbers, or a tensor that another has.
    """

    def __init__(self, files: list[Path], progress: Progress = lambda done, total: None):
        self.files, self.progress = files, progress
        self.stored: dict[str, Stored] = {}
        for found in headers(files):
            if self.stored.setdefault(canonical(found.name), found) is not found:
                raise NanoglimpseError(f"{found.file}: tensor {shown(found.name)} is there twice")

    def __iter__(self) -> Iterator[tuple[str, str, Tensor]]:
        done, total = 0, sum(f.stat().st_size for f in {s.file for s in self.stored.values()})
        for name, stored in self.stored.items():
            tensor = stored.read()
            yield str(stored.file), name, tensor
            done += tensor.nbytes
            self.progress(min(done, total), total)
        self.progress(total, total)


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
        source: (file, canonical name, tensor); all of a `Checkpoint` is compared before it is read.
        table: rows of a parameter by the canonical name of the tensor that fills them.
        unused: whether the model ignores a tensor by design.
        whole: called with each parameter when it is complete; returns what `module` gets for it.

    Raises:
        NanoglimpseError: a tensor is missing, unknown, or does not have the shape of its parameter.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    wanted = {n: (part.stop - part.start, *shapes[part.name][1:]) for n, part in table.items()}
    missing, file = set(table), ""
    if isinstance(source, Checkpoint):
        for name, stored in source.stored.items():
            if not unused(name):
                check(stored.shape, wanted.get(name), f"{stored.file}: tensor {shown(name)}")
        _complete(missing - source.stored.keys(), str(source.files[-1]))
    state: dict[str, Tensor] = {}
    ready: dict[str, Tensor] = {}
    left = Counter(part.name for part in table.values())
    for file, name, tensor in source:
        if unused(name):
            continue
        needed = wanted.get(name) if name in missing else None
        check(tensor.shape, needed, f"{file}: tensor {shown(name)}")
        missing.remove(name)
        part = table[name]
        if part.name not in state:
            state[part.name] = torch.empty(shapes[part.name], dtype=dtype, device=device)
        state[part.name][part.start : part.stop].copy_(flat(tensor))
        left[part.name] -= 1
        if not left[part.name]:
            ready |= whole(part.name, state.pop(part.name))
    _complete(missing, file)
    module.requires_grad_(False)
    module.load_state_dict(ready, strict=True, assign=True)


def _complete(missing: Iterable[str], file: str) -> None:
    if names := sorted(missing):
        raise NanoglimpseError(
            f"{file}: {len(names)} tensors are missing, the first is '{names[0]}'"
        )


def check(shape: Sequence[int], wanted: Sequence[int] | None, what: str) -> None:
    """Compares the shape of a tensor, whose axes but the first count as one, with what is needed.

    Raises:
        NanoglimpseError: the shapes differ, or `wanted` is None and nothing is.
    """
    if wanted is None:
        raise NanoglimpseError(f"{what} has no place in this model")
    found = (shape[0], math.prod(shape[1:])) if len(shape) > 2 else shape
    if tuple(found) != tuple(wanted):
        raise NanoglimpseError(
            f"{what} has shape {list(shape)}, but the model needs {list(wanted)}"
        )


def flat(tensor: Tensor) -> Tensor:
    """A convolution kernel as a matrix; others as they are."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor
