"""A conversation about pictures, line by line: on a terminal, or through a pipe.

Answers go to stdout, everything else to stderr. An error of one line of input is reported in one
line, and the next one is read.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from nanoglimpse.cli.console import exit_code, is_out_of_memory, say
from nanoglimpse.config import Config
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.files import check_writable
from nanoglimpse.inference.outputs import Answer
from nanoglimpse.inference.overlay import save_overlay
from nanoglimpse.inference.session import QuestionOptions, Session
from nanoglimpse.inputs.video import Video

HELP = """A line is a question, or one of
/overlay FILE  write a picture of what the last answer kept
/image FILE    add a picture
/save FILE     write pictures and conversation, for --session FILE
/alone         ask each question by itself; again, in the conversation
/reset         forget the conversation, keep the pictures
/stats         what the last answer cost, and what is held
/help          this
Ctrl-C stops an answer, Ctrl-D ends."""
# The dots of a Braille character, four rows of two.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


class Chat:
    """Answers questions and obeys commands, line by line.

    Args:
        session: of the pictures.
        images: what they are; None for those of a saved session.
        options: of `Session.stream`.
        note: prints a line that nobody has asked for.
        report: the statistics of an answer, one line each.
        as_dict: question, pictures and answer as what is printed in place of the text; None to
            print the text.

    Attributes:
        follow_up: whether questions belong to a conversation.
        last: the pictures, question and answer of the last turn.
    """

    def __init__(
        self,
        session: Session,
        images: Sequence[str | Video | None],
        options: QuestionOptions,
        note: Callable[[str], None],
        report: Callable[[Answer], list[str]],
        as_dict: Callable[[str, Sequence[str | Video | None], Answer], dict] | None = None,
    ):
        self.session, self.images, self.options = session, list(images), options
        self.note, self.report, self.as_dict = note, report, as_dict
        self.last: tuple[list[str | Video | None], str, Answer] | None = None
        self.follow_up = True
        self.commands: dict[str, Callable[[str], None]] = {
            "/overlay": self.overlay,
            "/image": self.add,
            "/save": self.save,
            "/alone": self.alone,
            "/reset": self.reset,
            "/stats": self.stats,
            "/help": lambda _: say(HELP),
        }

    def run(self, first: Iterable[str] = ()) -> int:
        """Does `first`, then what is typed or piped until it ends.

        Returns:
            0 on a terminal; of a pipe the largest exit code of an error, 130 if it was stopped.
        """
        typed, code = sys.stdin.isatty(), 0
        if typed:
            self.note("chat        a question a line, /help for more, Ctrl-D ends")
        try:
            for line in lines(first, typed):
                code = max(code, self._safely(line, typed))
        except KeyboardInterrupt as interruption:
            self.note("interrupted")
            return exit_code(interruption)
        return 0 if typed else code

    def _safely(self, line: str, typed: bool) -> int:
        """Does a line; an error is one line, and its exit code is returned."""
        try:
            self.do(line)
        except KeyboardInterrupt:
            if not typed:
                raise
            self.note("stopped")
        except NanoglimpseError as error:
            say(f"error: {' '.join(str(error).split())}")
            return error.exit_code
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            say("error: not enough memory for this; use fewer or smaller pictures (--max-pixels)")
            return 1
        return 0

    def do(self, line: str) -> None:
        """Answers a question, or obeys a command."""
        if not line.startswith("/"):
            if line.strip():
                self.answer(line.strip())
            return
        name, _, argument = line.strip().partition(" ")
        if name not in self.commands:
            raise UsageError(f"there is no {name}; /help names what there is")
        self.commands[name](argument.strip())

    def answer(self, question: str) -> Answer:
        """Streams an answer, then says what it has kept."""
        stream = self.session.stream(question, follow_up=self.follow_up, **self.options)
        try:
            for piece in stream:
                if self.as_dict is None:
                    print(piece, end="", flush=True)
        finally:
            answer = stream.answer
            self.last = list(self.images), question, answer
            whole = self.as_dict and json.dumps(self.as_dict(question, self.images, answer))
            print(whole or "", flush=True)
            for line in summary(answer, self.session.model.config):
                self.note(line)
        return answer

    def overlay(self, name: str) -> None:
        """Writes the overlay of the last answer."""
        if not name:
            raise UsageError("/overlay needs the name of a file to write")
        if self.last is None:
            raise UsageError("there is no answer yet that an overlay could show")
        images, question, answer = self.last
        shown = [image for image in images if image is not None]
        if len(shown) < len(images):
            raise UsageError("a saved session holds no pixels that an overlay could show")
        path = Path(name).expanduser()
        check_writable(path, "overlay")
        save_overlay(path, shown, question, answer, self.session.model.config)
        self.note(f"overlay     {path}")

    def add(self, name: str) -> None:
        """Adds a picture."""
        if not name:
            raise UsageError("/image needs the name of a picture")
        before, path = len(self.session.vision.visual), str(Path(name).expanduser())
        self.session.add(path)
        self.images.append(path)
        more = len(self.session.vision.visual) - before
        self.note(f"picture     {path}, {more} visual tokens")

    def save(self, name: str) -> None:
        """Writes the session, pictures read and conversation."""
        if not name:
            raise UsageError("/save needs the name of a file to write")
        path = Path(name).expanduser()
        check_writable(path, "session")
        self.session.save(path)
        self.note(f"session     {path}, {path.stat().st_size / 1e6:.2f} MB")

    def alone(self, _: str) -> None:
        """Leaves the conversation, or comes back to it."""
        self.follow_up = not self.follow_up
        self.note(f"alone       {'off' if self.follow_up else 'on'}")

    def reset(self, _: str) -> None:
        """Forgets the conversation."""
        self.session.reset()
        self.note("reset       the pictures stay")

    def stats(self, _: str) -> None:
        """Says what the last answer cost, and what the session holds."""
        for line in self.report(self.last[2]) if self.last else []:
            say(line)
        session = self.session
        say(
            f"session     {len(session.prompt.grids)} pictures, {len(session.turns)} turns, "
            f"{session.bytes / 1e6:.2f} MB"
        )


def lines(first: Iterable[str], typed: bool) -> Iterator[str]:
    """`first`, then the lines of stdin; a prompt and a history on a terminal alone."""
    yield from first
    if not typed:
        # What is not UTF-8 is refused with its question, not with all that follow.
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history)
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "")
        except KeyboardInterrupt:
            say("")
            continue
        except EOFError:
            say("")
            return
        yield line


def summary(answer: Answer, config: Config) -> list[str]:
    """What an answer has kept and taken; of each picture that was pruned, the cells kept."""
    stats, merge, first, out = answer.stats, config.vision_config.spatial_merge_size, 0, []
    share = f" ({stats.kept_tokens / stats.visual_tokens:.1%})" if stats.visual_tokens else ""
    out.append(
        f"kept        {stats.kept_tokens} of {stats.visual_tokens} visual tokens{share}, first "
        f"token {stats.first_token:.1f} ms, {len(answer.token_ids)} tokens"
    )
    for t, h, w in answer.grids:
        shape = (t * h // merge, w // merge)
        own = answer.kept[first : first + shape[0] * shape[1]]
        first += len(own)
        out += [] if bool(own.all()) else [" " * 12 + line for line in cells(own.view(shape))]
    return out


def cells(kept: Tensor) -> list[str]:
    """Bool [rows, columns] in Braille characters of 4 × 2."""
    rows = kept.tolist()
    blocks = [
        [
            [row[left : left + 2] for row in rows[top : top + 4]]
            for left in range(0, len(rows[0]), 2)
        ]
        for top in range(0, len(rows), 4)
    ]
    return ["".join(_braille(block) for block in line) for line in blocks]


def _braille(block: list[list[bool]]) -> str:
    marks = [
        dot
        for row, dots in zip(block, DOTS, strict=False)
        for on, dot in zip(row, dots, strict=False)
        if on
    ]
    return chr(0x2800 + sum(marks))
