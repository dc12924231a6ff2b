"""Files that appear whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from nanoglimpse.errors import NanoglimpseError, UsageError


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` to `path` by renaming a finished file; makes the folder where it is missing.

    Raises:
        NanoglimpseError: it cannot be written; what was there before is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise NanoglimpseError(f"{path} cannot be written: {error}") from None


def check_writable(path: Path, what: str) -> None:
    """Refuses a path where no file can be written; `what` it would be stands in the message.

    Raises:
        UsageError: it is a folder, there is none to write in, or that is read-only.
    """
    parent = path.absolute().parent
    if path.is_dir():
        raise UsageError(f"the {what} cannot be written: {path} is a folder")
    if not parent.is_dir():
        raise UsageError(f"the {what} cannot be written: there is no folder {path.parent}")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"the {what} cannot be written: {parent} is read-only")
