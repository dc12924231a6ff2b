"""Writing: files and folders that appear whole or not at all, logs, and locks.

Everything that the package writes goes through this module. A file is written beside its target,
flushed to the disk and renamed, so that whoever is killed leaves the old content or the new. What
is no regular file (a device, a pipe, a standard stream) is written in place, and a symbolic link
keeps pointing to the file that is replaced.
"""

import ctypes
import errno
import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nanoglimpse.errors import NanoglimpseError, UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

WINDOWS = os.name == "nt"
# Windows refuses to read a byte that is locked, so the lock covers one behind the holder's name.
LOCKED_BYTE = 1 << 30
NO_LINK, BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS; AT_FDCWD


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` to `path` by renaming a finished file; makes the folder where it is missing.

    Raises:
        NanoglimpseError: it cannot be written; what was there before is still there.
    """
    with _reported(path):
        if is_stream(path):
            _write_stream(path, data)
        else:
            _replace(_target(path), data)


def write_whole_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Writes several files as one folder, which appears, or replaces an earlier one, by renaming.

    The files are written to `.NAME.partial` beside the folder. That name and the folder's are then
    exchanged in one step, and the earlier folder is removed. Where the system has no such step,
    `.NAME.partial` is first renamed to `.NAME.new`, which says that it is complete; the folder is
    moved to `.NAME.old` and the new one into its place. Whoever is killed between these two
    leaves both complete, and the next call finishes the work.

    Args:
        path: the folder. Files of an earlier one that are not named in `contents` are kept.
        contents: the content of each file, by name.

    Raises:
        NanoglimpseError: it cannot be written, in which case an earlier folder is still there; or
            another process is writing it.
    """
    folder = _target(path)
    partial, new, old = (_beside(folder, kind) for kind in ("partial", "new", "old"))
    with _reported(path):
        os.makedirs(folder.parent, exist_ok=True)
    with locked(folder), _reported(path):
        if os.path.isdir(new):
            _put(new, folder, old)
        _remove(partial)
        os.mkdir(partial)
        try:
            if os.path.isdir(folder):
                _copy_others(folder, partial, contents)
            for name, data in contents.items():
                _create(partial / name, data)
            _sync_folder(partial)
        except BaseException:
            _remove(partial)
            raise
        if not os.path.isdir(folder) or not _exchange(partial, folder):
            os.rename(partial, new)
            _put(new, folder, old)
        _sync_folder(folder.parent)
        _remove(partial)
        _remove(old)


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of a file, which is created with its folder where it is missing.

    When this returns, the data are on the disk. After a failure nothing of them is in the file.

    Raises:
        NanoglimpseError: it cannot be written.
    """
    with _reported(path):
        if is_stream(path):
            _write_stream(path, data)
            return
        os.makedirs(Path(path).parent, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | BINARY, 0o666)
        try:
            before = os.fstat(file).st_size
            try:
                _write(file, data)
                os.fsync(file)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file or folder, so that no other process writes to it meanwhile.

    The lock is a file `.NAME.lock` beside it. A process that is killed releases it. A file system
    without locks has none, and a stream needs none.

    Raises:
        NanoglimpseError: another process holds it, which is named; or the lock cannot be written.
    """
    if is_stream(path):
        yield
        return
    with _reported(path):
        lock = _beside(_target(path), "lock")
        os.makedirs(lock.parent, exist_ok=True)
        file = _claim(lock)
        if file is None:
            raise NanoglimpseError(
                f"{path} is being written by {_holder(lock)}; wait until it ends"
            )
    try:
        with suppress(OSError):  # A full disk holds no name, but locks all the same.
            os.ftruncate(file, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            _write(file, f"process {os.getpid()} on {platform.node()} since {since}".encode())
        yield
    finally:
        if WINDOWS:
            os.close(file)
        with suppress(OSError):
            os.unlink(lock)
        if not WINDOWS:
            os.close(file)


def is_stream(path: Path) -> bool:
    """Whether a path names a device, a pipe, a socket or a standard stream, written in place."""
    try:
        mode = os.stat(path).st_mode
        parent = os.path.realpath(Path(path).parent)
    except (OSError, ValueError):
        return False
    # /dev/stdout and /dev/fd/1 may lead to a regular file, whose other writers would lose it.
    in_place = parent == "/dev" or parent.startswith("/proc/")
    return in_place or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_writable(path: Path, what: str, inputs: Iterable[str | Path] = ()) -> None:
    """Refuses a path where no file can be written; `what` it would be stands in the message.

    Args:
        path: the file to be written.
        what: what it would be.
        inputs: files that the command reads, which it must not overwrite.

    Raises:
        UsageError: it is a folder or an input, there is no folder to write in, that is read-only,
            or the name is impossible.
    """
    try:
        parent = _target(path).parent
        with suppress(FileNotFoundError):
            os.stat(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"the {what} cannot be written: {path}: {_reason(error)}") from None
    if path.is_dir():
        raise UsageError(f"the {what} cannot be written: {path} is a folder")
    if not parent.is_dir():
        raise UsageError(f"the {what} cannot be written: there is no folder {path.parent}")
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise UsageError(f"the {what} cannot be written: {path} is read-only")
    elif not os.access(parent, os.W_OK):
        raise UsageError(f"the {what} cannot be written: {parent} is read-only")
    refuse_inputs(path, what, inputs)


def refuse_inputs(path: Path, what: str, inputs: Iterable[str | Path]) -> None:
    """Refuses to write a file that the command also reads; arguments as `check_writable`.

    Raises:
        UsageError: it is one of them.
    """
    for other in inputs:
        if not is_stream(path) and _is_same(path, other):
            raise UsageError(
                f"the {what} would overwrite {other}, which the command reads; name another file"
            )


def _is_same(one: Path, other: str | Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise NanoglimpseError(f"{path} cannot be written: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _target(path: Path) -> Path:
    """The absolute path of the file that a path leads to."""
    return Path(os.path.realpath(path))


def _beside(path: Path, kind: str) -> Path:
    """A hidden neighbour of a path; the name is cut, since a long one would get too long."""
    return path.with_name(f".{path.name[:60]}.{kind}")


def _replace(target: Path, data: bytes) -> None:
    os.makedirs(target.parent, exist_ok=True)
    file, partial = _partial(target)
    open_ = True
    try:
        os.ftruncate(file, 0)
        _write(file, data)
        os.fsync(file)
        with suppress(FileNotFoundError):
            os.chmod(partial, stat.S_IMODE(os.stat(target).st_mode))
        if WINDOWS:  # which renames no open file
            os.close(file)
            open_ = False
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    finally:
        if open_:
            os.close(file)
    _sync_folder(target.parent)


def _partial(target: Path) -> tuple[int, Path]:
    """A file beside the target that only this call writes to, and its path.

    What a killed process has left there is used again, and so does not gather.
    """
    number = 0
    while True:
        partial = _beside(target, f"{number}.partial" if number else "partial")
        file = _claim(partial)
        if file is not None:
            return file, partial
        number += 1


def _claim(path: Path) -> int | None:
    """Opens a file, created where it is missing, and locks it; None if that is already locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK | BINARY, 0o666)
        if not _lock(file):
            os.close(file)
            return None
        with suppress(FileNotFoundError):
            # Whoever held it until now may have renamed or removed it.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


if sys.platform == "win32":

    def _lock(file: int) -> bool:
        os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(file, 0, os.SEEK_SET)
        return True

else:

    def _lock(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Any other error is that of a file system without locks.
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True


def _holder(lock: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return lock.read_bytes().decode() or "another process"
    return "another process"


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _write_stream(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | BINARY)
    try:
        _write(file, data)
    finally:
        os.close(file)


def _create(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
    try:
        _write(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system lets one ask for it."""
    if not WINDOWS:
        with suppress(OSError):
            file = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def _copy_others(folder: Path, target: Path, contents: Mapping[str, bytes]) -> None:
    """Copies what a folder holds beside the files of `contents`."""

    def ours(where: str, names: list[str]) -> set[str]:
        return set(contents) & set(names) if Path(where) == folder else set()

    shutil.copytree(folder, target, symlinks=True, ignore=ours, dirs_exist_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        names = [os.fsencode(path) for path in (one, other)]
        if sys.platform == "darwin":
            return library.renamex_np(*names, EXCHANGE) == 0
        return library.renameat2(HERE, names[0], HERE, names[1], EXCHANGE) == 0
    except (AttributeError, OSError, TypeError):
        return False


def _put(new: Path, folder: Path, old: Path) -> None:
    """Moves a complete folder to its place."""
    if os.path.isdir(folder):
        _remove(old)
        os.rename(folder, old)
    os.rename(new, folder)


def _remove(folder: Path) -> None:
    """Removes a folder with its content; there may be none."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        inner = folder / name
        if inner.is_dir() and not inner.is_symlink():
            _remove(inner)
        else:
            os.unlink(inner)
    os.rmdir(folder)
