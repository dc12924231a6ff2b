"""Command line: `python -m nanoglimpse.generate "What does the sign say?" --image street.jpg`.

The answer goes to stdout as it is made, everything else to stderr. `--batch-file` asks the
questions of a file instead, many at a time.
"""

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from . import __version__
from .batchfile import Counter, Results, read_questions
from .chat import Chat
from .engine import Engine, find_method, load
from .errors import NanoglimpseError, UsageError
from .files import check_writable
from .kernels.quantized import KINDS as QUANTIZED
from .methods import METHODS
from .overlay import save_overlay
from .processor import SYSTEM, open_picture
from .reading import KV_DROPS
from .results import Answer
from .sampling import Sampling
from .video import FPS, MAX_FRAMES, Video
from .weights import EMBEDDED

EXAMPLES = EMBEDDED["nano"] / "examples"


class Clip(str):
    """A path that was given as a video's."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        """Prints the line and ends the program with exit code 2."""
        print(f"nanoglimpse: error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def parser() -> Parser:
    """All options, each with its default."""
    p = Parser(
        prog="python -m nanoglimpse.generate",
        description="Answer a question about pictures with Qwen2.5-VL, pruned by GlimpsePrune. "
        "Without arguments: a built-in question about a built-in picture.",
    )
    p.add_argument("question", nargs="?", help="what to ask")
    p.add_argument(
        "--chat",
        action="store_true",
        help="go on asking about the same pictures, a question a line; /help there",
    )
    p.add_argument(
        "--session",
        metavar="FILE",
        help="pictures read before, with their conversation: what /save of a chat has written",
    )
    for add in (_add_prompt, _add_pruning, _add_answer, _add_batch, _add_running):
        add(p)
    p.add_argument("--version", action="version", version=f"nanoglimpse {__version__}")
    return p


def _add_prompt(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated"
    )
    p.add_argument(
        "--video",
        action="append",
        dest="image",
        type=Clip,
        metavar="PATH",
        help="an animation (GIF, WebP, APNG) or a folder of frames; may be repeated, in any order "
        "with --image",
    )
    p.add_argument(
        "--fps", type=float, default=FPS, help=f"frames of videos a second (default: {FPS:g})"
    )
    p.add_argument(
        "--max-frames", type=int, default=MAX_FRAMES, help=f"of a video (default: {MAX_FRAMES})"
    )
    p.add_argument("--model", default="nano", help="'nano', a folder or a Hub id (default: nano)")
    p.add_argument("--glimpse", help="folder or Hub id of glimpse weights (default: MODEL/glimpse)")
    p.add_argument("--adapter", help="folder or Hub id of a LoRA adapter to merge (PEFT layout)")
    p.add_argument("--system", default=SYSTEM, help=f"system prompt (default: {SYSTEM})")
    p.add_argument("--min-pixels", type=int, help="enlarge smaller ones (default: model's)")
    p.add_argument(
        "--max-pixels", type=int, help="shrink larger pictures, or frames (default: model's)"
    )


def _add_pruning(p: argparse.ArgumentParser) -> None:
    prune = p.add_argument_group("pruning")
    prune.add_argument(
        "--method", help="see --list-methods (default: glimpse where there are weights for it)"
    )
    prune.add_argument("--list-methods", action="store_true", help="a line each, and stop")
    prune.add_argument("--threshold", type=float, help="keep above it (default: the weights' own)")
    prune.add_argument("--max-ratio", type=float, help="keep at most this share (default: no cap)")
    prune.add_argument(
        "--kv-drop",
        choices=KV_DROPS,
        default="all",
        help="what is dropped leaves the cache of all layers, or of later ones (default: all)",
    )
    prune.add_argument("--keep-videos", action="store_true", help="prune images alone")
    prune.add_argument(
        "--max-frame-ratio",
        type=float,
        help="keep at most this share of each pair of a video's frames (default: no cap)",
    )
    prune.add_argument("--min-tokens", type=int, help="keep at least so many (default: 1)")


def _add_answer(p: argparse.ArgumentParser) -> None:
    text = p.add_argument_group("answer")
    text.add_argument("--max-new-tokens", type=int, default=128, help="(default: 128)")
    text.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    text.add_argument("--top-p", type=float, default=1.0, help="(default: 1)")
    text.add_argument("--top-k", type=int, default=0, help="0 is all (default: 0)")
    text.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: 1)")
    text.add_argument("--seed", type=int, help="makes sampling repeatable")


def _add_batch(p: argparse.ArgumentParser) -> None:
    batch = p.add_argument_group("many questions")
    batch.add_argument(
        "--batch-file",
        metavar="JSONL",
        help='a line each: {"image": path, [paths] or null, "question": text}; also "video"',
    )
    batch.add_argument(
        "--output", metavar="JSONL", help="where results go; what is there is not asked again"
    )
    batch.add_argument(
        "--max-batch-tokens",
        type=int,
        default=8192,
        help="rows read at once, and held for answers (default: 8192)",
    )


def _add_running(p: argparse.ArgumentParser) -> None:
    run = p.add_argument_group("running")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    run.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)"
    )
    run.add_argument("--quantize", choices=QUANTIZED, help="weights of the decoder in few bits")
    run.add_argument(
        "--fold-pixels",
        action="store_true",
        help="normalise pixels inside the patch embedding: exact to rounding, and faster",
    )
    run.add_argument("--backend", default="auto", help="of the kernels: auto, torch or triton")
    run.add_argument(
        "--overlay",
        metavar="PNG",
        help="write a picture of what was kept; to a .gif or .webp an animation",
    )
    run.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    run.add_argument("--quiet", action="store_true", help="no progress, no statistics")
    run.add_argument("--debug", action="store_true", help="show the traceback of an error")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; its exit code: 2 for misuse, 1 for failure, 130 if stopped."""
    args = parser().parse_args(arguments)
    if args.list_methods:
        print("\n".join(f"{name:11}  {method.about}" for name, method in METHODS.items()))
        return 0
    try:
        return run_file(args) if args.batch_file else run(args)
    except NanoglimpseError as error:
        return _fail(str(error), error.exit_code, args.debug)
    except KeyboardInterrupt:
        return _fail("interrupted before the first token", 130, args.debug)
    except BrokenPipeError:
        # The reader of our output has left; closing stdout now would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _fail(_out_of_memory(args, str(error)), 1, args.debug)
    except Exception as error:
        first = str(error).partition("\n")[0]
        if "can't allocate memory" in str(error):
            return _fail(_out_of_memory(args, first), 1, args.debug)
        return _fail(f"{type(error).__name__}: {first} (--debug shows where)", 1, args.debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"nanoglimpse: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _out_of_memory(args: argparse.Namespace, reason: str) -> str:
    detail = reason.partition("\n")[0].partition(". ")[0]
    return (
        f"not enough memory for {args.model} ({detail or 'allocation failed'}); use smaller "
        "pictures (--max-pixels), fewer --max-batch-tokens, a smaller model, or --dtype bfloat16"
    )


def run(args: argparse.Namespace) -> int:
    """Loads, asks, prints. Raises what `main` turns into lines."""
    if args.output:
        raise UsageError("--output is where the results of a --batch-file go; none is given")
    sampling, talks = _sampling(args), args.chat or args.session
    images, question = (_pictures(args), args.question) if talks else _task(args)
    _check_early(args, images)
    note = _note(args)
    engine = _load(args)
    decoding = {"max_new_tokens": args.max_new_tokens, "sampling": sampling}
    if talks:
        return _talk(args, engine, images, decoding)
    reading = {"prompt_options": _prompt_options(args), **_prefill_options(args)}
    stream = engine.stream(images, question, **reading, **decoding)
    interrupted = False
    try:
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    answer = stream.answer
    names = [visual.name if isinstance(visual, Video) else visual for visual in images]
    print(json.dumps(as_dict(engine, question, names, answer)) if args.json else "", flush=True)
    for line in report(answer):
        note(line)
    if interrupted:
        note("interrupted: the answer above ends where it was stopped")
    if args.overlay:
        save_overlay(Path(args.overlay), images, question, answer, engine.config)
        note(f"overlay     {args.overlay}")
    return 130 if interrupted else 0


def _talk(
    args: argparse.Namespace, engine: Engine, images: list[str | Video], decoding: dict
) -> int:
    """A chat, or one question to a saved session, outside its conversation."""
    if args.session:
        session = engine.load_session(args.session)
        images = [None] * len(session.prompt.grids)
    else:
        session = engine.session(images, **_prompt_options(args), **_prefill_options(args))
    answered, note = partial(as_dict, engine) if args.json else None, _note(args)
    chat = Chat(session, images, decoding, note, report, answered)
    if args.chat:
        return chat.run([args.question] if args.question else [])
    chat.follow_up = False
    try:
        chat.answer(args.question)
    except KeyboardInterrupt:
        note("interrupted: the answer above ends where it was stopped")
        return 130
    for line in report(chat.last[2]):
        note(line)
    return 0


def run_file(args: argparse.Namespace) -> int:
    """Asks the questions of a file; 1 if any failed. Raises what `main` turns into lines."""
    if args.question is not None or args.image or args.overlay or args.chat or args.session:
        raise UsageError(
            "a --batch-file names questions and pictures itself; it goes without --overlay, "
            "--chat and --session"
        )
    _check_method(args)
    sampling, output = _sampling(args), Path(args.output) if args.output else None
    if output:
        check_writable(output, "results")
    questions = read_questions(Path(args.batch_file))
    results = Results(output, questions, _settings(args))
    if results.left:
        try:
            _ask_all(args, results, sampling)
        except KeyboardInterrupt:
            again = "; the same command goes on from there" if output else ""
            done = f"interrupted: {results.done} of {results.total} questions answered{again}"
            return _fail(done, 130, args.debug)
    _note(args)(f"questions   {results.done} of {results.total}")
    if results.failed:
        raise NanoglimpseError(
            f"{results.failed} of {results.total} questions failed; their lines say why"
        )
    return 0


def _ask_all(args: argparse.Namespace, results: Results, sampling: Sampling) -> None:
    items = [(q.visuals(args.fps, args.max_frames), q.text) for q in results.left]
    engine, note, count = _load(args), _note(args), Counter(results)
    answers = engine.answers(
        items,
        max_batch_tokens=args.max_batch_tokens,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        prompt_options=_prompt_options(args),
        **_prefill_options(args),
    )
    for number, answer in answers:
        question = results.left[number]
        if isinstance(answer, NanoglimpseError):
            results.add(question, {"error": str(answer)})
            note(f"question {question.index}: {answer}")
        else:
            results.add(question, as_dict(engine, question.text, question.names, answer))
        if not args.quiet:
            count()


def _settings(args: argparse.Namespace) -> dict:
    """Options given that an answer depends on; all but those that say where things go."""
    defaults = vars(parser().parse_args([]))
    apart = {"batch_file", "output", "max_batch_tokens", "json", "quiet", "debug"}
    return {k: v for k, v in vars(args).items() if k not in apart and v != defaults[k]}


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed)


def _prompt_options(args: argparse.Namespace) -> dict:
    return {
        "system": args.system,
        "min_pixels": args.min_pixels,
        "max_pixels": args.max_pixels,
    }


def _prefill_options(args: argparse.Namespace) -> dict:
    return {
        "method": args.method,
        "kv_drop": args.kv_drop,
        "threshold": args.threshold,
        "max_ratio": args.max_ratio,
        "max_frame_ratio": args.max_frame_ratio,
        "min_tokens": args.min_tokens,
        "prune_videos": not args.keep_videos,
    }


def _note(args: argparse.Namespace) -> Callable[[str], None]:
    return (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))


def _load(args: argparse.Namespace) -> Engine:
    started = time.perf_counter()
    engine = load(
        args.model,
        glimpse=args.glimpse,
        adapter=args.adapter,
        device=args.device,
        dtype=args.dtype,
        backend=args.backend,
        quantize=args.quantize,
        fold_pixels=args.fold_pixels,
        progress=(lambda done, total: None) if args.quiet else Progress(args.model),
    )
    took = time.perf_counter() - started
    _note(args)(f"model       {_describe(engine)}, loaded in {took:.1f} s")
    return engine


def _pictures(args: argparse.Namespace) -> list[str | Video]:
    clip = partial(Video, fps=args.fps, max_frames=args.max_frames)
    return [clip(str(path)) if isinstance(path, Clip) else path for path in args.image]


def _task(args: argparse.Namespace) -> tuple[list[str | Video], str]:
    """Pictures, videos and question: those given, or the built-in ones if none is."""
    if args.question is not None or args.image:
        if not args.question:
            raise UsageError("a question is needed; put it in quotes behind the options")
        return _pictures(args), args.question
    picture, question = built_in()
    if not args.quiet:
        print(f"picture     {picture}", file=sys.stderr)
        print(f"question    {question}", file=sys.stderr)
    return [str(picture)], question


def built_in() -> tuple[Path, str]:
    """The picture and the question that stand in where none is given."""
    said = json.loads((EXAMPLES / "built_in.json").read_text(encoding="utf-8"))
    return EXAMPLES / said["image"], said["question"]


def _check_early(args: argparse.Namespace, images: list[str | Video]) -> None:
    """What can be seen to be wrong before gigabytes of weights are read."""
    for image in images:
        image.check() if isinstance(image, Video) else open_picture(image).close()
    if args.session:
        _check_session(args)
    _check_method(args)
    if args.chat and args.overlay:
        raise UsageError("a chat has many answers; write /overlay FILE behind the one you want")
    if args.overlay:
        check_writable(Path(args.overlay), "overlay")


def _check_session(args: argparse.Namespace) -> None:
    given, fixed = _settings(args), {"image", "overlay", *_prompt_options(args)}
    fixed |= {"keep_videos", *_prefill_options(args)}
    if wrong := [name for name in given if name in fixed]:
        raise UsageError(
            f"a --session has its own pictures, prompt and pruning; it goes without "
            f"--{wrong[0].replace('_', '-')}"
        )
    if not (args.chat or args.question):
        raise UsageError("a --session needs a question, or --chat for many")
    if not Path(args.session).is_file():
        raise UsageError(f"there is no session {args.session}")


def _check_method(args: argparse.Namespace) -> None:
    if args.method is not None:
        find_method(args.method, args.max_ratio, args.max_frame_ratio)


class Progress:
    """One line on stderr that counts bytes of weights; on a terminal it is rewritten."""

    def __init__(self, name: str):
        self.name, self.shown = name, 0.0

    def __call__(self, done: int, total: int) -> None:
        """Shows how far loading is."""
        now = time.perf_counter()
        if not sys.stderr.isatty() or (done < total and now - self.shown < 0.1):
            return
        self.shown = now
        line = f"\rweights     {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        print(line, end="\r\033[K" if done >= total else "", file=sys.stderr, flush=True)


def _describe(engine: Engine) -> str:
    weights = [p for m in (engine.vision, engine.decoder) for p in m.parameters()]
    where = f"{str(engine.dtype)[6:]} on {engine.device}"
    if engine.quantized:
        size = _bytes(sum(p.numel() * p.element_size() for p in weights))
        return f"{engine.name}, {size} of weights, {engine.quantized} in the decoder, {where}"
    count = sum(p.numel() for p in weights)
    size = f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
    return f"{engine.name}, {size} parameters, {where}"


def report(answer: Answer) -> list[str]:
    """The statistics of an answer, a line each."""
    s, b = answer.stats, answer.stats.budgets
    share = f" ({s.kept_tokens / s.visual_tokens:.1%})" if s.visual_tokens else ""
    stages = " + ".join(f"{name} {ms:.1f}" for name, ms in s.timings.items())
    lines = [
        f"visual      {s.visual_tokens} tokens, {s.kept_tokens} kept{share}, method {s.method}",
        f"budgets     input {b.input_ratio:.1%}, prefill {b.prefill_ratio:.1%}, "
        f"decode KV {b.decode_kv_ratio:.1%} of the visual tokens",
        f"KV cache    {s.kv_rows[0]} rows, {_bytes(s.kv_bytes[0])} without pruning; "
        f"{s.kv_rows[1]} rows, {_bytes(s.kv_bytes[1])} with",
        f"first token {s.first_token:.1f} ms ({stages})",
        f"decode      {len(answer.token_ids)} tokens, {s.decode:.2f} ms a token, "
        f"ended by {answer.finish_reason}",
    ]
    if s.peak_bytes:
        lines.append(f"peak memory {_bytes(s.peak_bytes)}")
    return lines


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def as_dict(engine: Engine, question: str, images: list[str | None], answer: Answer) -> dict:
    """What `--json` prints."""
    stats = asdict(answer.stats)
    return {
        "answer": answer.text,
        "question": question,
        "images": images,
        "tokens": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "visual_tokens": stats.pop("visual_tokens"),
        "kept_tokens": stats.pop("kept_tokens"),
        "kept": answer.kept.nonzero().flatten().tolist(),
        "grids": answer.grids,
        **stats,
        "versions": {
            "nanoglimpse": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "model": engine.name,
            "device": str(engine.device),
            "dtype": str(engine.dtype)[6:],
            "quantize": engine.quantized,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
