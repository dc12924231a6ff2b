"""What a .pt file may hold: uncompressed records, and a pickle that names tensors only."""

import pickle
import pickletools
import zipfile
from pathlib import Path

from nanoglimpse.errors import NanoglimpseError

# What the pickle of a .pt file may name, storages apart, and its greatest size.
_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
_PICKLE_BYTES = 2**22


def check_archive(file: Path) -> None:
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
