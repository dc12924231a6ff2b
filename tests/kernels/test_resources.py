"""Ahead-of-time compilation of the Triton kernels, which needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

REPORT = """
import json
from nanoglimpse.kernels.triton_ops.resources import TARGETS, compile_all
for row in compile_all():
    print(json.dumps([*row, TARGETS[row.target][1]]))
"""


@pytest.mark.slow
def test_every_kernel_compiles_and_fits_its_target():
    """At the shapes of 3B and 7B for three targets: no spills, and shared memory suffices."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    table = [json.loads(line) for line in done.stdout.splitlines()]
    for target, case, kernel, _, registers, spilled, shared, limit in table:
        assert spilled == 0, (target, case, kernel)
        assert registers <= 256
        assert shared <= limit, (target, case, kernel)
    kernels = {kernel for _, _, kernel, *_ in table}
    assert len(kernels) == 8
    assert all(
        {row[2] for row in table if row[0] == target} == kernels for target in {r[0] for r in table}
    )
    assert {row[0] for row in table} == {"sm_80", "sm_90", "gfx942"}
