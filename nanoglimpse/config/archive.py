"""What a .pt file may hold: uncompressed records, and a pickle that names tensors only."""

import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from nanoglimpse.config.schema import shown
from nanoglimpse.errors import NanoglimpseError

# What the pickle of a .pt file may name, storages apart, and its greatest size.
_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
_PICKLE_BYTES = 2**22


def load_archive(file: Path) -> Any:
    """The content of a .pt file, with the values of its tensors mapped and not yet read.

    Raises:
        NanoglimpseError: the file is corrupt, or contains more than tensors.
    """
    try:
        _check(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the pickle protocol
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise NanoglimpseError(
            f"{file} contains more than tensors; it is not loaded, because it could run code"
        ) from None
    except NanoglimpseError:
        raise
    except Exception as error:  # a hostile pickle fails with an exception of any type
        reason = shown(str(error))
        raise NanoglimpseError(f"{file} is corrupt or cannot be read: {reason}") from None


def _check(file: Path) -> None:
    """Refuses what `torch.load` would inflate or call, before it does.

    Raises:
        NanoglimpseError: a record is compressed, or larger than the file.
        UnpicklingError: the file is a bare pickle, or names more than tensors consist of.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as head:
            is_pickle = head.read(1) == b"\x80"
        raise (pickle.UnpicklingError if is_pickle else ValueError)("it is no zip file of torch")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise NanoglimpseError(f"{file} has compressed records, which torch.save never writes")
        (listed,) = [record for record in records if record.filename.endswith("data.pkl")]
        sizes = sum(record.file_size for record in records)
        if sizes > file.stat().st_size or listed.file_size > _PICKLE_BYTES:
            raise NanoglimpseError(f"{file} has records that are larger than it can hold")
        for opcode, argument, _ in pickletools.genops(archive.read(listed)):
            storage = str(argument).startswith("torch ") and str(argument).endswith("Storage")
            if opcode.name == "GLOBAL" and argument not in _NAMES and not storage:
                raise pickle.UnpicklingError(argument)
