"""Entry of the command `python -m nanoglimpse.kernels.report`; see `doctor.resources`."""

import argparse
import sys
from collections.abc import Sequence

from nanoglimpse.cli.console import Parser, run


def report(_: argparse.Namespace) -> int:
    """Prints the table."""
    from nanoglimpse.doctor.resources import print_table

    print_table()
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        "nanoglimpse kernels",
        description="Compiles the Triton kernels for NVIDIA and "
        "AMD GPUs, without one, and lists registers, spills and shared memory of each.",
    )
    return run(report, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
