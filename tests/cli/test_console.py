"""What all commands share: one line an error, exit codes, signals, streams that are closed."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from nanoglimpse.__main__ import COMMANDS, main
from nanoglimpse.cli import console
from nanoglimpse.cli.console import Parser, Progress, run
from nanoglimpse.errors import NanoglimpseError, UsageError, one_line
from tests.helpers.prompts import ANSWER

SLOW = """
import sys, time
from nanoglimpse.cli import console

def command(args):
    print("begun", flush=True)
    time.sleep(30)

sys.exit(console.run(command, console.Parser(), []))
"""


def of_command(command, capsys, arguments=(), **options):
    return run(command, Parser(), list(arguments), **options), capsys.readouterr().err


def raising(error):
    def command(args):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("a wrong\npath"), 2, "a wrong path"),
        (NanoglimpseError("it failed"), 1, "it failed"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (console.Terminated(), 143, "interrupted"),
        (console.Stopped("1 of 2 done", console.Terminated()), 143, "1 of 2 done"),
        (console.Stopped("1 of 2 done", KeyboardInterrupt()), 130, "1 of 2 done"),
        (ZeroDivisionError("by\nzero"), 1, "ZeroDivisionError: by (--debug shows where)"),
        (MemoryError(), 1, "not enough memory (allocation failed); use smaller pictures"),
    ],
)
def test_every_failure_is_one_line_and_an_exit_code(error, code, line, capsys):
    found, err = of_command(raising(error), capsys)
    assert found == code
    assert err.startswith(f"nanoglimpse: error: {line}")
    assert err.count("\n") == 1
    found, err = of_command(raising(error), capsys, ["--debug"])
    assert (found, "Traceback" in err) == (code, True)


def test_of_several_processes_one_reports_misuse(capsys):
    silent = {"report": lambda: False}
    assert of_command(raising(UsageError("wrong")), capsys, **silent) == (2, "")
    assert of_command(raising(NanoglimpseError("failed")), capsys, **silent)[1] != ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_signals_end_a_command_in_one_line(number, code):
    unset = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-c", unset + SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b"")
    assert err == b"nanoglimpse: error: interrupted\n"


def test_the_handler_of_sigterm_is_put_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    inside = []
    of_command(lambda args: inside.append(signal.getsignal(signal.SIGTERM)) or 0, capsys)
    assert signal.getsignal(signal.SIGTERM) is before
    assert inside != [before]


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams_are_no_error(closed, tmp_path):
    command = f"{sys.executable} -m nanoglimpse.generate --quiet {closed}; echo $?"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert (ANSWER in done.stdout) == (">&-" not in closed.split())
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_reader_of_everything_that_leaves_is_no_error(tmp_path):
    """Both streams end in a pipe that nobody reads any more."""
    command = f"{sys.executable} -m nanoglimpse.generate 2>&1 | head -c 3; echo; ls"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    time.sleep(0.2)
    assert done.stdout.split() == ["pic"]
    assert done.stderr == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_rewritten_on_a_terminal_and_rare_elsewhere(monkeypatch, terminal):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress("weights", bytes=True)
    progress(10**9, 2 * 10**9)
    progress(2 * 10**9, 2 * 10**9)
    assert ("\rweights     1.00 of 2.00 GB\033[K" in screen.getvalue()) == terminal
    assert "\n" not in screen.getvalue()
    assert screen.getvalue().endswith("\r\033[K") == terminal
    monkeypatch.setattr(console, "EVERY", 0.0)
    Progress("questions")(1, 3, "1 failed")
    assert ("questions   1 of 3, 1 failed\n" in screen.getvalue()) == (not terminal)
    said = screen.getvalue()
    Progress("questions", quiet=True)(1, 3)
    assert screen.getvalue() == said


@pytest.mark.slow
def test_the_command_lists_its_commands(capsys):
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert main(["generat"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--version"]) == 0
    assert main(["generate", "--quiet"]) == 0
    assert capsys.readouterr().out.endswith(ANSWER + "\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: nanoglimpse {name}" in capsys.readouterr().out


def test_commands_end_in_a_thread_as_well(capsys):
    """Where no handler of signals may be set."""
    import threading

    codes = []
    thread = threading.Thread(target=lambda: codes.append(of_command(lambda args: 0, capsys)[0]))
    thread.start()
    thread.join()
    assert codes == [0]
    assert os.getpid()


def test_an_error_is_one_printable_line_of_a_sensible_length(capsys):
    """Names, answers of servers and data URIs end in messages."""
    hostile = (
        "there is \x1b[31mno\x07 picture\r\n\u202e\u2028" + 50_000 * "A" + "; give a shorter one"
    )
    code, err = of_command(raising(UsageError(hostile)), capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert len(err) < 450
    assert err.rstrip("\n").isprintable()
    assert err.startswith("nanoglimpse: error: there is \ufffd[31mno\ufffd picture \ufffd")
    assert err.endswith("A; give a shorter one\n")
    with pytest.raises(SystemExit):
        Parser().parse_args(["--\x1b[2J" + 9000 * "x"])
    err = capsys.readouterr().err
    assert len(err) < 450
    assert err.rstrip("\n").isprintable()


@pytest.mark.parametrize("length", [0, 399, 400, 401, 1000])
def test_only_a_long_line_is_cut(length):
    text = ("word 数字 é " * 200)[:length].strip()
    line = one_line(text, 400)
    assert line == text if len(text) <= 400 else len(line) == 400
    assert line[:100] == text[:100]
    assert line[-100:] == text[-100:]
