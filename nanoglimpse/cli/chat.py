"""A conversation about pictures, line by line: on a terminal, or through a pipe.

Answers go to stdout and everything else to stderr. An error in one line of input is reported in one
line, and the chat continues with the next.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoglimpse.cli.console import exit_code, is_out_of_memory, say
from nanoglimpse.cli.kinds import NAME
from nanoglimpse.cli.overlay import save_overlay
from nanoglimpse.cli.report import as_dict, overlay_lines, report
from nanoglimpse.config import Config
from nanoglimpse.errors import NanoglimpseError, UsageError, one_line
from nanoglimpse.files import check_writable
from nanoglimpse.inference.outputs import Answer
from nanoglimpse.inference.session import Session
from nanoglimpse.pictures.picture import Source, sources
from nanoglimpse.pictures.video import Video

HELP = """Type a question, or one of these commands:
/overlay FILE  write a picture of the visual tokens that the last answer kept
/image FILE    add a picture
/save FILE     save the pictures and the conversation, for --session FILE
/alone         ask each question on its own, or return to the conversation
/reset         forget the conversation and keep the pictures
/stats         show the cost of the last answer and the size of the session
/help          show this list
/quit, /exit   end the chat, as Ctrl-D does
Ctrl-C stops an answer."""
ENDS = ("/quit", "/exit")
NEED_FILE = ("/overlay", "/image", "/save")
# The bits of the dots of a Braille character, four rows of two.
DOTS = torch.tensor(((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80)))


class Chat:
    """Answers questions and runs commands, line by line.

    Args:
        session: session with the pictures.
        images: the pictures and videos; None for those of a saved session.
        options: options of `Session.stream`.
        note: prints a line of information, or drops it with `--quiet`.
        json: print a JSON object for each answer instead of its text.
        font: font of overlays, as `save_overlay` takes it.

    Attributes:
        follow_up: whether questions belong to a conversation.
        last: the pictures, question and answer of the last turn.
    """

    def __init__(
        self,
        session: Session,
        images: Sequence[Source | Video | None],
        options: dict[str, Any],
        note: Callable[[str], None],
        json: bool,
        font: Path | None = None,
    ):
        self.font = font
        self.session, self.images, self.options = session, list(images), options
        self.note, self.json = note, json
        self.last: tuple[list[Source | Video | None], str, Answer] | None = None
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
        """Runs the lines of `first`, then those of stdin.

        Returns:
            0 on a terminal. For a pipe, the largest exit code of an error, or 130 after Ctrl-C.
        """
        typed, code = sys.stdin.isatty(), 0
        if typed:
            self.note("chat        type a question, or /help for the commands; /quit ends")
        try:
            for line in lines(first, typed):
                if line.strip() in ENDS:
                    break
                code = max(code, self._safely(line, typed))
        except KeyboardInterrupt as interruption:
            self.note("interrupted")
            return exit_code(interruption)
        return 0 if typed else code

    def _safely(self, line: str, typed: bool) -> int:
        """Runs a line; reports an error in one line and returns its exit code."""
        try:
            self.do(line)
        except KeyboardInterrupt:
            if not typed:
                raise
            self.note("stopped")
        except NanoglimpseError as error:
            say(f"error: {one_line(error)}")
            return error.exit_code
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            say("error: not enough memory; use fewer or smaller pictures (--max-pixels)")
            return 1
        return 0

    def do(self, line: str) -> None:
        """Answers a question or runs a command."""
        if not line.startswith("/"):
            if line.strip():
                self.answer(line.strip())
            return
        name, _, argument = (part.strip() for part in line.strip().partition(" "))
        if name not in self.commands:
            # Nothing has failed that a script would have to know.
            say(f"error: unknown command '{name}'; /help lists the commands")
            return
        if name in NEED_FILE:
            argument = _file(name, argument)
        self.commands[name](argument)

    def answer(self, question: str) -> None:
        """Streams an answer, then reports what it has kept."""
        stream = self.session.stream(question, follow_up=self.follow_up, **self.options)
        try:
            for piece in stream:
                if not self.json:
                    print(piece, end="", flush=True)
        finally:
            answer, model = stream.answer, self.session.model
            self.last = list(self.images), question, answer
            whole = as_dict(model, question, self.names, answer) if self.json else None
            print(json.dumps(whole) if whole else "", flush=True)
            for line in summary(answer, model.config):
                self.note(line)

    @property
    def names(self) -> list[str | None]:
        """Of the pictures and videos; None for those of a saved session."""
        return [None if image is None else image.name for image in self.images]

    def overlay(self, name: str) -> None:
        """Writes the overlay of the last answer."""
        if self.last is None:
            raise UsageError("an overlay needs an answer; ask a question first")
        images, question, answer = self.last
        shown = [image for image in images if image is not None]
        if len(shown) < len(images):
            raise UsageError("a saved session has no pixels for an overlay")
        path = Path(name)
        check_writable(path, "overlay", self._inputs())
        config = self.session.model.config
        left_out = save_overlay(path, shown, question, answer, config, self.font)
        for line in overlay_lines(path, left_out):
            self.note(line)

    def add(self, name: str) -> None:
        """Adds a picture."""
        before, more = len(self.session.vision.visual), sources(name)
        self.session.add(more)
        self.images += more
        tokens = len(self.session.vision.visual) - before
        self.note(f"picture     {name}, {tokens} visual tokens")

    def save(self, name: str) -> None:
        """Saves the session: the encoded pictures and the conversation."""
        path = Path(name)
        check_writable(path, "session", self._inputs())
        self.session.save(path)
        self.note(f"session     {path}, {path.stat().st_size / 1e6:.2f} MB")

    def _inputs(self) -> list[str]:
        """Names of what has been opened; those of pages and URLs name no file."""
        return [image.name for image in self.images if image is not None]

    def alone(self, _: str) -> None:
        """Leaves the conversation, or returns to it."""
        self.follow_up = not self.follow_up
        self.note(f"alone       {'off' if self.follow_up else 'on'}")

    def reset(self, _: str) -> None:
        """Forgets the conversation."""
        self.session.reset()
        self.note("reset       conversation forgotten, pictures kept")

    def stats(self, _: str) -> None:
        """Prints the cost of the last answer and the size of the session."""
        for line in report(self.last[2]) if self.last else []:
            say(line)
        session = self.session
        say(
            f"session     {len(session.prompt.grids)} pictures, {len(session.turns)} turns, "
            f"{session.bytes / 1e6:.2f} MB"
        )


def _file(command: str, name: str) -> str:
    """The name of a file that a command is given, with ~ for the home folder.

    Raises:
        UsageError: there is none, or no file can have it.
    """
    if not name:
        raise UsageError(f"{command} needs the name of a file")
    try:
        return NAME.read(os.path.expanduser(name))
    except ValueError:
        raise UsageError(f"{command}: the file must have {NAME.accepts}") from None


def lines(first: Iterable[str], typed: bool) -> Iterator[str]:
    """The lines of `first`, then those of stdin; on a terminal with a prompt and a history."""
    yield from first
    if not typed:
        # Bytes that are not UTF-8 make their own question fail, and not the ones after it.
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
    """What an answer kept and cost, and a map of the kept cells of each picture that was pruned."""
    stats, merge, first = answer.stats, config.vision_config.spatial_merge_size, 0
    share = f" ({stats.kept_tokens / stats.visual_tokens:.1%})" if stats.visual_tokens else ""
    shown = [
        f"kept        {stats.kept_tokens} of {stats.visual_tokens} visual tokens{share}, first "
        f"token {stats.first_token:.1f} ms, {len(answer.token_ids)} tokens"
    ]
    for t, h, w in answer.grids:
        shape = (t * h // merge, w // merge)
        own = answer.kept[first : first + shape[0] * shape[1]]
        first += len(own)
        if not own.all():
            shown += [" " * 12 + line for line in cells(own.view(shape))]
    return shown


def cells(kept: Tensor) -> list[str]:
    """Bool [rows, columns] as lines of Braille characters, each a block of 4 × 2 cells."""
    rows, columns = kept.shape
    padded = F.pad(kept.cpu().int(), (0, -columns % 2, 0, -rows % 4))
    blocks = padded.unfold(0, 4, 4).unfold(1, 2, 2)  # [rows / 4, columns / 2, 4, 2]
    codes = 0x2800 + (blocks * DOTS).sum((2, 3))
    return ["".join(map(chr, line)) for line in codes.tolist()]
