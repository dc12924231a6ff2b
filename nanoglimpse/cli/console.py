"""What all commands share: options, errors in one line, exit codes, signals, progress."""

import argparse
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn, TextIO, cast

import torch

from nanoglimpse.cli.kinds import Kind
from nanoglimpse.errors import NanoglimpseError, one_line
from nanoglimpse.escape import masked, terminal

# Seconds between two lines of progress, and between two updates of a line on a terminal.
EVERY, REWRITE = 10.0, 0.1
# Errors of a disk without space, or with a limit that the output reaches.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; every command has `--debug`.

    Args:
        quiet: whether the command has `--quiet`, as those that show progress do.
    """

    def __init__(self, *args: Any, quiet: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        add = adder(self)
        add("--debug", False, "show the traceback of an error")
        if quiet:
            add("--quiet", False, "print no progress and no statistics on stderr")

    def error(self, message: str) -> NoReturn:
        """Prints the line and ends the program with exit code 2."""
        fail(f"{message} (see --help)")
        raise SystemExit(2)


def adder(container: argparse._ActionsContainer) -> Callable[..., None]:
    """A function that adds options to a parser or to a group; arguments as `add_option`."""
    return partial(add_option, container)


def add_option(
    container: argparse._ActionsContainer,
    flag: str,
    default: Any,
    help: str,
    shown: str = "",
    choices: Iterable[str] | None = None,
    kind: Kind | None = None,
    **more: Any,
) -> None:
    """Declares an option in one line.

    Args:
        container: a parser, or a group of its options.
        flag: the option, or the name of a positional argument.
        default: a value: False for a switch, a list or a tuple for several values. Or a kind or a
            type, for an option that is None unless it is given.
        help: what the option does; the default is appended.
        shown: the default in words, where its value is not clear by itself.
        choices: the allowed values.
        kind: what values are accepted; numbers have one. Otherwise the type of the default.
        more: further arguments of `add_argument`.
    """
    if default is False:
        more["action"] = "store_true"
    elif isinstance(default, type | Kind):
        more = {"type": default, "choices": choices, **more}
    else:
        several = isinstance(default, list | tuple)
        values = default if several else [default]
        shown = shown or " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        more = {"nargs": "+"} | more if several else more
        more = {"default": default, "choices": choices, **more}
        more = {"type": kind or type(values[0]), **more}
    container.add_argument(flag, help=f"{help} (default: {shown})" if shown else help, **more)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which commands handle as they handle Ctrl-C."""


class Stopped(Exception):
    """A command was interrupted, and has saved or shown its results so far.

    Args:
        message: one line for the user.
        cause: the interruption.
    """

    def __init__(self, message: str, cause: KeyboardInterrupt):
        super().__init__(message)
        self.exit_code = exit_code(cause)


def exit_code(interruption: KeyboardInterrupt) -> int:
    """130 for Ctrl-C and 143 for SIGTERM, as a shell reports them."""
    return 128 + (signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT)


def run(
    command: Callable[[argparse.Namespace], int],
    parser: Parser,
    arguments: Sequence[str] | None,
    *,
    interrupted: str = "interrupted",
    memory: str = "use smaller pictures (--max-pixels), a smaller model, or --dtype bfloat16",
    report: Callable[[], bool] = lambda: True,
) -> int:
    """Parses the command line and runs a command; every failure becomes one line on stderr.

    Args:
        command: takes the options and returns an exit code.
        parser: parser of the options.
        arguments: the command line; None for that of the process.
        interrupted: the line to print if the command does not handle an interruption itself.
        memory: what to do when memory runs out.
        report: whether this process prints usage errors; one of several processes does.

    Returns:
        The command's exit code; 2 for misuse, 1 for failure, 130 after Ctrl-C, 143 after SIGTERM.
    """
    _open_streams()
    with _guarded(), _terminable(), _settled():
        args = argparse.Namespace(debug=False)
        try:
            args = parser.parse_args(arguments)
            if getattr(args, "offline", False):
                # Read when huggingface_hub is imported, and by `fetch`.
                os.environ["HF_HUB_OFFLINE"] = "1"
            code = command(args)
            sys.stdout.flush()
            return code
        except (NanoglimpseError, Stopped) as error:
            if error.exit_code != 2 or report():
                fail(str(error), args.debug)
            return error.exit_code
        except KeyboardInterrupt as error:
            fail(interrupted, args.debug)
            return exit_code(error)
        except BrokenPipeError:
            return 1  # Nobody reads stdout any more.
        except Exception as error:
            first = str(error).partition("\n")[0]
            if is_out_of_memory(error):
                reason = first.partition(". ")[0] or "allocation failed"
                fail(f"not enough memory ({reason}); {memory}", args.debug)
            elif isinstance(error, OSError) and error.errno in FULL:
                fail(f"the output cannot be written: {error.strerror}", args.debug)
            else:
                fail(f"{type(error).__name__}: {first} (--debug shows where)", args.debug)
            return 1


@contextmanager
def _settled() -> Iterator[None]:
    """Flushes both streams at the end, and gives up those that cannot be written.

    Python flushes them once more when it exits, and would then end with code 120.
    """
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM raise `Terminated`, in the main thread only: others may not set handlers."""

    def terminate(*_: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Guarded:
    """A stream on which what others wrote cannot act; otherwise as the stream itself.

    Attributes:
        stream: where the text goes; `rewrite` uses it as it is.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes the text, with its controls in a form that can be read."""
        return self.stream.write(terminal(text))

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream can do."""
        return getattr(self.stream, name)


@contextmanager
def _guarded() -> Iterator[None]:
    """Guards stdout and stderr."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, Guarded(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _open_streams() -> None:
    """Opens the null device in place of streams that the caller has closed, as `>&-` does."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def fail(message: str, debug: bool = False) -> None:
    """Prints an error in one line, after its traceback if `debug` is set."""
    if debug:
        with suppress(OSError):
            traceback.print_exc()
    say(f"nanoglimpse: error: {one_line(message)}")


def say(text: str) -> None:
    """Prints a line on stderr, if anyone still reads it, without logins and keys of addresses."""
    with suppress(OSError):
        print(terminal(masked(text)), file=sys.stderr, flush=True)


def rewrite(line: str, end: bool = False) -> None:
    """Replaces the last line of stderr on a terminal; it disappears with the next one at an end."""
    stream = getattr(sys.stderr, "stream", sys.stderr)
    with suppress(OSError):
        tail = "\r\033[K" if end else "\033[K"
        print(f"\r{terminal(masked(line))}{tail}", end="", file=stream, flush=True)


def note(args: argparse.Namespace) -> Callable[[str], None]:
    """A function that prints a line on stderr, or drops it with `--quiet`."""
    return (lambda line: None) if args.quiet else say


class Progress:
    """Progress on stderr: one line that is updated on a terminal, a line now and then elsewhere.

    Args:
        label: what is counted.
        quiet: print nothing.
        bytes: whether the counts are bytes.
    """

    def __init__(self, label: str, quiet: bool = False, bytes: bool = False):
        self.label, self.quiet, self.bytes = label, quiet, bytes
        self.shown = 0.0 if sys.stderr.isatty() else time.perf_counter()

    def __call__(self, done: int, total: int, remark: str = "") -> None:
        """Shows that `done` of `total` are done; the line disappears when all are."""
        now, on_terminal = time.perf_counter(), sys.stderr.isatty()
        wait = REWRITE if on_terminal else EVERY
        ends = on_terminal and done >= total
        if self.quiet or (now - self.shown < wait and not ends):
            return
        self.shown = now
        counts = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB" if self.bytes else f"{done} of {total}"
        line = f"{self.label:<11} {counts}{f', {remark}' if remark else ''}"
        if on_terminal:
            rewrite(line, ends)
        else:
            say(line)
