"""Files that appear whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from .errors import NanoglimpseError


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
