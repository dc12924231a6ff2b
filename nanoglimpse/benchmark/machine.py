"""A record of what ran where."""

import argparse
import platform
import subprocess
from contextlib import suppress
from typing import Any

import torch

from nanoglimpse.benchmark import ROOT
from nanoglimpse.version import VERSION


def machine(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The device, the software and the model."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype)[6:],
        "quantize": args.quantize,
        "backend": args.backend,
        "model": args.shape or args.model,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nanoglimpse": VERSION,
        "commit": commit(),
    }


def commit() -> str:
    """The commit of this checkout, marked if there are changes; empty without git or a checkout."""
    with suppress(OSError):
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()
    return ""
