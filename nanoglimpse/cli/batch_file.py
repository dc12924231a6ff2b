"""`generate --batch-file`: questions from a JSONL file, and their answers as lines of another.

Results are written as the answers finish. Each line names its question and the settings of the run,
so that the same command, given again, asks only the questions that have no answer yet.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoglimpse.cli import console
from nanoglimpse.cli.console import Progress, note
from nanoglimpse.cli.options import load_engine, prompt_options, pruning_of, sampling_of
from nanoglimpse.cli.report import as_dict
from nanoglimpse.errors import NanoglimpseError, UsageError, one_line
from nanoglimpse.files import check_writable, locked
from nanoglimpse.jsonl import Journal, read_rows
from nanoglimpse.pictures.fetch import NAMED, shown
from nanoglimpse.pictures.video import Video

VISUALS = ("image", "video")
# Options that do not affect an answer.
APART = {"batch_file", "output", "max_batch_tokens", "json", "quiet", "debug", "offline"}


@dataclass(frozen=True)
class FileQuestion:
    """A line of the file.

    Attributes:
        index: position of the question in the file, from 0.
        names: of its pictures and then of its videos, as in the file, but data URIs shortened.
        visuals: the pictures and videos themselves; a data URI is the only str.
        text: the question.
        id: the "id" of the line, of any JSON type; None without one.
    """

    index: int
    names: list[str]
    visuals: list[Path | str | Video]
    text: str
    id: Any = None

    @property
    def record(self) -> dict[str, Any]:
        """The fields of the results that identify the question."""
        named = {} if self.id is None else {"id": self.id}
        return {"index": self.index, **named, "question": self.text, "images": self.names}


def read_questions(path: Path, fps: float, max_frames: int) -> list[FileQuestion]:
    """The questions of a file: {"image": path, [paths] or null, "question": text, "id": any}.

    Videos are given as "video", in place of pictures or beside them. Paths are relative to the
    folder of the file, and a data URI may stand for one; no URL is fetched because a file names it.
    Blank lines do not count, and other keys are ignored.

    Args:
        path: the file.
        fps, max_frames: as `Video`.

    Raises:
        UsageError: the file does not exist, or a line is not a question; the message says which.
    """
    questions = []
    for index, (number, row) in enumerate(read_rows(path)):
        names = _names(row, f"{path}, line {number}")
        images = [_visual(name, path.parent) for name in names["image"]]
        videos = [Video(_visual(name, path.parent), fps, max_frames) for name in names["video"]]
        both = [shown(name) for name in names["image"] + names["video"]]
        question = FileQuestion(index, both, [*images, *videos], row["question"], row.get("id"))
        questions.append(question)
    if not questions:
        raise UsageError(f"{path} contains no questions")
    return questions


def _names(row: Any, where: str) -> dict[str, list[str]]:
    """Names of the pictures and of the videos in a line, which must be a question."""
    question = row.get("question") if isinstance(row, dict) else None
    if not isinstance(question, str) or not question or not set(VISUALS) & set(row):
        raise UsageError(
            f'{where}: expected {{"image": path, "question": text}}, with null for text alone'
        )
    names = {}
    for kind in VISUALS:
        value = row.get(kind)
        names[kind] = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(name, str) and name for name in names[kind]):
            raise UsageError(
                f"{where}: {kind} must be a path, a list of paths or null, got {value!r}"
            )
        if urls := [name for name in names[kind] if NAMED.match(name) and not _is_data(name)]:
            raise UsageError(
                f"{where}: {shown(urls[0])} is not fetched because a file names it; {kind} must be "
                "a path or a data URI"
            )
    return names


def _is_data(name: str) -> bool:
    return name[:5].lower() == "data:"


def _visual(name: str, folder: Path) -> Path | str:
    return name if _is_data(name) else folder / name


class AnswerFile:
    """The results of a batch, on stdout or in a file that a later run continues.

    Attributes:
        left: the questions that have no answer yet.
        total, done: the number of questions, and of those with a result.
        failed: the number of questions that failed in this run.
    """

    def __init__(self, path: Path | None, questions: list[FileQuestion], settings: dict):
        self.journal, self.settings = Journal(path) if path else None, settings
        done = self._resume(self.journal, questions) if self.journal else set()
        self.left = [question for question in questions if question.index not in done]
        self.total, self.done, self.failed = len(questions), len(done), 0

    def _resume(self, journal: Journal, questions: list[FileQuestion]) -> set[int]:
        """Indices of the questions with an answer in the file; removes its other lines.

        Questions that failed are asked again.
        """
        answers: dict[int, dict] = {}
        rows = journal.read()
        for number, row in rows:
            self._check(row, f"{journal.path}, line {number},", questions)
            if "answer" in row:
                answers.setdefault(row["index"], row)
        journal.mend()
        if len(answers) < len(rows):
            journal.write(answers.values())
        return set(answers)

    def _check(self, row: Any, where: str, questions: list[FileQuestion]) -> None:
        try:
            record = questions[row["index"]].record
            same = record == {key: row.get(key) for key in record}
        except (TypeError, KeyError, IndexError):
            same = False
        if not same:
            raise UsageError(f"{where} is not a result of this batch file; choose another --output")
        if row.get("settings") != self.settings:
            raise UsageError(
                f"{where} has the settings {json.dumps(row.get('settings'))}, but this run has "
                f"{json.dumps(self.settings)}; choose another --output"
            )

    def add(self, question: FileQuestion, result: dict) -> None:
        """Writes the result of a question: its answer, or its error.

        Raises:
            NanoglimpseError: the file cannot be written.
        """
        self.done += 1
        self.failed += "error" in result
        row = {**question.record, "settings": self.settings, **result}
        if self.journal is None:
            print(json.dumps(row), flush=True)
        else:
            self.journal.append([row])


def answer_file(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """Answers the questions of a file; returns 0.

    Args:
        args: the options of `generate`.
        given: the options that differ from their defaults.

    Raises:
        UsageError: an option or a line makes no sense.
        NanoglimpseError: at least one question failed, or the results cannot be written.
    """
    if args.question is not None or args.image or args.overlay or args.chat or args.session:
        raise UsageError(
            "--batch-file cannot be combined with a question, --image, --video, --overlay, --chat "
            "or --session"
        )
    pruning_of(args), sampling_of(args)
    output = Path(args.output) if args.output else None
    questions = read_questions(Path(args.batch_file), args.fps, args.max_frames)
    settings = {name: value for name, value in given.items() if name not in APART}
    if output is None:
        return _answer_file(args, AnswerFile(None, questions, settings))
    check_writable(output, "results", [args.batch_file, *_files(questions)])
    with locked(output):
        return _answer_file(args, AnswerFile(output, questions, settings))


def _files(questions: list[FileQuestion]) -> set[Path]:
    """The pictures, and the videos that are files."""
    visuals = (visual for question in questions for visual in question.visuals)
    return {Path(v.name if isinstance(v, Video) else v) for v in visuals}


def _answer_file(args: argparse.Namespace, results: AnswerFile) -> int:
    if results.left:
        try:
            _answer_all(args, results)
        except KeyboardInterrupt as interruption:
            again = "; the same command continues from there" if args.output else ""
            done = f"interrupted: {results.done} of {results.total} questions answered{again}"
            raise console.Stopped(done, interruption) from None
    note(args)(f"questions   {results.done} of {results.total}")
    if results.failed:
        raise NanoglimpseError(
            f"{results.failed} of {results.total} questions failed; see the results"
        )
    return 0


def _answer_all(args: argparse.Namespace, results: AnswerFile) -> None:
    queries = [(question.visuals, question.text) for question in results.left]
    engine, show = load_engine(args), Progress("questions", args.quiet)
    answers = engine.answers(
        queries,
        pruning=pruning_of(args),
        max_batch_tokens=args.max_batch_tokens,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling_of(args),
        prompt_options=prompt_options(args),
    )
    for number, answer in answers:
        question = results.left[number]
        if isinstance(answer, NanoglimpseError):
            results.add(question, {"error": str(answer)})
            note(args)(f"question {question.index}: {one_line(answer)}")
        else:
            results.add(question, as_dict(engine.model, question.text, [*question.names], answer))
        remark = f"{results.failed} failed" if results.failed else ""
        show(results.done, results.total, remark)
