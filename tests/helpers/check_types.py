"""Runs mypy over the package as it is installed: `python -m tests.helpers.check_types`.

A checkout keeps kernels and weights beside nanoglimpse, where mypy would not look for them. It is
therefore shown a folder of links in which they are inside.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Errors that a room may have at most; all others have none, and these numbers only fall.
RATCHET = {"train": 2}


def errors() -> list[str]:
    """The errors that mypy finds, as "path:line: error: text", paths inside the package."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "nanoglimpse"
        package.mkdir()
        for entry in (ROOT / "nanoglimpse").iterdir():
            (package / entry.name).symlink_to(entry)
        for name in ("kernels", "weights"):
            (package / name).symlink_to(ROOT / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        done = subprocess.run(
            [*command, "-p", "nanoglimpse"], cwd=folder, capture_output=True, text=True
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def room(error: str) -> str:
    """The room of the package that an error is in."""
    return error.partition(":")[0].split("/")[1]


def main() -> int:
    """Prints the errors; returns 1 if a room has more than its ratchet."""
    found = errors()
    print("\n".join(found))
    counts = {name: sum(room(error) == name for error in found) for name in map(room, found)}
    over = {name: n for name, n in counts.items() if n > RATCHET.get(name, 0)}
    print(f"{len(found)} errors; too many in: {over or 'no room'}")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
