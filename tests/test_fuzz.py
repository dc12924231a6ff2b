"""The harness of tests/fuzz.py, with targets that do what is forbidden, and a run of its own."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux"),
]
BAD = """
import ctypes, os, time
from nanoglimpse.errors import NanoglimpseError, UsageError

kept = []

def write(rng, folder):
    assert list(folder.iterdir()) == []
    (folder / "input").write_text(str(rng.random()))
    return lambda: (folder / "input").read_text()

def refuse(rng, folder):
    def call():
        raise UsageError("no")
    return call

def end(rng, folder):
    def call():
        raise SystemExit(2)
    return call

def foreign(rng, folder):
    wrong = rng.random() < 0.5
    def call():
        if wrong:
            raise KeyError("a\\x1b[2Jb")
    return call

def touch(rng, folder):
    def call():
        bytearray(b"x") * (200 * 2**20)
    return call

def reserve(rng, folder):
    return lambda: bytearray(4 * 2**30)

def leak(rng, folder):
    return lambda: kept.append(bytearray(b"x") * (90 * 2**20))

def sleep(rng, folder):
    def call():
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", os.environ["NAP"])
        time.sleep(100)
    return call

def crash(rng, folder):
    return lambda: ctypes.string_at(8)

def leave(rng, folder):
    return lambda: os._exit(3)

def broken(rng, folder):
    return 1 / 0

TARGETS = {one.__name__: one for one in (write, refuse, end, foreign, touch, reserve)}
TARGETS |= {one.__name__: one for one in (leak, sleep, crash, leave, broken)}
"""
NAP = str(100_000 + os.getpid())  # seconds, which no other process sleeps


def fuzz(folder, *arguments):
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), *map(str, arguments)]
    env = os.environ | {"TMPDIR": str(folder), "NAP": NAP}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


def counted(out):
    """The counts of the table, by target and outcome."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    (head,) = (n for n, row in enumerate(rows) if row[:2] == ["value", "refused"])
    return {
        name: {o: int(n) for o, n in zip(rows[head], numbers, strict=True) if int(n)}
        for name, *numbers in rows[head + 1 :]
    }


def processes():
    """The command lines of all processes."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(line.read_bytes())
    return found


@pytest.fixture
def bad(tmp_path):
    file = tmp_path / "fuzz_bad.py"
    file.write_text(BAD)
    return ["--files", file, "--seconds", 3, "--memory", 128]


def test_every_outcome_is_told_apart(bad, tmp_path):
    done = fuzz(tmp_path, *bad, "--cases", 44, "--seed", 5, "--workers", 2)
    assert done.returncode == 1, done.stderr
    counts = counted(done.stdout)
    wrong = counts["foreign"].pop("foreign exception")
    assert counts["foreign"] == {"value": 4 - wrong}
    assert 0 < wrong < 4
    # The address space is four times the growth: 90 MB that are kept are too much in the end.
    assert counts["leak"].get("over memory", 0) + counts["leak"].get("value", 0) == 4
    assert {
        name: own for name, own in counts.items() if name not in ("foreign", "leak", "all")
    } == {
        "write": {"value": 4},
        "refuse": {"refused": 4},
        "end": {"refused": 4},
        "touch": {"over memory": 4},
        "reserve": {"over memory": 4},
        "sleep": {"hang": 4},
        "crash": {"crash": 4},
        "leave": {"crash": 4},
        "broken": {"broken target": 4},
    }
    assert "\x1b" not in done.stdout
    assert "SIGSEGV" in done.stdout
    # Nothing is left: no folder, and nothing that a child has started.
    assert [path.name for path in tmp_path.iterdir()] == ["fuzz_bad.py"]
    assert not [line for line in processes() if NAP.encode() in line]


def test_what_a_target_keeps_is_too_much_in_the_end(bad, tmp_path):
    done = fuzz(tmp_path, *bad, "--cases", 40, "--only", "leak", "--workers", 1)
    assert done.returncode == 1
    assert counted(done.stdout)["leak"]["over memory"] > 0


def test_a_fault_can_be_run_alone(bad, tmp_path):
    first = fuzz(tmp_path, *bad, "--cases", 8, "--seed", 5, "--only", "foreign", "write")
    again = re.search(r"foreign exception: (--seed 5 --only foreign --case \d+)", first.stdout)[1]
    alone = fuzz(tmp_path, *bad, *again.split())
    assert alone.returncode == 1
    assert counted(alone.stdout)["foreign"] == {"foreign exception": 1}
    assert "Traceback" in alone.stdout
    assert "KeyError" in alone.stdout


def test_misuse_is_told(bad, tmp_path):
    done = fuzz(tmp_path, *bad, "--only", "none")
    assert (done.returncode, done.stderr) == (2, "")
    assert "there is no target none" in done.stdout


def test_no_fault_in_some_hundred_cases(tmp_path):
    done = fuzz(tmp_path, "--cases", 400, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
