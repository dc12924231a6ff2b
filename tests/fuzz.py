"""Thousands of mutated inputs: none may crash, hang, take much memory or end in a foreign error.

    python tests/fuzz.py --cases 2000 --seed 1
    python tests/fuzz.py --only "report" --case 17 --seed 1     one case alone, with its traceback

Targets are collected from tests/helpers/fuzz_*.py. Each of these modules has

    TARGETS: dict[str, Callable[[random.Random, pathlib.Path], Callable[[], object]]]

A target writes a mutated input into an empty folder and returns the call that is tried. The calls
run in child processes, which are forked from one that has everything imported, under a limit of the
address space, of the growth of the resident memory and of time.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402

from nanoglimpse.cli.console import is_out_of_memory  # noqa: E402
from nanoglimpse.errors import NanoglimpseError  # noqa: E402
from nanoglimpse.escape import terminal  # noqa: E402

Target = Callable[[random.Random, Path], Callable[[], object]]
FINE = ("value", "refused")
OUTCOMES = (*FINE, "foreign exception", "over memory", "hang", "crash", "broken target")
MB = 2**20
# Address space that is reserved and never used, as by threads, counts as well.
SPACE = 4


@dataclass(frozen=True)
class Limits:
    """Limits of a case: growth of the resident memory in MB, and seconds."""

    memory: int
    seconds: float


@dataclass
class Worker:
    """A child process that runs cases, one after the other, and what it is doing."""

    process: Any
    pipe: Connection
    folder: Path
    case: tuple[str, int] | None = None
    since: float = 0.0
    done: int = field(default=0)


def collect(files: Sequence[Path]) -> dict[str, Target]:
    """The targets of the modules in these files; the name of a target is the only one."""
    targets: dict[str, Target] = {}
    for file in files:
        if file.is_relative_to(ROOT):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            module = importlib.import_module(name)
        else:
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        double = targets.keys() & module.TARGETS.keys()
        if double:
            raise ValueError(f"{file}: there is another target of the name {min(double)}")
        targets |= module.TARGETS
    return targets


def peak(reset: bool = False) -> int:
    """The largest resident memory in bytes since the last reset (Linux), or ever."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bound_space(limits: Limits) -> None:
    """Bounds the address space of this process, above what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + SPACE * limits.memory * MB
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def attempt(
    target: Target, name: str, number: int, seed: int, folder: Path, limits: Limits
) -> tuple[str, str]:
    """Tries one case in this process; its outcome, and words about it."""
    try:
        call = target(random.Random(f"{seed} {name} {number}"), folder)
    except Exception:
        return "broken target", traceback.format_exc()
    before = peak(reset=True)
    try:
        call()
        outcome, words = "value", ""
    except NanoglimpseError as error:
        outcome, words = "refused", str(error)
    except SystemExit as end:
        clean = end.code in (0, 2)
        outcome, words = ("refused" if clean else "foreign exception"), f"exit {end.code}"
    except Exception as error:
        kind = "over memory" if is_out_of_memory(error) else "foreign exception"
        outcome, words = kind, traceback.format_exc()
    grown = (peak() - before) // MB
    if outcome in FINE and grown > limits.memory:
        return "over memory", f"{grown} MB more of resident memory ({outcome}: {words})"
    return outcome, words


def serve(pipe: Connection, targets: dict[str, Target], seed: int, limits: Limits) -> None:
    """The life of a child: cases come through the pipe, and outcomes go back."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bound_space(limits)
    while (task := pipe.recv()) is not None:
        name, number, folder = task
        os.chdir(folder)
        pipe.send(attempt(targets[name], name, number, seed, folder, limits))


class Pool:
    """Children that run cases; one that fails is replaced, and so is one that has run many."""

    CASES_OF_A_CHILD = 100

    def __init__(self, targets: dict[str, Target], seed: int, limits: Limits, count: int):
        self.targets, self.seed, self.limits = targets, seed, limits
        self.context = multiprocessing.get_context("fork")
        self.root = Path(tempfile.mkdtemp(prefix="fuzz"))
        self.workers = [self._start() for _ in range(count)]

    def _start(self) -> Worker:
        ours, theirs = self.context.Pipe()
        arguments = (theirs, self.targets, self.seed, self.limits)
        process = self.context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours, self.root / str(process.pid))

    def _end(self, worker: Worker) -> None:
        """Ends a child with all that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        shutil.rmtree(worker.folder, ignore_errors=True)

    def give(self, worker: Worker, case: tuple[str, int]) -> None:
        """Lets a child try a case, in an empty folder."""
        shutil.rmtree(worker.folder, ignore_errors=True)
        worker.folder.mkdir()
        worker.case, worker.since = case, time.monotonic()
        with suppress(OSError):  # a child that is dead is found when its result is read
            worker.pipe.send((*case, worker.folder))

    def result(self, worker: Worker) -> tuple[str, str]:
        """What became of the case of a child that is ready, dead, or out of time."""
        outcome, answered = ("hang", f"more than {self.limits.seconds:g} s"), worker.pipe.poll()
        if answered:
            try:
                outcome = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join(10)
                code = worker.process.exitcode or 0
                outcome = "crash", signal.Signals(-code).name if code < 0 else f"exit {code}"
        worker.case, worker.done = None, worker.done + 1
        if outcome[0] not in FINE or worker.done == self.CASES_OF_A_CHILD:
            self._end(worker)
            self.workers[self.workers.index(worker)] = self._start()
        return outcome

    def run(self, cases: Sequence[tuple[str, int]], show: Callable[[str, int, str, str], None]):
        """Tries all cases; `show` gets target, number, outcome and words of each."""
        left = list(reversed(cases))
        while left or any(worker.case for worker in self.workers):
            for worker in self.workers:
                if left and worker.case is None:
                    self.give(worker, left.pop())
            busy = [worker for worker in self.workers if worker.case]
            first = min(worker.since for worker in busy) + self.limits.seconds
            pipes = {worker.pipe: worker for worker in busy}
            ready = wait(list(pipes), max(first - time.monotonic(), 0.0))
            late = time.monotonic() - self.limits.seconds
            for worker in busy:
                if worker.pipe in ready or worker.since <= late:
                    case = worker.case
                    show(*case, *self.result(worker))

    def close(self) -> None:
        """Ends all children and removes their folders."""
        for worker in self.workers:
            self._end(worker)
        shutil.rmtree(self.root, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--cases", type=int, default=500, help="cases, shared by the targets")
    p.add_argument("--seed", type=int, default=0, help="seed of all cases")
    p.add_argument("--only", nargs="+", metavar="TARGET", help="these targets alone")
    p.add_argument("--case", type=int, metavar="N", help="this case of each target alone")
    p.add_argument("--memory", type=int, default=512, metavar="MB", help="growth of a case")
    p.add_argument("--seconds", type=float, default=60, help="time of a case")
    p.add_argument("--workers", type=int, default=2, help="children at a time")
    p.add_argument("--files", type=Path, nargs="+", help="modules in place of fuzz_*.py")
    return p


def table(counts: dict[str, Counter]) -> str:
    """Counts of the outcomes by target."""
    used = [one for one in OUTCOMES if one in FINE or any(own[one] for own in counts.values())]
    rows = [["", *used], *([name, *(str(own[o]) for o in used)] for name, own in counts.items())]
    rows.append(["all", *(str(sum(own[o] for own in counts.values())) for o in used)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries the cases and prints what became of them; 1 if there was a fault."""
    args = parser().parse_args(arguments)
    torch.set_num_threads(1)
    files = args.files or sorted((ROOT / "tests" / "helpers").glob("fuzz_*.py"))
    targets = collect([file.resolve() for file in files])
    if unknown := set(args.only or ()) - set(targets):
        print(f"there is no target {min(unknown)}; there are {', '.join(targets)}")
        return 2
    names = [name for name in targets if not args.only or name in args.only]
    each = range(-(-args.cases // len(names))) if args.case is None else [args.case]
    cases = [(name, number) for number in each for name in names]
    counts: dict[str, Counter] = {name: Counter() for name in names}
    faults = 0

    def show(name: str, number: int, outcome: str, words: str) -> None:
        nonlocal faults
        counts[name][outcome] += 1
        faults += outcome not in FINE
        if outcome not in FINE or args.case is not None:
            last = (
                words.strip() if args.case is not None else (words.strip().splitlines() or [""])[-1]
            )
            again = f"--seed {args.seed} --only {shlex.quote(name)} --case {number}"
            print(
                terminal(
                    f"{outcome}: {again}\n    {last if args.case is not None else last[:300]}"
                ),
                flush=True,
            )

    pool = Pool(targets, args.seed, Limits(args.memory, args.seconds), args.workers)
    try:
        pool.run(cases[: args.cases] if args.case is None else cases, show)
    finally:
        pool.close()
    print(table(counts))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
