"""Command line: `nanoglimpse evaluate --methods glimpse fastv --ratios none 0.111`.

Answers questions and appends every result to a file of JSON lines; an interrupted run continues
with the same command. `… report FILE …` turns such files into tables and a page, and `… judge FILE`
has a language model grade the answers.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

from nanoglimpse.cli import console
from nanoglimpse.cli.console import Parser, Progress, adder, note
from nanoglimpse.cli.kinds import COUNT, FILE, NAME, NATURAL, RATIO, SEED, WEIGHT, whole
from nanoglimpse.cli.options import add_shared, load_engine
from nanoglimpse.distributed import ProcessGroup, is_first, local_device
from nanoglimpse.engine import Engine
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.evaluate.figures import (
    SCORES,
    Variants,
    best_score,
    caveats,
    comparable,
    read_variants,
    variant_results,
)
from nanoglimpse.evaluate.judge import KEY, Judge, grade
from nanoglimpse.evaluate.page import page
from nanoglimpse.evaluate.questions import FileQuestions, QuestionSource, WorldQuestions
from nanoglimpse.evaluate.run import MAX_NEW_TOKENS, QuestionBatch, answer_batch, pictures, rounds
from nanoglimpse.evaluate.store import ResultsFile
from nanoglimpse.evaluate.tables import as_csv, document, progress_table
from nanoglimpse.evaluate.variants import Variant, check_variants, combine
from nanoglimpse.files import locked, refuse_inputs, write_whole
from nanoglimpse.methods import METHODS
from nanoglimpse.version import VERSION
from nanoglimpse.weights.fingerprint import fingerprint
from nanoglimpse.world import DOMAINS, QUESTION_KINDS, SPLITS

WORLD_COUNT = 1000
NAMED = 10
# Those of the shared options of a model that a comparison has.
MODEL = ("--model", "--glimpse", "--adapter", "--device", "--dtype", "--backend", "--offline")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code (`console.run`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        command, make = COMMANDS[words[0]]
        return console.run(command, make(), words[1:])
    return console.run(
        _with_peers,
        _parser(),
        words,
        interrupted="interrupted; with --out the same command continues",
        memory="continue with a smaller --batch or --max-pixels",
        # Every process meets the same error of usage.
        report=is_first,
    )


def _with_peers(args: argparse.Namespace) -> int:
    group = ProcessGroup()
    try:
        return evaluate(group, args)
    finally:
        group.close(wait=False)


def evaluate(group: ProcessGroup, args: argparse.Namespace) -> int:
    """Answers the questions that have no result yet, has a judge grade them, and prints a table."""
    args.quiet = args.quiet or group.rank > 0
    forms = {"no": [False], "yes": [True], "both": [False, True]}[args.brief]
    variants = combine(args.methods, args.ratios, forms, args.kv_drop)
    judge = _judge(args) if args.judge_url else None
    source = _source(args)
    if not source.has_boxes and any(variant.method == "oracle" for variant in variants):
        raise UsageError(
            "method oracle keeps what the questions' boxes mark, but no question of --data has "
            "boxes; leave oracle out, or add boxes"
        )
    engine = load_engine(args, device=local_device(args.device))
    check_variants(engine, variants)
    with ExitStack() as held:
        results, done = _resume(args, engine, source, group, held)
        if source.missing:
            note(args)(_missing_note(source.missing))
        _run(engine, variants, source, results, done, args, group)
        if results:
            for line in _gaps(results):
                note(args)(line)
            if judge:
                _grade(results, judge, args)
            names = {variant.name for variant in variants}
            shown = [one for one in variant_results(results) if one.name in names]
            _show(shown, source.groups, note(args))
    return 0


def _show(variants: Variants, groups: Sequence[str], say: Callable[[str], None]) -> None:
    """Prints a table of the variants, and says what it leaves out."""
    try:
        shown, gaps = comparable(variants, "contains")
    except UsageError as error:
        say(str(error))
        return
    print(progress_table(shown, groups))
    for line in [*gaps, *caveats(shown)]:
        say(line)


def _resume(
    args: argparse.Namespace,
    engine: Engine,
    source: QuestionSource,
    group: ProcessGroup,
    held: ExitStack,
) -> tuple[ResultsFile | None, set]:
    """Opens the results in process 0 and tells every process which of them exist.

    `held` gets the lock of their file.
    """
    results: ResultsFile | None = None
    state: set | NanoglimpseError = set()
    if group.rank == 0:
        try:
            if args.out:
                held.enter_context(locked(args.out))
            results = ResultsFile.resume(args.out, _options(args, engine, source))
            if source.missing != results.missing:
                results.add([{"missing": list(source.missing)}])
            state = set(results.done)
        except NanoglimpseError as error:
            state = error
    state = group.share(state)
    if isinstance(state, NanoglimpseError):
        # Process 0 reports the error; the others exit silently.
        raise state if group.rank == 0 else SystemExit(state.exit_code)
    return results, state


def _options(args: argparse.Namespace, engine: Engine, source: QuestionSource) -> dict:
    """The options that all results of a file have in common."""
    named = {name: getattr(args, name) for name in ("model", "glimpse", "adapter")}
    return {
        **{name: str(where) for name, where in named.items() if where},
        "weights": fingerprint(engine.model)[:12],
        "dtype": str(engine.dtype)[6:],
        "data": source.identity,
        "max_new_tokens": args.max_new_tokens,
        "min_pixels": args.min_pixels,
        "max_pixels": args.max_pixels,
        "nanoglimpse": VERSION,
    }


def _missing_note(missing: Sequence[str]) -> str:
    names = list(dict.fromkeys(missing))
    left_out = f"{len(names)} pictures are missing, {len(missing)} questions are left out"
    return f"{left_out}: {_named(names)}"


def _run(
    engine: Engine,
    variants: Sequence[Variant],
    source: QuestionSource,
    results: ResultsFile | None,
    done: set,
    args: argparse.Namespace,
    group: ProcessGroup,
) -> None:
    """Answers all batches in every variant; each process takes one batch of a round.

    Questions of a batch that already have a result are not answered again.
    """
    names = {variant.name for variant in variants}
    count = sum(name in names for name, _ in done)
    progress = Progress(f"{len(variants)} variants, answers", args.quiet)
    show = partial(progress, total=len(variants) * source.total)
    show(count)
    options = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    for round_ in rounds(source, variants, args.batch, group.count):
        cached: dict[tuple, QuestionBatch] = {}
        vision: dict[tuple, dict] = {}
        for variant in variants:
            todo = [
                [q for q in forms[variant.brief] if (variant.name, q.name) not in done]
                for forms in round_
            ]
            if not any(todo):
                continue
            questions, records = todo[group.rank] if group.rank < len(todo) else [], []
            if questions:
                key = tuple(question.name for question in questions)
                if (batch := cached.get((variant.brief, key))) is None:
                    batch = QuestionBatch(engine, questions, vision.setdefault(key, {}), **options)
                    cached[variant.brief, key] = batch
                records = [
                    *pictures(batch, args.gallery),
                    *batch.failed,
                    *answer_batch(
                        batch, variant, max_new_tokens=args.max_new_tokens, gallery=args.gallery
                    ),
                ]
            records = group.gather(records)
            count += sum(map(len, todo))
            if results:
                results.add([record for record in records if results.is_new(record)])
            show(count)


def _source(args: argparse.Namespace) -> QuestionSource:
    if args.data == ["world"]:
        seed = SPLITS[args.split].start if args.seed is None else args.seed
        count = WORLD_COUNT if args.count is None else args.count
        return WorldQuestions(seed, args.domains, count, args.kinds)
    if args.kinds:
        raise UsageError("--kinds applies to the world only; leave it out for files")
    if args.out:
        refuse_inputs(args.out, "results", args.data)
    return FileQuestions([Path(path) for path in args.data], args.images, args.count)


def _judge(args: argparse.Namespace) -> Judge:
    if not args.judge_model:
        raise UsageError("--judge-url needs --judge-model, the model to use at that address")
    return Judge(args.judge_url, args.judge_model, args.judge_temperature)


def _grade(results: ResultsFile, judge: Judge, args: argparse.Namespace) -> None:
    grade(results, judge, args.judge_workers, Progress(f"judge {judge.name}", args.quiet))


def _judge_parser() -> Parser:
    about = "Grade the answers without a verdict."
    parser = Parser(prog="nanoglimpse evaluate judge", description=about, quiet=True)
    adder(parser)("file", FILE, "file of results, to which verdicts are added")
    _judge_options(parser)
    return parser


def judge_file(args: argparse.Namespace) -> int:
    """`judge FILE`: grades the answers that have no verdict yet."""
    if not args.judge_url:
        raise UsageError("--judge-url is required, for example http://localhost:8000/v1")
    judge = _judge(args)
    options = ResultsFile.read(args.file).options
    with locked(args.file):
        results = ResultsFile.resume(args.file, options)
        _grade(results, judge, args)
    groups = list(dict.fromkeys(row["group"] for row in results.rows))
    _show(variant_results(results), groups, note(args))
    return 0


def _report_parser() -> Parser:
    about = "Print tables in Markdown, and write all figures as CSV and as a page."
    parser = Parser(prog="nanoglimpse evaluate report", description=about)
    best, keys = "judge if all answers are graded, else contains", [m.key for m in SCORES]
    add = adder(parser)
    add("files", FILE, "files of results", nargs="+")
    add("--csv", FILE, "write every figure with its interval as CSV", metavar="FILE")
    add("--html", FILE, "write a page with table, charts and gallery", metavar="FILE")
    add("--score", str, "score of tables and charts", best, keys)
    return parser


def report(args: argparse.Namespace) -> int:
    """`report FILE …`: prints tables in Markdown, and writes all figures as CSV and as a page."""
    for path, what in ((args.csv, "table"), (args.html, "page")):
        if path:
            refuse_inputs(path, what, args.files)
    variants, files = read_variants(args.files)
    score = args.score or best_score(variants)
    if not any(variant.get(score) for variant in variants):
        raise UsageError(f"no result has the score {score}; the command judge adds verdicts")
    variants, gaps = comparable(variants, score)
    notes = [*chain.from_iterable(map(_notes, args.files, files)), *gaps, *caveats(variants)]
    if args.csv:
        write_whole(args.csv, as_csv(variants).encode())
    if args.html:
        write_whole(args.html, page(variants, files, score, notes).encode())
    print(document(variants, score, notes), end="")
    return 0


def _gaps(results: ResultsFile) -> Iterator[str]:
    """A line about questions that failed, and one about those whose evidence is no evidence."""
    if results.errors:
        yield f"{len(results.errors)} questions failed: {_named(results.errors.values())}"
    outside = dict.fromkeys(row["question"] for row in results.rows if row.get("outside"))
    if outside:
        yield f"the boxes of {len(outside)} questions are outside the picture: {_named(outside)}"


def _named(names: Iterable[str]) -> str:
    """The first few of several names or reasons."""
    first = list(names)
    more = f" and {len(first) - NAMED} more" if len(first) > NAMED else ""
    return f"{', '.join(first[:NAMED])}{more}"


def _notes(path: Path, results: ResultsFile) -> Iterator[str]:
    """The model, the data and the gaps of a file, a line each."""
    o = results.options
    data = ", ".join(f"{name} {_listed(value)}" for name, value in o.get("data", {}).items())
    yield f"{path.name}: {o.get('model')}, {o.get('dtype')}, {data}."
    if results.missing:
        yield f"{path.name}: {_missing_note(results.missing)}."
    yield from (f"{path.name}: {line}." for line in _gaps(results))
    if verdicts := list(results.verdicts.values()):
        unclear = sum(not verdict["understood"] for verdict in verdicts)
        yield (
            f"{path.name}: {len(verdicts)} answers graded by {verdicts[0]['verdict']}; {unclear} "
            "verdicts held no score and count as 0."
        )


def _listed(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _parser() -> Parser:
    parser = Parser(
        prog="nanoglimpse evaluate", description=__doc__.partition("\n\n")[2], quiet=True
    )
    ratios = "caps on the share of kept visual tokens; none for no cap"
    gallery = "store pictures and kept cells of N questions of each group"
    add_shared(parser, "model", *MODEL)
    _data_options(parser)
    add = adder(parser.add_argument_group("methods"))
    names = f"all, or any of {', '.join(METHODS)}"
    add("--methods", ["dense", "glimpse"], names, kind=NAME, metavar="METHOD")
    add("--ratios", [None], ratios, "none", kind=RATIO, metavar="RATIO")
    add("--brief", "no", "whether prompts ask for a single word", choices=("no", "yes", "both"))
    add("--batch", 8, "batch size; 1 to measure latency", kind=COUNT)
    add_shared(parser, "pruning", "--kv-drop")
    # The paper allows 1024.
    add_shared(parser, "answer", "--max-new-tokens", max_new_tokens=MAX_NEW_TOKENS)
    add_shared(parser, "pictures")
    add = adder(parser.add_argument_group("results"))
    add("--out", FILE, "file of results to append to and to continue")
    add("--gallery", 0, gallery, kind=NATURAL, metavar="N")
    _judge_options(parser)
    return parser


def _data_options(parser: Parser) -> None:
    data = (
        "world, or files: .json in the layout of VisCoT's benchmark, .jsonl with image, question, "
        "answer and boxes"
    )
    count = f"{WORLD_COUNT} of a domain, all of a file"
    kinds = sum(QUESTION_KINDS.values(), ())
    group = parser.add_argument_group("data")
    add, seed = adder(group), adder(group.add_mutually_exclusive_group())
    add("--data", ["world"], data, kind=NAME)
    add("--images", FILE, "folder of the pictures", "that of each file")
    seed("--split", "heldout", "split of the world", choices=SPLITS)
    seed("--seed", SEED, "seed of the world, in place of a split")
    add("--domains", list(DOMAINS), "domains of the world", "all", DOMAINS)
    add("--kinds", str, "kinds of the world's questions", "all", kinds, nargs="+")
    add("--count", COUNT, "questions of each group", count)


def _judge_options(parser: Parser) -> None:
    add = adder(parser.add_argument_group("judge"))
    add("--judge-url", str, f"OpenAI-compatible endpoint; its key is in ${KEY}", metavar="URL")
    add("--judge-model", NAME, "model at the endpoint", metavar="NAME")
    add("--judge-temperature", 0.0, "sampling temperature; the paper uses 0.7", kind=WEIGHT)
    add("--judge-workers", 4, "requests at a time", kind=whole(1, 256))


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], Callable[[], Parser]]] = {
    "report": (report, _report_parser),
    "judge": (judge_file, _judge_parser),
}


if __name__ == "__main__":
    sys.exit(main())
