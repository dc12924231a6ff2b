"""Files of JSON objects, one a line, that are appended to and survive being killed."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.files import append, is_stream, write_whole
from nanoglimpse.jsontext import parse_json

# Of a line: what a crash of the machine leaves where data had not reached the disk, and Windows'
# line ends.
BLANK = " \t\r\0"


def read_rows(path: Path) -> list[tuple[int, Any]]:
    """The values of a JSONL file with their line numbers from 1; blank lines do not count.

    Lines end in a line feed alone: other characters that some programs take for the end of a line
    may stand in a text.

    Raises:
        UsageError: there is no such file, it is not UTF-8, or a line is not JSON or holds half a
            character; it says which.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip(BLANK):
                rows.append((number, parse_json(line)))
        except ValueError as error:
            raise UsageError(f"{path}, line {number}, is not JSON: {error}") from None
    return rows


class Journal:
    """A file of records to which a run appends, and from which the next one continues.

    Whoever is killed while writing leaves at most half a line; `read` drops it. A stream holds no
    earlier records: it is never read.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[tuple[int, Any]]:
        """The records with their line numbers from 1; a line that is not JSON gives None.

        Empty lines, and the zeros that a crash of the machine may leave, do not count.

        Raises:
            NanoglimpseError: the file cannot be read.
        """
        rows = []
        for number, line in self._lines():
            try:
                rows.append((number, parse_json(line.decode(), halves=True)))
            except ValueError:
                rows.append((number, None))
        return rows

    def _lines(self) -> list[tuple[int, bytes]]:
        """The whole lines that are not blank, with their numbers from 1."""
        data = self._bytes()
        lines = data[: data.rfind(b"\n") + 1].split(b"\n")
        stripped = (line.strip(BLANK.encode()) for line in lines)
        return [(number, line) for number, line in enumerate(stripped, 1) if line]

    def _bytes(self) -> bytes:
        if is_stream(self.path):
            return b""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except (OSError, ValueError) as error:
            raise NanoglimpseError(f"{self.path} cannot be read: {error}") from None

    def is_new(self, header: str) -> bool:
        """Whether there is no whole line yet, of a file whose first line begins with `header`.

        Raises:
            NanoglimpseError: the file holds something else, or cannot be read.
        """
        data = self._bytes().lstrip(BLANK.encode() + b"\n")
        if not (data.startswith(header.encode()) or header.encode().startswith(data)):
            raise NanoglimpseError(f"{self.path} is not a file of results; give another file")
        return b"\n" not in data

    def mend(self) -> None:
        """Removes an unfinished line from the end, empty lines, and zeros.

        Raises:
            NanoglimpseError: the file cannot be read or written.
        """
        whole = b"".join(line + b"\n" for _, line in self._lines())
        if whole != self._bytes():
            write_whole(self.path, whole)

    def write(self, records: Iterable[dict]) -> None:
        """Replaces the content, whole or not at all; makes the folder where it is missing.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        write_whole(self.path, _text(records))

    def append(self, records: Iterable[dict]) -> None:
        """Adds records, which are on the disk when this returns.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        append(self.path, _text(records))


def _text(records: Iterable[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
