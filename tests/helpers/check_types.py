"""Runs mypy over the package as it is installed: `python -m tests.helpers.check_types`.

A checkout keeps kernels and weights beside nanoglimpse, where mypy would not look for them. It is
therefore shown a folder of links in which they are inside.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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


def main() -> int:
    """Prints the errors; returns 1 if there is one."""
    found = errors()
    print("\n".join([*found, f"{len(found)} errors"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
