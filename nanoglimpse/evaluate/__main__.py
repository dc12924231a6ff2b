"""Command line: `python -m nanoglimpse.evaluate --methods glimpse fastv --ratios none 0.111`.

Asks questions, a line of a JSONL for every answer, written as it comes; the same command goes on
where it was stopped. `… report FILE …` makes tables and a page of such files, `… judge FILE` lets a
language model grade them.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .. import __version__
from ..engine import ADAPTER_FILES, GLIMPSE_FILES, MODEL_FILES, Engine, load
from ..errors import NanoglimpseError, UsageError
from ..files import write_whole
from ..generate import Parser, Progress
from ..methods import METHODS
from ..reading import KV_DROPS
from ..weights import locate
from ..world import DOMAINS, QUESTION_KINDS, SPLITS
from .answers import MAX_NEW_TOKENS, Lot, answer, batches, thumbnail
from .arms import Arm, check, combine
from .figures import SCORES, best_score, read_runs, runs_of
from .judge import KEY, Judge, grade
from .page import page
from .questions import Files, Item, Source, World
from .shards import Shards, device
from .store import Results
from .tables import as_csv, document, progress_table

WORLD_COUNT = 1000
NAMED = 10
MEBIBYTE = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS.get(words[0] if words else "")
    # Every process of torchrun meets the same misuse; one of them says so.
    shards = Shards()
    try:
        return command(words[1:]) if command else evaluate(words, shards)
    except NanoglimpseError as error:
        if shards.rank == 0 or not isinstance(error, UsageError):
            print(f"nanoglimpse: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        print(
            "nanoglimpse: error: not enough memory for a batch; use a smaller --batch or "
            "--max-pixels and repeat the command: it goes on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nstopped; with --out the same command goes on", file=sys.stderr)
        return 130
    finally:
        shards.close()


def _is_about_memory(error: Exception) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def evaluate(arguments: Sequence[str], shards: Shards) -> int:
    """Asks what has not been asked yet, has it graded if there is a judge, and prints a table."""
    args = _parser().parse_args(arguments)
    quiet = args.quiet or shards.rank > 0
    forms = {"no": [False], "yes": [True], "both": [False, True]}[args.brief]
    arms = combine(args.methods, args.ratios, forms, args.kv_drop)
    judge = _judge(args) if args.judge_url else None
    source = _source(args)
    engine = load(
        args.model,
        glimpse=args.glimpse,
        adapter=args.adapter,
        device=device(args.device),
        dtype=args.dtype,
        backend=args.backend,
        progress=(lambda done, total: None) if quiet else Progress(args.model),
    )
    check(engine, arms)
    results, done = _resume(args, engine, source, shards)
    if source.missing and not quiet:
        print(_lost(source.missing), file=sys.stderr)
    show = _Counter(f"{len(arms)} ways, answers", len(arms) * source.total, quiet)
    _run(engine, arms, source, results, done, args, shards, show)
    if shards.rank == 0:
        if judge:
            _grade(results, judge, args)
        asked = {arm.name for arm in arms}
        shown = [run for run in runs_of(results) if run.name in asked]
        print(progress_table(shown, source.groups))
    return 0


def _resume(
    args: argparse.Namespace, engine: Engine, source: Source, shards: Shards
) -> tuple[Results | None, set]:
    """The results in process 0, and what stands there in all of them."""
    results, state = None, None
    if shards.rank == 0:
        try:
            results = Results.resume(args.out, _options(args, engine, source))
            if source.missing != results.missing:
                results.add([{"missing": list(source.missing)}])
            state = results.done
        except NanoglimpseError as error:
            state = error
    state = shards.share(state)
    if isinstance(state, NanoglimpseError):
        # Process 0 says what is wrong; the others only end.
        raise state if shards.rank == 0 else SystemExit(state.exit_code)
    return results, state


def _options(args: argparse.Namespace, engine: Engine, source: Source) -> dict:
    """What all results of a file have in common; a run with other options is another file's."""
    weights = [("model", args.model, MODEL_FILES), ("glimpse", args.glimpse, GLIMPSE_FILES)]
    weights.append(("adapter", args.adapter, ADAPTER_FILES))
    return {
        **{name: str(where) for name, where, _ in weights if where},
        "weights": "".join(_fingerprint(locate(w, files)) for _, w, files in weights if w),
        "dtype": str(engine.dtype)[6:],
        "data": source.identity,
        "max_new_tokens": args.max_new_tokens,
        "min_pixels": args.min_pixels,
        "max_pixels": args.max_pixels,
        "nanoglimpse": __version__,
    }


def _fingerprint(folder: Path) -> str:
    """Of the files of weights: names, sizes and the first mebibyte of each."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".safetensors", ".pt") or path.name == "config.json":
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
                digest.update(file.read(MEBIBYTE))
    return digest.hexdigest()[:12]


def _lost(missing: Sequence[str]) -> str:
    names = list(dict.fromkeys(missing))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"{len(names)} pictures are missing, {len(missing)} questions left out: "
        f"{', '.join(names[:NAMED])}{more}"
    )


class _Counter:
    """One line on stderr that counts questions."""

    def __init__(self, what: str, total: int, quiet: bool):
        self.what, self.total, self.quiet = what, total, quiet

    def __call__(self, done: int, total: int | None = None) -> None:
        if not self.quiet:
            total = total or self.total
            end = "\n" if done == total else ""
            print(f"\r{self.what}, {done} of {total}", end=end, file=sys.stderr, flush=True)


def _run(
    engine: Engine,
    arms: Sequence[Arm],
    source: Source,
    results: Results | None,
    done: set,
    args: argparse.Namespace,
    shards: Shards,
    show: Callable[[int], None],
) -> None:
    """Asks batch after batch in every way, the processes one batch each at a time.

    A batch that was partly answered before is asked for what is left of it.
    """
    names = {arm.name for arm in arms}
    count = sum(name in names for name, _ in done)
    show(count)
    options = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    for round_ in _rounds(source, arms, args.batch, shards.count):
        lots: dict[tuple, Lot] = {}
        shown: dict[tuple, dict] = {}
        for arm in arms:
            left = [
                [item for item in forms[arm.brief] if (arm.name, item.name) not in done]
                for forms in round_
            ]
            if not any(left):
                continue
            own, records = left[shards.rank] if shards.rank < len(left) else [], []
            if own:
                whose = tuple(item.name for item in own)
                if (lot := lots.get((arm.brief, whose))) is None:
                    same = shown.setdefault(whose, {})
                    lot = Lot(engine, own, shown=same, prompt_options=options)
                    lots[arm.brief, whose] = lot
                records = answer(lot, arm, max_new_tokens=args.max_new_tokens, gallery=args.gallery)
            records = shards.gather([*_pictures(own, args.gallery), *records])
            count += sum(map(len, left))
            if results:
                results.add([r for r in records if r.get("picture") not in results.pictures])
            show(count)


def _rounds(
    source: Source, arms: Sequence[Arm], size: int, processes: int
) -> Iterator[list[dict[bool, list[Item]]]]:
    """A batch for each process, in each form of prompt that is asked for."""
    forms = sorted({arm.brief for arm in arms})
    every = zip(*(batches(source.items(form), size) for form in forms), strict=True)
    yield from batches((dict(zip(forms, batch, strict=True)) for batch in every), processes)


def _pictures(items: Sequence[Item], gallery: int) -> list[dict]:
    shown = [item for item in items if item.number < gallery]
    return [{"picture": item.name, "uri": thumbnail(item)} for item in shown]


def _source(args: argparse.Namespace) -> Source:
    if args.count is not None and args.count < 1:
        raise UsageError(f"--count {args.count} must be at least 1")
    if args.batch < 1:
        raise UsageError(f"--batch {args.batch} must be at least 1")
    if args.data == ["world"]:
        seed = SPLITS[args.split].start if args.seed is None else args.seed
        count = WORLD_COUNT if args.count is None else args.count
        return World(seed, args.domains, count, args.kinds)
    if args.kinds:
        raise UsageError("--kinds are of the world's questions; files have none")
    return Files([Path(path) for path in args.data], args.images, args.count)


def _judge(args: argparse.Namespace) -> Judge:
    if not args.judge_model:
        raise UsageError("--judge-url needs --judge-model, the name of a model there")
    if args.judge_workers < 1:
        raise UsageError(f"--judge-workers {args.judge_workers} must be at least 1")
    return Judge(args.judge_url, args.judge_model, args.judge_temperature)


def _grade(results: Results, judge: Judge, args: argparse.Namespace) -> None:
    grade(results, judge, args.judge_workers, _Counter(f"judge {judge.name}", 0, args.quiet))


def judge_file(arguments: Sequence[str]) -> int:
    """`judge FILE`: grades what is not graded yet."""
    parser = Parser(prog="python -m nanoglimpse.evaluate judge", description=judge_file.__doc__)
    parser.add_argument("file", type=Path, help="JSONL of results; verdicts are added to it")
    _judge_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(arguments)
    if not args.judge_url:
        raise UsageError("--judge-url is needed, for example http://localhost:8000/v1")
    judge = _judge(args)
    results = Results.resume(args.file, Results.read(args.file).options)
    _grade(results, judge, args)
    groups = list(dict.fromkeys(row["group"] for row in results.rows))
    print(progress_table(runs_of(results), groups))
    return 0


def report(arguments: Sequence[str]) -> int:
    """`report FILE …`: tables in Markdown, a CSV of every figure, a page to look at."""
    parser = Parser(prog="python -m nanoglimpse.evaluate report", description=report.__doc__)
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="JSONL of results")
    add("--csv", type=Path, metavar="FILE", help="every figure with its interval")
    add("--html", type=Path, metavar="FILE", help="a page with table, charts and gallery")
    add("--score", choices=[m.key for m in SCORES], help="(default: the judge's, else contains)")
    args = parser.parse_args(arguments)
    runs, files = read_runs(args.files)
    score = args.score or best_score(runs)
    if not any(run.get(score) for run in runs):
        raise UsageError(f"nothing has been scored by {score}; see the command judge")
    notes = [
        note for path, file in zip(args.files, files, strict=True) for note in _notes(path, file)
    ]
    if args.csv:
        write_whole(args.csv, as_csv(runs).encode())
    if args.html:
        write_whole(args.html, page(runs, files, score, notes).encode())
    print(document(runs, score, notes), end="")
    return 0


def _notes(path: Path, results: Results) -> list[str]:
    """What a reader has to know of a file."""
    o = results.options
    data = ", ".join(f"{name} {_listed(what)}" for name, what in o.get("data", {}).items())
    notes = [f"{path.name}: {o.get('model')}, {o.get('dtype')}, {data}."]
    if results.missing:
        notes.append(f"{path.name}: {_lost(results.missing)}.")
    verdicts = list(results.verdicts.values())
    if verdicts:
        lost = sum(not verdict["understood"] for verdict in verdicts)
        notes.append(
            f"{path.name}: {len(verdicts)} answers graded by {verdicts[0]['verdict']}; {lost} "
            "verdicts held no score and count as 0."
        )
    return notes


def _listed(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _parser() -> Parser:
    parser = Parser(prog="python -m nanoglimpse.evaluate", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--model", default="nano", help="nano, a folder or a Hub id (default: nano)")
    add("--glimpse", help="glimpse weights, if they are elsewhere")
    add("--adapter", help="a LoRA adapter to merge (PEFT layout)")
    add(
        "--data",
        nargs="+",
        default=["world"],
        help="world, or files: .json in the layout of VisCoT's benchmark, .jsonl with image, "
        "question, answer and boxes (default: world)",
    )
    add("--images", type=Path, help="folder of the files' pictures (default: a file's own)")
    seed = parser.add_mutually_exclusive_group()
    seed.add_argument("--split", choices=tuple(SPLITS), default="heldout", help="of the world")
    seed.add_argument("--seed", type=int, help="of the world, instead of a split's first")
    add("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="of the world (all)")
    kinds = [kind for domain in DOMAINS for kind in QUESTION_KINDS[domain]]
    add("--kinds", nargs="+", choices=kinds, help="of the world's questions (all)")
    add("--count", type=int, help=f"of each group (default: {WORLD_COUNT} of a domain, all else)")
    add("--methods", nargs="+", default=["dense", "glimpse"], metavar="METHOD", help=_names())
    add("--ratios", nargs="+", default=["none"], metavar="RATIO", help="caps; none for no cap")
    add("--kv-drop", choices=KV_DROPS, default="all", help="from which caches (default: all)")
    add("--brief", choices=("no", "yes", "both"), default="no", help="ask for one word (no)")
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="(64; paper 1024)")
    add("--min-pixels", type=int, help="enlarge smaller pictures (default: model's)")
    add("--max-pixels", type=int, help="shrink larger pictures (default: model's)")
    add("--batch", type=int, default=8, help="questions at a time (8; 1 to measure times)")
    add("--out", type=Path, help="JSONL of results; a run goes on where it ends")
    add("--gallery", type=int, default=0, metavar="N", help="keep what N questions a group saw")
    _judge_options(parser)
    add("--device", default="auto", help="(default: cuda where there is one)")
    add("--dtype", default="auto", help="(default: auto)")
    add("--backend", default="auto", help="of the kernels: auto, torch or triton")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _judge_options(parser: Parser) -> None:
    add = parser.add_argument_group("judge").add_argument
    add("--judge-url", metavar="URL", help=f"of an OpenAI-compatible endpoint; key in ${KEY}")
    add("--judge-model", metavar="NAME", help="a model there")
    add("--judge-temperature", type=float, default=0.0, help="(default: 0; paper 0.7)")
    add("--judge-workers", type=int, default=4, help="requests at a time (default: 4)")


def _names() -> str:
    return f"all, or of {', '.join(METHODS)} (default: dense glimpse)"


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"report": report, "judge": judge_file}


if __name__ == "__main__":
    sys.exit(main())
