"""Devices whose loss harms nobody: a faulty write must not replace those of the machine."""

import os
import stat
from pathlib import Path

MINORS = {"null": 3, "full": 7}


def device(name: str, folder: Path) -> Path:
    """A device of that name in a folder, where one can be made; else nobody can replace its own."""
    path = folder / name
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, MINORS[name]))
        path.open("wb").close()
    except OSError:
        return Path("/dev", name)
    return path
