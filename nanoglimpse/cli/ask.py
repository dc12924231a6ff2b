"""The command `nanoglimpse generate`: one question about pictures, a chat, or a file of questions.

The answer goes to stdout as it is generated, and everything else to stderr.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoglimpse.cli import console, options
from nanoglimpse.cli.batch_file import answer_file
from nanoglimpse.cli.chat import Chat, summary
from nanoglimpse.cli.console import Parser, adder, note
from nanoglimpse.cli.kinds import COUNT, NAME, number, whole
from nanoglimpse.cli.overlay import save_overlay
from nanoglimpse.cli.report import as_dict, overlay_lines, report
from nanoglimpse.errors import UsageError
from nanoglimpse.files import check_writable
from nanoglimpse.inference.stream import Stream
from nanoglimpse.inputs.processor import SYSTEM
from nanoglimpse.methods import METHODS
from nanoglimpse.pictures.fetch import NAMED
from nanoglimpse.pictures.fonts import check_font
from nanoglimpse.pictures.picture import Source, source, sources
from nanoglimpse.pictures.video import FPS, MAX_FRAMES, Video
from nanoglimpse.version import VERSION
from nanoglimpse.weights.hub import EMBEDDED

EXAMPLES = EMBEDDED["nano"] / "examples"
# What is said of the embedded model, which answers everything else with confident nonsense.
KNOWS = (
    "note        nano knows rendered scenes, receipts and bar charts, and nothing else; for photos "
    "give --model Qwen/Qwen2.5-VL-3B-Instruct"
)


class VideoPath(str):
    """A path given with --video."""


def parser() -> Parser:
    """The parser of the command line."""
    p = Parser(
        prog="nanoglimpse generate",
        description="Answer a question about pictures with Qwen2.5-VL, pruned by GlimpsePrune. "
        "Without arguments, answer a built-in question about a built-in picture.",
        quiet=True,
    )
    several = {"action": "append", "dest": "image"}
    picture = "pictures: paths, PDF files, URLs, data URIs, or - for stdin; may be repeated"
    video = "an animation (GIF, WebP, APNG) or a folder of frames; may be mixed with --image"
    chat = "ask any number of questions about the pictures, one per line; /help lists the commands"
    session = "ask about a session that /save wrote in a chat, which has pictures and conversation"
    add = adder(p)
    add("question", str, "the question", nargs="?")
    add("--image", str, picture, metavar="FILE", nargs="+", **several)
    add("--video", VideoPath, video, metavar="PATH", **several)
    p.set_defaults(image=[])
    fps, frames = number(0, 1000, open_low=True), whole(2)
    add("--fps", FPS, "frames per second to sample from a video", kind=fps)
    add("--max-frames", MAX_FRAMES, "maximum number of frames of a video", kind=frames)
    add("--system", SYSTEM, "system prompt")
    add("--chat", False, chat)
    add("--session", NAME, session, metavar="FILE")
    add("--list-methods", False, "list the pruning methods and exit")
    for group in options.SHARED:
        options.add_shared(p, group)
    add = adder(p.add_argument_group("many questions"))
    batch = 'one question per line: {"image": path, [paths] or null, "question": text}; "video" too'
    output = "file for the results; questions that it already answers are skipped"
    limit = "maximum number of tokens to prefill at once, and to hold in the cache"
    add("--batch-file", NAME, batch, metavar="JSONL")
    add("--output", NAME, output, metavar="JSONL")
    add("--max-batch-tokens", 8192, limit, kind=COUNT)
    add = adder(p.add_argument_group("output"))
    overlay = "write a picture of the kept visual tokens; .gif and .webp become animations"
    font = "font of the overlay's text (default: one that has its letters is found)"
    add("--overlay", NAME, overlay, metavar="FILE")
    add("--font", NAME, font, metavar="FILE")
    add("--json", False, "print one JSON object instead of text")
    p.add_argument("--version", action="version", version=f"nanoglimpse {VERSION}")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code (`console.run`)."""
    return console.run(
        command,
        parser(),
        arguments,
        interrupted="interrupted before the first token",
        memory="use smaller pictures (--max-pixels), fewer --max-batch-tokens, a smaller model, or "
        "--dtype bfloat16",
    )


def command(args: argparse.Namespace) -> int:
    """Runs the command that the options describe; returns the exit code."""
    if args.list_methods:
        print("\n".join(f"{name:11}  {method.about}" for name, method in METHODS.items()))
        return 0
    if args.batch_file:
        return answer_file(args, options.given(args, parser()))
    if args.output:
        raise UsageError("--output needs a --batch-file")
    if args.session:
        _check_session(args)
    sampling, pruning = options.sampling_of(args), options.pruning_of(args)
    decoding = {"max_new_tokens": args.max_new_tokens, "sampling": sampling}
    _find_question(args)
    _check(args)
    images, question = _task(args)
    engine, prompting = options.load_engine(args), options.prompt_options(args)
    if args.model in EMBEDDED and (args.question or args.image):
        note(args)(KNOWS)
    names: list[Any] = [*images]
    if args.session:
        session = engine.load_session(args.session)
        names = [None] * len(session.prompt.grids)
    elif args.chat:
        session = engine.session(images, pruning, **prompting)
    else:
        stream = engine.stream(images, question, pruning, prompt_options=prompting, **decoding)
        return _answer(args, stream, names, question)
    if args.chat:
        font = Path(args.font) if args.font else None
        chat = Chat(session, names, decoding, note(args), args.json, font)
        return chat.run([question] if question else [])
    return _answer(args, session.stream(question, **decoding), names, question)


def _answer(args: argparse.Namespace, stream: Stream, images: list[Any], question: str) -> int:
    """Prints an answer while it is generated, then its statistics; returns the exit code."""
    code, tell, model = 0, note(args), stream.model
    try:
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt as interruption:
        code = console.exit_code(interruption)
    answer = stream.answer
    names = [None if image is None else image.name for image in images]
    print(json.dumps(as_dict(model, question, names, answer)) if args.json else "", flush=True)
    kept = summary(answer, model.config) if args.session else []
    for line in [*kept, *report(answer)]:
        tell(line)
    if code:
        tell("interrupted: the answer above is incomplete")
    if args.overlay:
        shown = (images, question, answer, model.config, args.font and Path(args.font))
        for line in overlay_lines(args.overlay, save_overlay(Path(args.overlay), *shown)):
            tell(line)
    return code


def _find_question(args: argparse.Namespace) -> None:
    """Takes the question out of the values of --image, where it stands after a picture."""
    groups = [values if isinstance(values, list) else [values] for values in args.image]
    if args.question is None:
        texts = [(group, v) for group in groups for v in group[1:] if not _is_picture(v)]
        if texts:
            group, args.question = texts[-1]
            group.reverse()
            group.remove(args.question)
            group.reverse()
    args.image = [value for group in groups for value in group]


def _is_picture(value: str) -> bool:
    """Whether a value names a picture, and is no question."""
    try:
        return bool(NAMED.match(value)) or Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # as a text that is too long for a name
        return False


def _task(args: argparse.Namespace) -> tuple[list[Source | Video], str]:
    """Pictures, videos and question of the command line, or the built-in ones without any."""
    images: list[Source | Video] = []
    for value in args.image:
        if isinstance(value, VideoPath):
            images.append(Video(source(str(value)), args.fps, args.max_frames))
        else:
            images += sources(value)
    for image in images:
        image.check()
    if args.question or args.chat or args.session:
        return images, args.question
    picture, question = built_in()
    note(args)(f"picture     {picture}")
    note(args)(f"question    {question}")
    return [source(picture)], question


def built_in() -> tuple[Path, str]:
    """The built-in picture and the question about it."""
    example = json.loads((EXAMPLES / "built_in.json").read_text(encoding="utf-8"))
    return EXAMPLES / example["image"], example["question"]


def _check(args: argparse.Namespace) -> None:
    """Finds mistakes that can be seen before anything is fetched or read."""
    missing = not (args.question or args.chat or args.session)
    if missing and (args.question is not None or args.image):
        raise UsageError("a question is needed; put it in quotes after the options")
    if args.chat and "-" in args.image:
        raise UsageError("--image - cannot be combined with --chat, which reads questions there")
    if args.chat and args.overlay:
        raise UsageError("--overlay cannot be combined with --chat; use /overlay FILE in the chat")
    if args.font:
        check_font(Path(args.font))
    if args.overlay:
        check_writable(Path(args.overlay), "overlay", args.image)


def _check_session(args: argparse.Namespace) -> None:
    fixed = {"image", "overlay", *options.prompt_options(args)}
    fixed |= {flag[2:].replace("-", "_") for flag in options.SHARED["pruning"]}
    if wrong := [name for name in options.given(args, parser()) if name in fixed]:
        raise UsageError(
            f"--{wrong[0].replace('_', '-')} cannot be combined with --session, which has its own "
            "pictures, system prompt and pruning"
        )
    if not (args.chat or args.question):
        raise UsageError("--session needs a question or --chat")
    if not Path(args.session).is_file():
        raise UsageError(f"there is no session {args.session}")
