"""Writes glimpse weights in both layouts: `nanoglimpse weights SOURCE FOLDER`."""

import argparse
import sys
from collections.abc import Sequence

from nanoglimpse.cli import console
from nanoglimpse.cli.kinds import FILE, NAME
from nanoglimpse.config import read_glimpse_config, read_json
from nanoglimpse.weights.glimpse import OWN, PUBLISHED, read_tensors, save_glimpse
from nanoglimpse.weights.hub import GLIMPSE_FILES, locate


def parser() -> console.Parser:
    """The parser of the command line."""
    p = console.Parser(
        prog="nanoglimpse weights",
        description=f"Write glimpse weights as {PUBLISHED} (published layout) and as {OWN}.",
    )
    add = console.adder(p)
    add("source", NAME, "folder or Hub id that holds glimpse weights in either layout")
    add("folder", FILE, "where to write config.json and both files")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code (`console.run`)."""
    return console.run(convert, parser(), arguments)


def convert(args: argparse.Namespace) -> int:
    """Reads weights in either layout and writes both."""
    folder = locate(args.source, GLIMPSE_FILES)
    read_glimpse_config(folder / "config.json")
    file, tensors = read_tensors(folder)
    save_glimpse(args.folder, tensors, read_json(folder / "config.json"))
    print(f"{len(tensors)} tensors of {file} written to {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
