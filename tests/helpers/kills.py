"""Kills a process at each of its file operations in turn, by replacing `os` inside `files`."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from nanoglimpse import files

OPERATIONS = {"open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "makedirs"}
OPERATIONS |= {"ftruncate", "chmod", "close"}
KILLED = 99


class Killing:
    """The module `os`, which ends the process instead of its operation number `at`, from 0.

    A write that is killed has written half of its data.
    """

    def __init__(self, at: int):
        self.at, self.done = at, 0

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def operation(*arguments, **options):
            if self.done == self.at:
                if name == "write":
                    os.write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os._exit(KILLED)
            self.done += 1
            return real(*arguments, **options)

        return operation


def in_child(call: Callable[[], int], at: int | None = None) -> int:
    """The exit code of `call` in a forked process, which is killed at operation `at`."""
    child = os.fork()
    if not child:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            sys.stdout = os.fdopen(1, "w")
            if at is not None:
                files.os = Killing(at)
            code = call()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_everywhere(
    call: Callable[[Path], int], begin: Callable[[Path], None], folder: Path
) -> Iterator[tuple[int, Path]]:
    """Yields a folder for each operation of `call`, which was killed there.

    Args:
        call: the work in a folder; returns an exit code.
        begin: prepares the folder.
        folder: where the folders are made.
    """
    for at in count():
        work = folder / str(at)
        work.mkdir()
        begin(work)
        code = in_child(lambda work=work: call(work), at)
        if code == 0:
            assert at > 5, "hardly anything was written through `files`"
            return
        assert code == KILLED, f"operation {at}: exit code {code}"
        yield at, work
