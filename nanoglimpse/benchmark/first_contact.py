"""First contact with a GPU: what has to be known about it, within a few minutes.

Each step is a command of its own, because a fault of a kernel ends all work of its process on the
GPU. Steps have a budget each. One that has no time left is skipped, one that fails or takes too
long ends in a line, and in every case the next one begins; a table is written when it is known.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nanoglimpse.benchmark import ROOT
from nanoglimpse.benchmark.machine import machine
from nanoglimpse.benchmark.measuring import say
from nanoglimpse.benchmark.output import Output
from nanoglimpse.benchmark.rules import CAPTURED, write
from nanoglimpse.errors import UsageError
from nanoglimpse.model.device import find_device

# Seconds of all steps by default.
SECONDS = 300.0
# The share of a step's time after which it begins no further round or test.
ROUNDS = 0.6
TESTS = ("tests/kernels/test_triton_ops.py", "tests/inference/test_cuda_graph.py")


class StepEnded(Exception):
    """A step ended before it was done.

    Args:
        result: one line.
        failed: whether it is to blame, rather than the time.
    """

    def __init__(self, result: str, failed: bool):
        super().__init__(result)
        self.failed = failed


@dataclass(frozen=True)
class Step:
    """A command that is run in a process of its own.

    Attributes:
        name: of the step.
        options: of bench.py; empty for the tests.
        budget: seconds after which it is stopped.
        least: seconds without which it is not begun, more than 0.
    """

    name: str
    options: tuple[str, ...]
    budget: float
    least: float


@dataclass
class Results:
    """What the steps have found.

    Attributes:
        rows: step, result and seconds.
        rules: the records of the rules.
        steps: by step, the JSON object of its command.
    """

    rows: list[list[str | float]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[str, Any] = field(default_factory=dict)
    failed: bool = False


# Yields the lines that a step writes, for at most so many seconds; raises StepEnded.
Start = Callable[[Step, float], Iterator[str]]


def first_contact(args: argparse.Namespace, out: Output) -> int:
    """Runs all steps; returns the exit code, 1 if one of them failed.

    Raises:
        UsageError: there is no GPU, and the options do not ask for a rehearsal on a CPU.
    """
    device = find_device(args.device)
    if device.type != "cuda" and args.device == "auto":
        raise UsageError(
            "first contact needs a GPU, and there is none; "
            "rehearse it with --device cpu --shape nano"
        )
    seconds = args.seconds or SECONDS
    big, small = (args.shape, args.shape) if args.shape else ("7b", "3b")
    if device.type == "cpu" and not args.shape:
        big = small = "nano"
    record = machine(args, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    out.note("  ".join(f"{key} {value}" for key, value in record.items()))
    plan = steps(device, big, small)

    def start(step: Step, limit: float) -> Iterator[str]:
        return child(command(step, limit), device, limit)

    results = run_steps(plan, seconds, out, start)
    out.table("steps", ["step", "result", "seconds"], results.rows)
    if results.rules:
        write(results.rules, out)
    found = {"steps": results.steps, "rules": results.rules, "results": results.rows}
    out.end({"machine": record, "first_contact": found})
    return 1 if results.failed else 0


def steps(device: torch.device, big: str, small: str) -> list[Step]:
    """The steps in their order.

    Args:
        device: a GPU, or a CPU for a rehearsal at small sizes.
        big, small: shapes in the places of 7B and 3B.
    """
    rehearsal = device.type == "cpu"
    common = ["--device", str(device), "--alone", "--rounds", "1" if rehearsal else "7"]
    if rehearsal:
        common += ["--dtype", "float32", "--visual-tokens", "4", "--text", "4", "--new", "2"]
    else:
        common += ["--visual-tokens", "1024"]
    full = ("--shape", small, *common)
    few = ("--layers", "1" if rehearsal else "4")
    large, little = ("--shape", big, *common, *few), (*full, *few)
    rows = ("--visual-tokens", "9", "4") if rehearsal else ("--visual-tokens", "1024", "5000")
    # Each prefill takes a second in the interpreter, so that only the dense ones run there.
    methods = ("--retain", "1") if rehearsal else ()
    plan = [
        Step("kernel and graph tests", (), 75, 15),
        Step(f"{big} widths, torch", (*large, "--backend", "torch"), 30, 10),
        Step(f"{big} widths, triton", (*large, *methods, "--backend", "triton"), 60, 10),
        Step(f"{big} widths, auto", (*large, "--backend", "auto"), 40, 10),
        Step(f"{small}, full depth", full, 50, 15),
        Step(f"{big} widths, kernels", (*large, "--kernels", "--backend", "triton"), 40, 8),
        Step("rule: long attention", (*large, *rows, "--rule", "long_attention"), 30, 8),
        Step(f"rule: few rows, {small}", (*little, "--rule", "few_rows"), 30, 8),
        Step(f"rule: few rows, {big}", (*large, "--rule", "few_rows"), 30, 8),
        Step("rule: pruning", (*large, "--rule", "pruning"), 30, 8),
        Step("rule: captured decoding", (*full, "--rule", CAPTURED), 40, 10),
        Step("rule: elementwise", (*large, "--rule", "elementwise"), 30, 8),
    ]
    # A rehearsal builds next to nothing; this is what a loaded CPU takes to begin.
    return [replace(step, least=10) for step in plan] if rehearsal else plan


def run_steps(
    plan: Sequence[Step],
    seconds: float,
    out: Output,
    start: Start,
    clock: Callable[[], float] = time.monotonic,
) -> Results:
    """Runs steps one after the other, each as far as its time goes.

    A step leaves the later ones the least that they need, if it has what it needs itself.

    Args:
        plan: the steps in their order.
        seconds: of all of them.
        out: where tables go as they come.
        start: begins a step.
        clock: seconds.
    """
    results, deadline = Results(), clock() + seconds
    for number, step in enumerate(plan):
        begun = clock()
        left, later = deadline - begun, sum(after.least for after in plan[number + 1 :])
        if left < step.least:
            result = "skipped: no time left"
        else:
            say(step.name)
            result = "done"
            try:
                for line in start(step, max(min(step.budget, left - later), step.least)):
                    _take(step, line, results, out)
            except StepEnded as end:
                result = str(end)
                results.failed |= end.failed
        results.rows.append([step.name, result, clock() - begun])
        if result != "done":
            out.note(f"{step.name}: {result}")
    return results


def _take(step: Step, line: str, results: Results, out: Output) -> None:
    """Passes on what a step writes: tables and lines; what else is an object is its summary."""
    try:
        found = json.loads(line)
    except ValueError:
        return  # What a library prints.
    if not isinstance(found, dict):
        return
    if "table" in found:
        out.table(f"{step.name}: {found['table']}", found["columns"], found["rows"])
    elif "note" in found:
        out.note(f"{step.name}: {found['note']}")
    else:
        results.rules += found.pop("rules", [])
        results.steps[step.name] = found


def command(step: Step, limit: float) -> list[str]:
    """The command line of a step that has so many seconds."""
    seconds = f"{ROUNDS * limit:.1f}"
    if not step.options:
        return [sys.executable, "-m", "nanoglimpse.benchmark.kernel_tests", seconds, *TESTS]
    bench = [sys.executable, str(ROOT / "bench.py"), "-o", "json"]
    return [*bench, "--seconds", seconds, *step.options]


def child(command: Sequence[str], device: torch.device, limit: float) -> Iterator[str]:
    """The lines that a command writes to stdout.

    Raises:
        StepEnded: it failed, crashed, or took longer than `limit` seconds.
    """
    environment = dict(os.environ)
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "start_new_session": True}
        options |= {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "errors": "replace"}
        with subprocess.Popen(command, **options) as process:
            timer = threading.Timer(limit, _stop, (process, late))
            timer.start()
            try:
                assert process.stdout is not None
                yield from process.stdout
                code = process.wait()
            finally:
                timer.cancel()
                _kill(process)
        errors.seek(0)
        lines = errors.read().split("\n")
    if late.is_set():
        raise StepEnded(f"stopped after {limit:.0f} s", failed=False)
    if code:
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise StepEnded(f"failed: {' '.join(f'{how}: {last}'.split())[:300]}", failed=True)


def _stop(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a process with all that it has started."""
    with suppress(OSError):  # It has ended.
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
