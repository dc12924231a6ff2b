"""Results in a file, a JSON object a line, in the order they came.

The first line holds the options that all results have in common; then come results, pictures of
the gallery, a judge's verdicts and names of missing pictures. Whoever is killed leaves at most half
a line behind, which the next start takes away.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import NanoglimpseError, UsageError
from ..files import write_whole

RESULT = {"question", "arm", "method", "ratio", "brief", "group", "asked", "wanted", "reply"}
RESULT |= {"contains", "visual", "kept", "recall", "flops", "ms"}
HEAD = b'{"options":'


class Results:
    """What stands in a file of results, or in memory without one.

    Attributes:
        path: of the file.
        options: that all results have in common.
        rows: the results; see `answers.answer`.
        pictures: data URIs by question.
        verdicts: a judge's, by (arm, question).
        missing: the picture of every question that was left out because it was not there.
    """

    def __init__(self, path: Path | None = None, options: dict | None = None):
        self.path, self.options = path, options or {}
        self.rows: list[dict] = []
        self.pictures: dict[str, str] = {}
        self.verdicts: dict[tuple[str, str], dict] = {}
        self.missing: list[str] = []

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What a file holds.

        Raises:
            UsageError: there is no such file.
            NanoglimpseError: it holds something else.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from None
        head, *lines = text.split("\n")[:-1] or [""]
        options = _record(head, path, 1).get("options")
        if not isinstance(options, dict):
            raise NanoglimpseError(f"{path} holds something else than results; give another file")
        results = cls(path, options)
        for number, line in enumerate(lines, 2):
            results._take(_record(line, path, number), number)
        return results

    @classmethod
    def resume(cls, path: Path | None, options: dict) -> "Results":
        """A file to go on with, or a new one.

        Raises:
            UsageError: it holds results of other options.
            NanoglimpseError: it holds something else, or cannot be written.
        """
        if path is None:
            return cls(None, options)
        if not path.exists() or not _mend(path):
            results = cls(path, options)
            write_whole(path, (json.dumps({"options": options}) + "\n").encode())
            return results
        results = cls.read(path)
        if results.options != json.loads(json.dumps(options)):
            raise UsageError(f"{path} {_difference(results.options, options)}; give another --out")
        return results

    @property
    def done(self) -> set[tuple[str, str]]:
        """Arm and question of every result."""
        return {(row["arm"], row["question"]) for row in self.rows}

    def add(self, records: Sequence[dict]) -> None:
        """Keeps records, in the file too, before it returns.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        if self.path:
            text = "".join(json.dumps(record) + "\n" for record in records)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise NanoglimpseError(f"{self.path} cannot be written: {error}") from None
        for record in records:
            self._take(record, 0)

    def _take(self, record: dict, number: int) -> None:
        if "picture" in record:
            self.pictures[record["picture"]] = record["uri"]
        elif "verdict" in record:
            self.verdicts[record["arm"], record["question"]] = record
        elif "missing" in record:
            self.missing = record["missing"]
        elif record.keys() >= RESULT:
            self.rows.append(record)
        else:
            raise NanoglimpseError(f"{self.path}, line {number}, is no result")


def _record(line: str, path: Path, number: int) -> dict:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise NanoglimpseError(
            f"{path} holds something else than results in line {number}; give another file"
        )
    return record


def _mend(path: Path) -> bool:
    """Takes half a line away from the end of a file of results; whether a line is left."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NanoglimpseError(f"{path} cannot be read: {error}") from None
    whole = data[: data.rfind(b"\n") + 1]
    if not (data.startswith(HEAD) or HEAD.startswith(data)):
        raise NanoglimpseError(f"{path} holds something else than results; give another file")
    if whole and whole != data:
        write_whole(path, whole)
    return bool(whole)


def _difference(stood: dict, given: dict) -> str:
    changed = [key for key in {**stood, **given} if stood.get(key) != given.get(key)]
    said = [f"{key} {stood.get(key)} instead of {given.get(key)}" for key in changed]
    return f"holds results of other options: {', '.join(said)}"
