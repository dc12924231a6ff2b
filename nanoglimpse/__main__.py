"""`nanoglimpse COMMAND …`, and `python -m nanoglimpse`, which lists the commands."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from nanoglimpse.cli.console import Parser, fail, run
from nanoglimpse.version import VERSION

# Each command is a module with a function `main`; it is imported when it is asked for.
COMMANDS = {
    "generate": ("nanoglimpse.cli.ask", "answer a question about pictures; chat; answer a file"),
    "evaluate": ("nanoglimpse.evaluate.__main__", "compare pruning methods on questions"),
    "train": ("nanoglimpse.train.__main__", "train glimpse weights, or a small base model"),
    "world": ("nanoglimpse.world.__main__", "draw pictures with questions of the synthetic world"),
    "weights": ("nanoglimpse.weights.__main__", "convert glimpse weights"),
    "doctor": ("nanoglimpse.doctor.__main__", "check the kernels beside torch on this machine"),
    "kernels": ("nanoglimpse.kernels.report", "compile the Triton kernels and list their use"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else "--help"
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(words[1:])
    if name in SAID:
        return run(SAID[name], Parser(), [])
    fail(f"there is no command {name}; use one of {', '.join(COMMANDS)}")
    return 2


def _version(_: argparse.Namespace) -> int:
    print(f"nanoglimpse {VERSION}")
    return 0


def _help(_: argparse.Namespace) -> int:
    width = max(map(len, COMMANDS))
    print("usage: nanoglimpse COMMAND …\n")
    print("\n".join(f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()))
    print("\nnanoglimpse COMMAND --help lists the options of a command.")
    return 0


SAID = {"--version": _version, "--help": _help, "-h": _help}

if __name__ == "__main__":
    sys.exit(main())
