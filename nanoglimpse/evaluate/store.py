"""A file of results: JSON lines, appended as they come.

The first line holds the options that all results have in common. Results, pictures of the gallery,
verdicts of a judge, the names of missing pictures and errors of questions follow. A killed run
leaves at most half a line at the end, which the next run removes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.evaluate.records import wrong
from nanoglimpse.jsonl import Journal

HEADER = '{"options":'


class ResultsFile:
    """Results in a file, or in memory only if there is no path.

    Attributes:
        path: the file.
        options: the options that all results have in common.
        rows: the results, one of each variant and question; see `run.answer_batch`.
        done: variant and question of every result.
        pictures: data URIs by question.
        verdicts: the verdicts of a judge by variant and question.
        missing: the missing pictures, one per question that was left out because of it.
        errors: why a question could not be asked, by question, as long as it has no result.
    """

    def __init__(self, path: Path | None = None, options: dict | None = None):
        self.path, self.options = path, options or {}
        self.rows: list[dict] = []
        self.pictures: dict[str, str] = {}
        self.verdicts: dict[tuple[str, str], dict] = {}
        self.missing: list[str] = []
        self.errors: dict[str, str] = {}
        self.done: set[tuple[str, str]] = set()

    @classmethod
    def read(cls, path: Path) -> "ResultsFile":
        """Reads a file; an unfinished last line is ignored, and of equal results all but the first.

        Raises:
            UsageError: there is no such file.
            NanoglimpseError: it is not a file of results, or a line is damaged; it says which.
        """
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        (_, header), *records = Journal(path).read() or [(1, None)]
        options = header.get("options") if isinstance(header, dict) else None
        if not isinstance(options, dict) or not isinstance(options.get("data", {}), dict):
            raise NanoglimpseError(f"{path} is not a file of results; give another file")
        results = cls(path, options)
        for number, record in records:
            if fault := wrong(record):
                raise NanoglimpseError(f"{path}, line {number}, is not a result: {fault}")
            results._take(record)
        return results

    @classmethod
    def resume(cls, path: Path | None, options: dict) -> "ResultsFile":
        """Opens a file to append results to; creates it if it does not exist.

        Raises:
            UsageError: its results were made with other options.
            NanoglimpseError: it is not a file of results, or cannot be written.
        """
        if path is None:
            return cls(None, options)
        journal = Journal(path)
        if journal.is_new(HEADER):
            journal.write([{"options": options}])
            return cls(path, options)
        results = cls.read(path)
        if results.options != json.loads(json.dumps(options)):
            raise UsageError(f"{path} {_difference(results.options, options)}; give another --out")
        journal.mend()
        return results

    def is_new(self, record: dict) -> bool:
        """Whether a record says something that the file does not say already."""
        if "picture" in record:
            return record["picture"] not in self.pictures
        return "error" not in record or self.errors.get(record["question"]) != record["error"]

    def add(self, records: Sequence[dict]) -> None:
        """Appends records to the file and waits until they are on the disk.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        if self.path:
            Journal(self.path).append(records)
        for record in records:
            self._take(record)

    def _take(self, record: dict) -> None:
        if "picture" in record:
            self.pictures[record["picture"]] = record["uri"]
        elif "verdict" in record:
            self.verdicts[record["arm"], record["question"]] = record
        elif "missing" in record:
            self.missing = record["missing"]
        elif "error" in record:
            self.errors[record["question"]] = record["error"]
        else:
            key = record["arm"], record["question"]
            if key not in self.done:
                self.rows.append(record)
            self.done.add(key)
            self.errors.pop(record["question"], None)


def _difference(written: dict, given: dict) -> str:
    changes = [
        f"{key} {written.get(key)} instead of {given.get(key)}"
        for key in {**written, **given}
        if written.get(key) != given.get(key)
    ]
    return f"holds results of other options: {', '.join(changes)}"
