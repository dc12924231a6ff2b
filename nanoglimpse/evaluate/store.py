"""A file of results: JSON lines, appended as they come.

The first line holds the options that all results have in common. Results, pictures of the gallery,
verdicts of a judge, the names of missing pictures and errors of questions follow. A killed run
leaves at most half a line at the end, which the next run removes.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.jsonl import Journal

HEADER = '{"options":'
LIMIT = 1e18
Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and -LIMIT < value < LIMIT


def _maybe(value: Any) -> bool:
    return value is None or _number(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < LIMIT


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_maybe, value.values()))


def _hex(value: Any) -> bool:
    return isinstance(value, str) and len(value) > 0 and not set(value) - set("0123456789abcdef")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _row_of(count: int, value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(map(_number, value))


def _grid(value: Any) -> bool:
    return _row_of(2, value) and all(_count(side) and side for side in value)


def _boxes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_row_of(4, box) for box in value)


# What the values of each kind of record must be; other keys are ignored.
RESULT: dict[str, Check] = dict.fromkeys(
    ("question", "arm", "method", "group", "asked", "wanted", "reply"), _text
)
RESULT |= {"ratio": _maybe, "brief": _count, "contains": _number, "recall": _maybe}
RESULT |= {"visual": _count, "kept": _count, "flops": _numbers, "ms": _numbers}
# A result may have these as well.
FURTHER: dict[str, Check] = dict.fromkeys(
    ("exact", "anls", "f1", "iou", "prompt", "tokens", "stop", "batch", "peak_bytes"), _maybe
)
FURTHER |= dict.fromkeys(("input", "prefill", "decode_kv", "kv_rows", "kv_bytes"), _maybe)
GALLERY: dict[str, Check] = {"grid": _grid, "boxes": _boxes, "cells": _hex}
GALLERY |= {"importance": lambda value: value is None or _hex(value)}
PICTURE: dict[str, Check] = {"picture": _text, "uri": _text}
VERDICT: dict[str, Check] = {"verdict": _text, "arm": _text, "question": _text, "score": _number}
VERDICT |= {"understood": _count}
MISSING: dict[str, Check] = {"missing": _texts}
ERROR: dict[str, Check] = {"question": _text, "error": _text}


def _is(record: dict, kind: dict[str, Check]) -> bool:
    return all(name in record and check(record[name]) for name, check in kind.items())


def _is_result(record: dict) -> bool:
    further = {name: check for name, check in FURTHER.items() if name in record}
    if not _text(record.get("kind", "")) or not _is(record, RESULT | further):
        return False
    if "cells" not in record:
        return True
    return _is(record, GALLERY) and math.prod(record["grid"]) <= 4 * len(record["cells"])


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
            NanoglimpseError: it is not a file of results.
        """
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        (_, header), *records = Journal(path).read() or [(1, None)]
        options = header.get("options") if isinstance(header, dict) else None
        if not isinstance(options, dict) or not isinstance(options.get("data", {}), dict):
            raise NanoglimpseError(f"{path} is not a file of results; give another file")
        results = cls(path, options)
        for number, record in records:
            results._take(record if isinstance(record, dict) else {}, number)
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
            self._take(record, 0)

    def _take(self, record: dict, number: int) -> None:
        if _is(record, PICTURE):
            self.pictures[record["picture"]] = record["uri"]
        elif _is(record, VERDICT):
            self.verdicts[record["arm"], record["question"]] = record
        elif _is(record, MISSING):
            self.missing = record["missing"]
        elif _is(record, ERROR):
            self.errors[record["question"]] = record["error"]
        elif _is_result(record):
            key = record["arm"], record["question"]
            if key not in self.done:
                self.rows.append(record)
            self.done.add(key)
            self.errors.pop(record["question"], None)
        else:
            raise NanoglimpseError(f"{self.path}, line {number}, is not a result")


def _difference(written: dict, given: dict) -> str:
    changes = [
        f"{key} {written.get(key)} instead of {given.get(key)}"
        for key in {**written, **given}
        if written.get(key) != given.get(key)
    ]
    return f"holds results of other options: {', '.join(changes)}"
