"""Files, folders, logs and locks: whole or not at all, whenever a process is killed."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanoglimpse import NanoglimpseError, UsageError, files
from nanoglimpse.files import (
    append,
    check_writable,
    is_stream,
    locked,
    write_whole,
    write_whole_folder,
)
from nanoglimpse.jsonl import Journal, read_rows
from tests.helpers.devices import device
from tests.helpers.kills import in_child, killed_everywhere

OLD, NEW = b"old" * 1000, b"new" * 2000


def visible(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".")}


@pytest.mark.slow
@pytest.mark.parametrize("old", [None, OLD], ids=["absent", "present"])
def test_a_killed_write_leaves_the_old_file_or_the_new(tmp_path, old):
    def begin(folder):
        if old:
            (folder / "a").write_bytes(old)

    def call(folder):
        write_whole(folder / "a", NEW)
        return 0

    found = set()
    for _, folder in killed_everywhere(call, begin, tmp_path):
        content = (folder / "a").read_bytes() if (folder / "a").exists() else None
        assert content in (old, NEW)
        found.add(content)
        assert in_child(lambda folder=folder: call(folder)) == 0
        assert [f.name for f in folder.iterdir()] == ["a"]
        assert (folder / "a").read_bytes() == NEW
    assert found == {old, NEW}


FIRST, SECOND = {"a": OLD, "b": OLD}, {"a": NEW, "b": NEW, "c": NEW}


@pytest.mark.slow
@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("old", [None, FIRST], ids=["absent", "present"])
def test_a_killed_folder_is_the_old_or_the_new(tmp_path, monkeypatch, old, exchanges):
    def begin(folder):
        if old:
            write_whole_folder(folder / "x", old)

    def call(folder):
        write_whole_folder(folder / "x", SECOND)
        return 0

    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    found = []
    for _, folder in killed_everywhere(call, begin, tmp_path):
        content = visible(folder / "x") if (folder / "x").exists() else None
        if content is None and old:
            assert not exchanges
            # Between two renames; both are complete beside it.
            assert visible(folder / ".x.old") == old
            assert visible(folder / ".x.new") == SECOND
        else:
            assert content in (old, SECOND)
        found.append(content)
        assert in_child(lambda folder=folder: call(folder)) == 0
        assert [f.name for f in folder.iterdir()] == ["x"]
        assert visible(folder / "x") == SECOND
    assert old in found
    assert SECOND in found


@pytest.mark.parametrize("exchanges", [True, False])
def test_other_files_of_a_folder_are_kept(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    write_whole_folder(tmp_path / "x", FIRST)
    (tmp_path / "x" / "notes").mkdir()
    (tmp_path / "x" / "notes" / "a").write_bytes(b"mine")
    (tmp_path / "x" / "d").symlink_to("a")
    write_whole_folder(tmp_path / "x", SECOND)
    assert (tmp_path / "x" / "notes" / "a").read_bytes() == b"mine"
    assert (tmp_path / "x" / "d").is_symlink()
    assert (tmp_path / "x" / "d").read_bytes() == NEW
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


@pytest.mark.slow
def test_a_killed_log_loses_its_last_record_only(tmp_path):
    def begin(folder):
        Journal(folder / "log").write([{"n": 0}])

    def call(folder):
        journal = Journal(folder / "log")
        journal.mend()
        for n in range(len(journal.read()), 4):
            journal.append([{"n": n}])
        return 0

    torn = 0
    for _, folder in killed_everywhere(call, begin, tmp_path):
        rows = [row["n"] for _, row in Journal(folder / "log").read()]
        assert rows == list(range(len(rows)))
        torn += not (folder / "log").read_bytes().endswith(b"\n")
        assert call(folder) == 0
        text = (folder / "log").read_text()
        assert text == "".join(f'{{"n": {n}}}\n' for n in range(4))
    assert torn == 3


@pytest.mark.parametrize(
    "damage",
    [b'{"n": 1', b"\n\n", b"\0\0\0\0", b"\0\0\n", b'\0\0\0{"n": 1}\n', b" \r\n", b"\xff\xfe"],
    ids=["half", "empty", "zeros", "zeros and a line", "a record after zeros", "blank", "no UTF-8"],
)
def test_a_log_is_mended(tmp_path, damage):
    path = tmp_path / "log"
    path.write_bytes(b'{"n": 0}\n' + damage)
    journal = Journal(path)
    before = journal.read()
    journal.mend()
    journal.append([{"n": 2}])
    assert journal.read()[: len(before)] == [(n + 1, row) for n, (_, row) in enumerate(before)]
    whole = [0, 1, 2] if b'{"n": 1}' in damage else [0, 2]
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == whole


def test_a_failed_append_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "log"
    append(path, b"whole\n")
    write = os.write

    def full(file, data):
        if len(data) > 3:
            return write(file, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(NanoglimpseError, match="log cannot be written: No space left on device"):
        append(path, b"another\n")
    assert path.read_bytes() == b"whole\n"
    with pytest.raises(NanoglimpseError, match="No space left"):
        write_whole(path, b"another\n")
    assert visible(tmp_path) == {"log": b"whole\n"}
    with pytest.raises(NanoglimpseError, match="No space left"):
        write_whole_folder(tmp_path / "x", {"a": b"another\n"})
    assert [f.name for f in tmp_path.iterdir()] == ["log"]


HOLD = """
import sys
from pathlib import Path
from nanoglimpse.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_the_second_process_says_who_holds_a_file(tmp_path):
    path = tmp_path / "results.jsonl"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert first.stdout.readline() == b"held\n"
    said = rf"results.jsonl is being written by process {first.pid} on \S+ since 20\d\d-\d\d-\d\d"
    with pytest.raises(NanoglimpseError, match=said), locked(path):
        raise AssertionError
    first.kill()
    first.communicate()
    with locked(path):
        assert (tmp_path / ".results.jsonl.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_threads_do_not_share_a_lock(tmp_path):
    said = []

    def work():
        try:
            with locked(tmp_path / "a"):
                said.append("held")
        except NanoglimpseError as error:
            said.append(str(error))

    with locked(tmp_path / "a"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert f"a is being written by process {os.getpid()} on " in said[0]
    assert said[1:] == ["held"]


WRITE = """
import os, sys
from pathlib import Path
from nanoglimpse.files import write_whole_folder
os.mkdir(sys.argv[1] + "/begun")
write_whole_folder(Path(sys.argv[1]) / "x", {"a": b"new", "b": b"new"})
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize(
    ("call", "number"), [("fsync", 1), ("fsync", 3), ("renameat2", 1), ("rename", 1), ("rmdir", 1)]
)
def test_a_folder_survives_a_kill_inside_the_system(tmp_path, call, number):
    write_whole_folder(tmp_path / "x", {"a": b"old", "b": b"old"})
    inject = f"inject={call}:signal=SIGKILL:when={number}"
    command = ["strace", "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", inject]
    command += [sys.executable, "-c", WRITE, str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if "ptrace" in done.stderr.lower():
        pytest.skip("ptrace is not allowed")
    assert visible(tmp_path / "x") in (dict.fromkeys("ab", text) for text in (b"old", b"new"))
    assert (tmp_path / "begun").exists()
    write_whole_folder(tmp_path / "x", {"a": b"last", "b": b"last"})
    assert visible(tmp_path / "x") == {"a": b"last", "b": b"last"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["begun", "x"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    contents = [bytes([65 + n]) * 300_000 for n in range(4)]

    def work(content):
        for _ in range(10):
            write_whole(tmp_path / "a", content)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert visible(tmp_path) == {"a": (tmp_path / "a").read_bytes()}
    assert (tmp_path / "a").read_bytes() in contents
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_keeps_pointing_to_what_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_bytes(OLD)
    (tmp_path / "link").symlink_to("there/file")
    (tmp_path / "folder").symlink_to("there/x")
    (tmp_path / "dangling").symlink_to("there/none")
    write_whole(tmp_path / "link", NEW)
    write_whole(tmp_path / "dangling", NEW)
    write_whole_folder(tmp_path / "folder", FIRST)
    append(tmp_path / "link", b"more")
    assert all((tmp_path / name).is_symlink() for name in ("link", "folder", "dangling"))
    assert (tmp_path / "there" / "file").read_bytes() == NEW + b"more"
    assert (tmp_path / "there" / "none").read_bytes() == NEW
    assert visible(tmp_path / "there" / "x") == FIRST


def test_permissions_are_kept(tmp_path):
    write_whole(tmp_path / "a", OLD)
    os.chmod(tmp_path / "a", 0o600)
    write_whole(tmp_path / "a", NEW)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_devices_and_pipes_are_written_in_place(tmp_path, tmp_path_factory):
    null, full = (device(name, tmp_path_factory.mktemp("devices")) for name in ("null", "full"))
    before = os.stat(null)
    with locked(null):
        write_whole(null, NEW)
        append(null, NEW)
    assert stat.S_ISCHR(os.stat(null).st_mode)
    assert os.stat(null).st_ino == before.st_ino
    with pytest.raises(NanoglimpseError, match="full cannot be written: No space left"):
        write_whole(full, NEW)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, NEW)
    reader.join()
    assert read == [NEW]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert Journal(pipe).read() == []
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.slow
def test_a_standard_stream_that_is_a_file_is_not_replaced(tmp_path):
    path = tmp_path / "out"
    code = "import sys; from pathlib import Path; from nanoglimpse.files import *; "
    code += "print('before', flush=True); write_whole(Path('/dev/stdout'), b'middle\\n'); "
    code += "print('after')"
    root = Path(__file__).parents[1]
    with path.open("a") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, cwd=root)
    assert path.read_text() == "before\nmiddle\nafter\n"
    assert not is_stream(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "is a folder"),
        ("none/a", "there is no folder"),
        ("n" * 300, "File name too long"),
        ("a\0b", "null"),
        ("input", "would overwrite"),
        ("link", "would overwrite"),
        ("hard", "would overwrite"),
    ],
)
def test_what_cannot_be_an_output_is_refused(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "input").write_bytes(b"input")
    (tmp_path / "link").symlink_to("input")
    os.link(tmp_path / "input", tmp_path / "hard")
    with pytest.raises(UsageError, match=message):
        check_writable(tmp_path / name, "overlay", [str(tmp_path / "input"), "gone", "a\0b"])


def test_names_of_any_length_can_be_written(tmp_path):
    for name in ("n" * 255, "é" * 127):
        write_whole(tmp_path / name, NEW)
        assert (tmp_path / name).read_bytes() == NEW
        with locked(tmp_path / name):
            pass
    with pytest.raises(NanoglimpseError, match="File name too long"):
        write_whole(tmp_path / ("n" * 256), NEW)


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A limit on the size of files, which the system enforces in the middle of a write."""
    code = """
import resource, signal, sys
from pathlib import Path
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.files import append, write_whole, write_whole_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (
    lambda path: write_whole(path / "a", b"x" * 2000),
    lambda path: append(path / "b", b"x" * 300),
    lambda path: write_whole_folder(path / "c", {"a": b"x" * 10, "b": b"x" * 2000}),
):
    try:
        write(Path(sys.argv[1]))
    except NanoglimpseError as error:
        print(error)
"""
    write_whole(tmp_path / "a", OLD[:900])
    write_whole(tmp_path / "b", OLD[:900])
    write_whole_folder(tmp_path / "c", {"a": b"1", "b": b"2"})
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.splitlines() == [
        f"{tmp_path / name} cannot be written: File too large" for name in "abc"
    ]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == OLD[:900]
    assert visible(tmp_path / "c") == {"a": b"1", "b": b"2"}


def test_lines_end_in_a_line_feed_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = '{"a": "x\u2028y\u0085z"}\r\n\n{"a": 2}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_rows(path) == [(1, {"a": "x\u2028y\u0085z"}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 2, is not JSON"),
        ('{"a": NaN}', "line 2, is not JSON: NaN is not a JSON number"),
        ('{"a": "\\ud800"}', "line 2, is not JSON: half of a surrogate"),
        ('{"a": ' + "9" * 5000 + "}", "line 2, is not JSON"),
    ],
    ids=["deep", "NaN", "surrogate", "long number"],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text("{}\n" + line + "\n")
    with pytest.raises(UsageError, match=message):
        read_rows(tmp_path / "rows.jsonl")
