"""The command `nanoglimpse doctor`: which operations agree with torch on this machine."""

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch

from nanoglimpse.cli import console, options
from nanoglimpse.cli.console import Parser
from nanoglimpse.engine import Engine
from nanoglimpse.kernels.checked import OpCheck
from nanoglimpse.version import VERSION

# Of so many sequences at once: alone, and with every size of the product of few rows.
BATCHES = (1, 3, 16)


def parser() -> Parser:
    """The parser of the command line."""
    p = Parser(
        "nanoglimpse doctor",
        description="Runs pictures of noise through a model with every kernel beside torch, and "
        "says which of them agree. Those at fault are replaced by torch wherever the model is "
        "warmed up, as the other commands do.",
        quiet=True,
    )
    options.add_shared(p, "model")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 1 where an operation is at fault."""
    return console.run(command, parser(), arguments)


def command(args: argparse.Namespace) -> int:
    """Checks and prints a table; returns the exit code."""
    engine = options.load_engine(args, check=False)
    print("\n".join(machine(engine)))
    checks = engine.warm_up(batches=BATCHES)
    print(table(checks) if checks else "Every operation is torch's own here: nothing to check.")
    captured = "captured" if engine.graphs else "not captured"
    print(f"Decode steps are {captured}.")
    return int(any(check.fault for check in checks))


def machine(engine: Engine) -> Iterator[str]:
    """Lines about versions and device."""
    triton = "no triton"
    if find_spec("triton"):
        import triton as installed

        triton = f"triton {installed.__version__}"
    versions = f"torch {torch.__version__}, {triton}, Python {platform.python_version()}"
    yield f"nanoglimpse {VERSION}, {versions}"
    if engine.device.type == "cuda":
        found = torch.cuda.get_device_properties(engine.device)
        kind = f"compute capability {found.major}.{found.minor}"
        yield f"{engine.device}: {found.name}, {kind}, {found.total_memory / 2**30:.0f} GiB"


def table(checks: Sequence[OpCheck]) -> str:
    """An operation a line: how often it was compared, its largest error, and the verdict."""
    rows = [
        f"{check.name:18}{check.calls:>9}{check.error:>15.1e}  {check.fault or 'agrees'}"
        for check in sorted(checks, key=lambda check: check.name)
    ]
    return "\n".join([f"{'operation':18}{'compared':>9}{'largest error':>15}", *rows])


if __name__ == "__main__":
    sys.exit(main())
