"""The safetensors files of a checkpoint, and what their headers say of each tensor."""

import ctypes
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoglimpse.config.schema import Schema, ignore, mapping, read_json, shown, text
from nanoglimpse.errors import NanoglimpseError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# In the order in which safetensors writes them: wide ones first, so that each tensor begins at a
# multiple of the size of its type.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLOATS = ("F64", "F32", "F16", "BF16")
_INDEX = Schema({"weight_map": mapping(text(longest=1024), 2**20)}, unknown=ignore)


def shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: one file, or else those of its index, as in transformers.

    Raises:
        NanoglimpseError: there are none, or one is missing or outside the folder.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.exists():
        told = f"{folder} holds {SINGLE} and {INDEX}; the former is read"
        warnings.warn(f"{told}, remove what is out of date", stacklevel=4)
    files = [single] if single.is_file() or not index.exists() else _indexed(index)
    for file in files:
        if not file.is_file():
            raise NanoglimpseError(f"{file} is missing; a checkpoint needs {SINGLE} or {INDEX}")
    return files


def _indexed(path: Path) -> list[Path]:
    """The files that an index names, each once, in the order of their names."""
    names = sorted(set(_INDEX.read(read_json(path), str(path))["weight_map"].values()))
    if not names:
        raise NanoglimpseError(f"{path}: key 'weight_map' is empty")
    for name in names:
        windows = PureWindowsPath(name)
        leaves = name.startswith("/") or windows.drive or windows.root or ".." in windows.parts
        if leaves or PurePosixPath(name).suffix != ".safetensors" or "\0" in name:
            raise NanoglimpseError(
                f"{path}: weight_map names {shown(name)}; only .safetensors files in the folder "
                "are read"
            )
    return [path.parent / name for name in names]


class Stored(NamedTuple):
    """A tensor of a safetensors file: its name there, and what the header says of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, rows: slice | None = None) -> Tensor:
        """Its values, or some rows of them.

        The file is opened for each tensor: the pages of a mapping that have been read count as
        memory of the process until it is closed, which would add whole files to the peak.

        Raises:
            NanoglimpseError: the file cannot be read.
        """
        with _opened(self.file) as handle:
            if rows is None:
                return handle.get_tensor(self.name)
            return handle.get_slice(self.name)[rows]


def headers(files: Iterable[Path]) -> Iterator[Stored]:
    """What the headers of safetensors files say, in the order of the files.

    Raises:
        NanoglimpseError: a file is corrupt or cannot be read, or a tensor is not of floating point
            numbers.
    """
    for file in files:
        with _opened(file) as handle:
            for name in handle.offset_keys():
                view = handle.get_slice(name)
                found = Stored(file, name, tuple(view.get_shape()), view.get_dtype())
                if found.dtype not in FLOATS:
                    kinds = ", ".join(FLOATS)
                    raise NanoglimpseError(
                        f"{file}: tensor {shown(name)} is {found.dtype}; only {kinds} can be loaded"
                    )
                yield found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise NanoglimpseError(
            f"{file} is corrupt or cannot be read: {shown(str(error))}"
        ) from None


def as_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a safetensors file: https://github.com/huggingface/safetensors#format.

    As `safetensors.torch.save`, which needs NumPy.
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    parts, end = [], 0
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name in names:
        own = tensors[name].detach().cpu().contiguous()
        begin, end = end, end + own.nbytes
        parts.append(ctypes.string_at(own.data_ptr(), own.nbytes) if own.nbytes else b"")
        header[name] = {
            "dtype": DTYPES[own.dtype],
            "shape": list(own.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
