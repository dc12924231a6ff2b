"""`nanoglimpse generate`: a question about pictures, a chat, or the questions of a file.

The answer goes to stdout as it is generated, everything else to stderr.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nanoglimpse.cli import console
from nanoglimpse.cli.batch_file import answer_file
from nanoglimpse.cli.chat import Chat
from nanoglimpse.cli.console import Parser, adder, note
from nanoglimpse.cli.options import (
    SHARED,
    add_shared,
    given,
    load_engine,
    prompt_options,
    pruning_of,
    sampling_of,
)
from nanoglimpse.cli.report import as_dict, report
from nanoglimpse.engine import Engine
from nanoglimpse.errors import UsageError
from nanoglimpse.files import check_writable
from nanoglimpse.inference.overlay import save_overlay
from nanoglimpse.inference.session import QuestionOptions
from nanoglimpse.inputs.images import open_picture
from nanoglimpse.inputs.processor import SYSTEM
from nanoglimpse.inputs.video import FPS, MAX_FRAMES, Video
from nanoglimpse.methods import METHODS
from nanoglimpse.version import VERSION
from nanoglimpse.weights.hub import EMBEDDED

EXAMPLES = EMBEDDED["nano"] / "examples"


class VideoPath(str):
    """A path that was given with --video."""


def parser() -> Parser:
    """All options, each with its default."""
    p = Parser(
        prog="nanoglimpse generate",
        description="Answer a question about pictures with Qwen2.5-VL, pruned by GlimpsePrune. "
        "Without arguments: a built-in question about a built-in picture.",
        quiet=True,
    )
    several = {"action": "append", "dest": "image"}
    video = "an animation (GIF, WebP, APNG) or a folder of frames; may be mixed with --image"
    chat = "continue asking about the same pictures, one question a line; /help lists commands"
    session = "a file written by /save in a chat: encoded pictures and the conversation about them"
    add = adder(p)
    add("question", str, "what to ask", nargs="?")
    add("--image", str, "a picture; may be repeated", metavar="FILE", **several)
    add("--video", VideoPath, video, metavar="PATH", **several)
    p.set_defaults(image=[])
    add("--fps", FPS, "frames of videos a second")
    add("--max-frames", MAX_FRAMES, "upper limit for the frames of a video")
    add("--system", SYSTEM, "system prompt")
    add("--chat", False, chat)
    add("--session", str, session, metavar="FILE")
    add("--list-methods", False, "list the pruning methods and exit")
    for group in SHARED:
        add_shared(p, group)
    add = adder(p.add_argument_group("many questions"))
    batch = 'one question a line: {"image": path, [paths] or null, "question": text}; also "video"'
    output = "file of results; questions that it answers are not asked again"
    add("--batch-file", str, batch, metavar="JSONL")
    add("--output", str, output, metavar="JSONL")
    add("--max-batch-tokens", 8192, "rows to prefill at once, and to hold for answers")
    add = adder(p.add_argument_group("output"))
    overlay = "write a picture of the kept visual tokens; to a .gif or .webp an animation"
    add("--overlay", str, overlay, metavar="PNG")
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
    """Does what the options say; returns the exit code."""
    if args.list_methods:
        print("\n".join(f"{name:11}  {method.about}" for name, method in METHODS.items()))
        return 0
    if args.batch_file:
        return answer_file(args, given(args, parser()))
    if args.output:
        raise UsageError("--output is for the results of a --batch-file; none is given")
    if args.session:
        _check_session(args)
    talks = args.chat or args.session
    sampling, pruning = sampling_of(args), pruning_of(args)
    images, question = (visuals(args), args.question) if talks else _task(args)
    _check(args, images)
    engine = load_engine(args)
    if talks:
        return _talk(args, engine, images)
    stream = engine.stream(
        images,
        question,
        pruning,
        prompt_options=prompt_options(args),
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
    )
    code = 0
    try:
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt as interruption:
        code = console.exit_code(interruption)
    answer, tell = stream.answer, note(args)
    print(json.dumps(as_dict(engine, question, images, answer)) if args.json else "", flush=True)
    for line in report(answer):
        tell(line)
    if code:
        tell("interrupted: the answer above ends where it was stopped")
    if args.overlay:
        save_overlay(Path(args.overlay), images, question, answer, engine.config)
        tell(f"overlay     {args.overlay}")
    return code


def _talk(args: argparse.Namespace, engine: Engine, images: list[str | Video]) -> int:
    """A chat, or one question to a saved session, outside its conversation."""
    names: list[str | Video | None] = [*images]
    if args.session:
        session = engine.load_session(args.session)
        names = [None] * len(session.prompt.grids)
    else:
        session = engine.session(images, pruning_of(args), **prompt_options(args))
    decoding: QuestionOptions = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling_of(args),
    }
    answered = partial(as_dict, engine) if args.json else None
    chat = Chat(session, names, decoding, note(args), report, answered)
    if args.chat:
        return chat.run([args.question] if args.question else [])
    chat.follow_up = False
    try:
        answer = chat.answer(args.question)
    except KeyboardInterrupt as interruption:
        note(args)("interrupted: the answer above ends where it was stopped")
        return console.exit_code(interruption)
    for line in report(answer):
        note(args)(line)
    return 0


def visuals(args: argparse.Namespace) -> list[str | Video]:
    """The pictures and videos, in the order given."""
    clip = partial(Video, fps=args.fps, max_frames=args.max_frames)
    return [clip(str(path)) if isinstance(path, VideoPath) else path for path in args.image]


def _task(args: argparse.Namespace) -> tuple[list[str | Video], str]:
    """Pictures, videos and question: the given ones, or else the built-in ones."""
    if args.question is not None or args.image:
        if not args.question:
            raise UsageError("a question is needed; put it in quotes after the options")
        return visuals(args), args.question
    picture, question = built_in()
    note(args)(f"picture     {picture}")
    note(args)(f"question    {question}")
    return [str(picture)], question


def built_in() -> tuple[Path, str]:
    """The built-in picture and the question about it."""
    example = json.loads((EXAMPLES / "built_in.json").read_text(encoding="utf-8"))
    return EXAMPLES / example["image"], example["question"]


def _check(args: argparse.Namespace, images: list[str | Video]) -> None:
    """Finds mistakes that show before gigabytes of weights are read."""
    for image in images:
        image.check() if isinstance(image, Video) else open_picture(image).close()
    if args.chat and args.overlay:
        raise UsageError("a chat has many answers; write /overlay FILE after the one you want")
    if args.overlay:
        check_writable(Path(args.overlay), "overlay")


def _check_session(args: argparse.Namespace) -> None:
    fixed = {"image", "overlay", *prompt_options(args)}
    fixed |= {flag[2:].replace("-", "_") for flag in SHARED["pruning"]}
    if wrong := [name for name in given(args, parser()) if name in fixed]:
        raise UsageError(
            f"a --session has its own pictures, prompt and pruning; it goes without "
            f"--{wrong[0].replace('_', '-')}"
        )
    if not (args.chat or args.question):
        raise UsageError("a --session needs a question, or --chat for many")
    if not Path(args.session).is_file():
        raise UsageError(f"there is no session {args.session}")
