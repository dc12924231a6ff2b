"""Runs tests for some seconds, and says how many passed: a step of first contact.

python -m nanoglimpse.benchmark.kernel_tests 60 tests/kernels/test_triton_ops.py
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from nanoglimpse.benchmark.output import Output


class Tally:
    """A plugin of pytest that counts outcomes, names failures at once, and stops in time.

    Args:
        out: where failures go.
        seconds: no test begins after so many.
        clock: seconds.
    """

    def __init__(self, out: Output, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.out, self.clock, self.until = out, clock, clock() + seconds
        self.outcomes: Counter[str] = Counter()
        self.session: Any = None
        self.found = 0

    def pytest_collection_finish(self, session: Any) -> None:
        """Counts the tests."""
        self.session, self.found = session, len(session.items)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be read fails as a test does."""
        if report.failed:
            self._fail(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Takes the outcome of a test, or of what came before or after it."""
        if report.failed:
            self._fail(report)
        elif report.when == "call" or report.skipped:
            self.outcomes[report.outcome] += 1

    def pytest_runtest_logfinish(self) -> None:
        """Ends the run after a test if the next one would begin too late."""
        if self.clock() > self.until:
            self.session.shouldstop = "no time left"

    def _fail(self, report: Any) -> None:
        self.outcomes["failed"] += 1
        reason = str(report.longrepr).rstrip().rpartition("\n")[2]
        self.out.note(f"failed: {report.nodeid}: {reason[:200]}")


def main(arguments: Sequence[str]) -> int:
    """Takes the seconds and the files; returns 1 if a test failed."""
    out = Output("json")
    if find_spec("pytest") is None:
        out.note("pytest is not installed, so that no test runs; pip install pytest")
        return 0
    import pytest

    seconds, *files = arguments
    tally = Tally(out, float(seconds))
    # Only JSON goes to stdout; options of the configuration are those of pytest's own report.
    quiet = ["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider"]
    code = pytest.main([*quiet, *files], plugins=[tally])
    counts = [tally.outcomes[outcome] for outcome in ("passed", "failed", "skipped")]
    columns = ["passed", "failed", "skipped", "no time left"]
    out.table("tests", columns, [[*counts, max(tally.found - sum(counts), 0)]])
    if tally.outcomes["failed"] or not tally.found:
        words = f"pytest ends with exit code {int(code)}"
        print(f"{tally.outcomes['failed']} of {tally.found} tests failed; {words}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
