"""Files of JSON objects, one a line, that are appended to and survive being killed."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.files import write_whole


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """The values of a JSONL file with their line numbers from 1; blank lines do not count.

    Raises:
        UsageError: there is no such file, it is not UTF-8, or a line is not JSON; it says which.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append((number, json.loads(line)))
        except ValueError:
            raise UsageError(f"{path}, line {number}, is not JSON") from None
    return rows


class Journal:
    """A file of records to which a run appends, and from which the next one continues.

    Whoever is killed while writing leaves at most half a line; `read` drops it.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[tuple[int, Any]]:
        """The records with their line numbers from 1; a line that is not JSON gives None.

        Raises:
            NanoglimpseError: the file cannot be read.
        """
        if not self.path.exists():
            return []
        try:
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1].decode()
        except (OSError, UnicodeDecodeError) as error:
            raise NanoglimpseError(f"{self.path} cannot be read: {error}") from None
        return [(number, _parsed(line)) for number, line in enumerate(whole.split("\n")[:-1], 1)]

    def is_new(self, header: str) -> bool:
        """Whether there is no whole line yet, of a file whose first line begins with `header`.

        Raises:
            NanoglimpseError: the file holds something else.
        """
        if not self.path.exists():
            return True
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise NanoglimpseError(f"{self.path} cannot be read: {error}") from None
        begins = data.startswith(header.encode()) or header.encode().startswith(data)
        if not begins:
            raise NanoglimpseError(f"{self.path} is not a file of results; give another file")
        return b"\n" not in data

    def mend(self) -> None:
        """Removes an unfinished line from the end.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            write_whole(self.path, data[: data.rfind(b"\n") + 1])

    def write(self, records: Iterable[dict]) -> None:
        """Replaces the content, whole or not at all; makes the folder where it is missing.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in records).encode())

    def append(self, records: Iterable[dict]) -> None:
        """Adds records, which are on the disk when this returns.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        text = "".join(json.dumps(record) + "\n" for record in records)
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise NanoglimpseError(f"{self.path} cannot be written: {error}") from None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
