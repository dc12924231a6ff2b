"""Questions from a file and answers to one, one a line each: `generate --batch-file`.

Results are written as the answers finish. A question that has been answered is not asked again when
the same command is given again: a line says which question it answers, and with what settings.
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
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.files import check_writable
from nanoglimpse.inputs.video import Video
from nanoglimpse.jsonl import Journal, read_rows

VISUALS = ("image", "video")
# Options on which an answer does not depend.
APART = {"batch_file", "output", "max_batch_tokens", "json", "quiet", "debug"}


@dataclass(frozen=True)
class FileQuestion:
    """A line of the file.

    Attributes:
        index: of the question in the file, from 0.
        names: its pictures, then its videos, as the file has them.
        images, videos: their paths.
        text: the question.
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
    def record(self) -> dict[str, Any]:
        """What the results say of the question."""
        named = {} if self.id is None else {"id": self.id}
        return {"index": self.index, **named, "question": self.text, "images": self.names}


def read_questions(path: Path) -> list[FileQuestion]:
    """The questions of a file: {"image": path, [paths] or null, "question": text, "id": any}.

    A video is named as "video", instead of a picture or beside it. Paths are relative to the file's
    folder. Blank lines do not count, and further keys are not read.

    Raises:
        UsageError: there is no such file, or a line is not a question; it says which.
    """
    rows = read_rows(path)
    if not rows:
        raise UsageError(f"{path} holds no question")
    return [_question(index, row, path, number) for index, (number, row) in enumerate(rows)]


def _question(index: int, row: Any, path: Path, number: int) -> FileQuestion:
    named = isinstance(row, dict) and _is_text(row.get("question"))
    if not named or not set(VISUALS) & set(row):
        raise UsageError(
            f'{path}, line {number}, needs {{"image": …, "question": "…"}}; text alone has null'
        )
    names = {}
    for kind in VISUALS:
        value = row.get(kind)
        names[kind] = [] if value is None else [value] if _is_text(value) else value
        if not isinstance(names[kind], list) or not all(map(_is_text, names[kind])):
            raise UsageError(f"{path}, line {number}: {kind} is a path, a list of paths, or null")
    images, videos = ([path.parent / name for name in names[kind]] for kind in VISUALS)
    both = names["image"] + names["video"]
    return FileQuestion(index, both, images, videos, row["question"], row.get("id"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


class AnswerFile:
    """Results of a batch, on stdout or in a file whose answers count as done.

    Attributes:
        left: the questions without an answer.
        total, done: questions in all, and with a result.
        failed: questions that got an error in this run.
    """

    def __init__(self, path: Path | None, questions: list[FileQuestion], settings: dict):
        self.journal, self.settings = Journal(path) if path else None, settings
        done = self._resume(self.journal, questions) if self.journal else set()
        self.left = [question for question in questions if question.index not in done]
        self.total, self.done, self.failed = len(questions), len(done), 0

    def _resume(self, journal: Journal, questions: list[FileQuestion]) -> set[int]:
        """Indices of the questions answered before; only their lines remain in the file.

        Failed questions are asked again.
        """
        answers: dict[int, dict] = {}
        if not journal.path.exists():
            return set()
        for number, row in journal.read():
            self._check(row, f"{journal.path}, line {number},", questions)
            if "answer" in row:
                answers.setdefault(row["index"], row)
        journal.write(answers.values())
        return set(answers)

    def _check(self, row: Any, where: str, questions: list[FileQuestion]) -> None:
        try:
            record = questions[row["index"]].record
            same = record == {key: row.get(key) for key in record}
        except (TypeError, KeyError, IndexError):
            same = False
        if not same:
            raise UsageError(f"{where} answers no question of this file; name another --output")
        if row.get("settings") != self.settings:
            raise UsageError(
                f"{where} was answered with settings {json.dumps(row.get('settings'))}, now they "
                f"are {json.dumps(self.settings)}; name another --output"
            )

    def add(self, question: FileQuestion, result: dict) -> None:
        """Writes a line: the question, its settings, and the answer or the error.

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
    """Answers the questions of a file; returns 0, and raises where any failed.

    Args:
        args: options of `generate`.
        given: those that differ from their defaults.
    """
    if args.question is not None or args.image or args.overlay or args.chat or args.session:
        raise UsageError(
            "a --batch-file names questions and pictures itself; it goes without --overlay, "
            "--chat and --session"
        )
    pruning_of(args), sampling_of(args)
    output = Path(args.output) if args.output else None
    if output:
        check_writable(output, "results")
    questions = read_questions(Path(args.batch_file))
    settings = {name: value for name, value in given.items() if name not in APART}
    results = AnswerFile(output, questions, settings)
    if results.left:
        try:
            _answer_all(args, results)
        except KeyboardInterrupt as interruption:
            again = "; the same command continues from there" if output else ""
            done = f"interrupted: {results.done} of {results.total} questions answered{again}"
            raise console.Stopped(done, interruption) from None
    note(args)(f"questions   {results.done} of {results.total}")
    if results.failed:
        raise NanoglimpseError(
            f"{results.failed} of {results.total} questions failed; their lines say why"
        )
    return 0


def _answer_all(args: argparse.Namespace, results: AnswerFile) -> None:
    queries = [(q.visuals(args.fps, args.max_frames), q.text) for q in results.left]
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
            note(args)(f"question {question.index}: {answer}")
        else:
            results.add(question, as_dict(engine, question.text, [*question.names], answer))
        remark = f"{results.failed} failed" if results.failed else ""
        show(results.done, results.total, remark)
