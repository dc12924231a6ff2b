"""Questions from a file and answers to one, a line each: `generate --batch-file`.

Results are JSON lines, written as the answers finish. What has been answered is not asked again
when the same command is given again: a line says which question it answers, and with what settings.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import NanoglimpseError, UsageError
from .files import write_whole
from .video import Video

KINDS = {"image", "video"}
EVERY = 10.0  # seconds between two lines of progress where no line can be rewritten


@dataclass(frozen=True)
class Question:
    """A line of the file.

    Attributes:
        index: of the question in the file, from 0.
        names: its pictures, then its videos, as the file has them.
        images, videos: where they are.
        text: what is asked.
        id: the file's own name for it, of any JSON type; None without.
    """

    index: int
    names: list[str]
    images: list[Path]
    videos: list[Path]
    text: str
    id: Any = None

    def visuals(self, fps: float, max_frames: int) -> list[Path | Video]:
        """Pictures, then videos."""
        return [*self.images, *(Video(video, fps, max_frames) for video in self.videos)]

    @property
    def asked(self) -> dict:
        """What the results say of it."""
        named = {} if self.id is None else {"id": self.id}
        return {"index": self.index, **named, "question": self.text, "images": self.names}


def read_questions(path: Path) -> list[Question]:
    """The questions of a file: {"image": path, [paths] or null, "question": text, "id": any}.

    A video is named as "video", instead of a picture or beside it. Paths count from the file's
    folder. Blank lines do not count, and further keys are not read.

    Raises:
        UsageError: there is no such file, or a line is no question; it says which.
    """
    rows = [(number, row) for number, row in _rows(path) if row is not None]
    if not rows:
        raise UsageError(f"{path} holds no question")
    return [_question(index, row, path, number) for index, (number, row) in enumerate(rows)]


def _rows(path: Path) -> list[tuple[int, Any]]:
    """Line numbers from 1, and what the lines hold; None for blank ones."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append((number, json.loads(line) if line.strip() else None))
        except ValueError:
            raise UsageError(f"{path}, line {number}, is no JSON") from None
    return rows


def _question(index: int, row: Any, path: Path, number: int) -> Question:
    if not isinstance(row, dict) or not _is_text(row.get("question")) or not KINDS & set(row):
        raise UsageError(
            f'{path}, line {number}, needs {{"image": …, "question": "…"}}; text alone has null'
        )
    names = {}
    for kind in KINDS:
        value = row.get(kind)
        names[kind] = [] if value is None else [value] if _is_text(value) else value
        if not isinstance(names[kind], list) or not all(map(_is_text, names[kind])):
            raise UsageError(f"{path}, line {number}: {kind} is a path, a list of paths, or null")
    images, videos = ([path.parent / name for name in names[kind]] for kind in ("image", "video"))
    both = names["image"] + names["video"]
    return Question(index, both, images, videos, row["question"], row.get("id"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


class Results:
    """Results of a batch, on stdout or in a file; what stands there already is done.

    Attributes:
        left: the questions that have no answer yet.
        failed: how many got none in this run.
    """

    def __init__(self, path: Path | None, questions: list[Question], settings: dict):
        self.path, self.settings = path, settings
        done = self._resume(questions) if path and path.exists() else set()
        self.left = [question for question in questions if question.index not in done]
        self.total, self.done, self.failed = len(questions), len(done), 0

    def _resume(self, questions: list[Question]) -> set[int]:
        """Numbers of the questions answered before; their lines alone are left in the file.

        Half a line, which a killed run may leave, and failures are asked again.
        """
        try:
            whole, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path} is no file of results: {error}") from None
        lines, done = [], set()
        for number, line in enumerate(whole.splitlines(), 1):
            row = self._row(line, number, questions)
            if "answer" in row and row["index"] not in done:
                lines.append(line + "\n")
                done.add(row["index"])
        write_whole(self.path, "".join(lines).encode())
        return done

    def _row(self, line: str, number: int, questions: list[Question]) -> dict:
        where = f"{self.path}, line {number},"
        try:
            row = json.loads(line)
            asked = questions[row["index"]].asked
            same = asked == {key: row.get(key) for key in asked}
        except (ValueError, TypeError, KeyError, IndexError):
            same = False
        if not same:
            raise UsageError(f"{where} answers no question of this file; name another --output")
        if row.get("settings") != self.settings:
            raise UsageError(
                f"{where} was answered with settings {json.dumps(row.get('settings'))}, now they "
                f"are {json.dumps(self.settings)}; name another --output"
            )
        return row

    def add(self, question: Question, result: dict) -> None:
        """Writes a line: the question, its settings, and the answer or the error.

        Raises:
            NanoglimpseError: the file cannot be written; what stands there is whole lines, and at
                most one that is not.
        """
        self.done += 1
        self.failed += "error" in result
        line = json.dumps({**question.asked, "settings": self.settings, **result})
        if self.path is None:
            print(line, flush=True)
            return
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")
        except OSError as error:
            raise NanoglimpseError(f"{self.path} cannot be written: {error}") from None


class Counter:
    """How many are done, on stderr: a line that is rewritten on a terminal, else now and then."""

    def __init__(self, results: Results):
        self.results, self.shown = results, time.perf_counter()

    def __call__(self) -> None:
        """Shows how far the batch is."""
        results, now = self.results, time.perf_counter()
        line = f"questions   {results.done} of {results.total}"
        line += f", {results.failed} failed" if results.failed else ""
        if sys.stderr.isatty():
            end = "\r\033[K" if results.done == results.total else ""
            print(f"\r{line}", end=end, file=sys.stderr, flush=True)
        elif now - self.shown >= EVERY:
            self.shown = now
            print(line, file=sys.stderr, flush=True)
