"""Writes glimpse weights in both layouts: `python -m nanoglimpse.weights SOURCE FOLDER`."""

import sys
from pathlib import Path

from ..config import read_glimpse_config, read_json
from ..errors import NanoglimpseError
from ..generate import Parser
from . import locate, read_tensors, save_glimpse
from .glimpse import OWN, PUBLISHED


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(
        prog="python -m nanoglimpse.weights",
        description=f"Write glimpse weights as {PUBLISHED} (published layout) and as {OWN}.",
    )
    parser.add_argument(
        "source", help="folder or Hub id that holds glimpse weights in either layout"
    )
    parser.add_argument("folder", type=Path, help="where to write config.json and both files")
    args = parser.parse_args(arguments)
    try:
        folder = locate(args.source, ["config.json", PUBLISHED, OWN])
        read_glimpse_config(folder / "config.json")
        file, tensors = read_tensors(folder)
        save_glimpse(args.folder, tensors, read_json(folder / "config.json"))
    except NanoglimpseError as error:
        print(f"nanoglimpse: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{len(tensors)} tensors of {file} written to {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
