"""Ahead-of-time compilation of the Triton kernels, which needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

REPORT = """
import json, sys
from nanoglimpse.kernels.triton_ops.resources import TARGETS, compile_all
targets, only = json.loads(sys.argv[1])
for row in compile_all(targets, only):
    print(json.dumps([*row, TARGETS[row.target][1]]))
"""
OTHERS = {"sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942"}
if triton.__version__ < "3.6":
    OTHERS -= {"gfx942"}  # links with ROCm's own linker, which may be missing
# The kernels that come closest to a limit on GPUs other than sm_90.
TIGHT = ("3B norm", "3B few survivors", "vision windows")


def compiled(targets, only=()):
    """Rows of the table, each of which must respect the limits of its target."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT, json.dumps([sorted(targets), only])],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    table = [json.loads(line) for line in done.stdout.splitlines()]
    for target, case, kernel, warps, registers, spilled, shared, limit in table:
        where = (target, case, kernel)
        assert spilled == 0, where
        # With more registers than that, not even one program fits on a multiprocessor.
        assert registers * warps <= 2048, where
        assert shared <= limit, where
    assert {row[0] for row in table} == set(targets)
    return table


def test_every_kernel_compiles_for_hopper():
    """At the shapes of 3B and 7B no kernel spills, and shared memory suffices."""
    assert len({kernel for _, _, kernel, *_ in compiled(["sm_90"])}) == 8


def test_the_tightest_kernels_compile_for_every_target():
    table = compiled(OTHERS, TIGHT)
    assert {row[1] for row in table} == set(TIGHT)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target():
    table = compiled(OTHERS)
    kernels = {kernel for _, _, kernel, *_ in table}
    assert len(kernels) == 8
    for target in OTHERS:
        assert {row[2] for row in table if row[0] == target} == kernels
