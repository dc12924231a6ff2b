"""Compares methods on questions whose evidence is known: `python -m nanoglimpse.evaluate`.

Every answer is a line of a JSONL, written as it comes. The same command goes on where it was
stopped, and a table is printed from what stands there: accuracy, what was kept, and how much of the
evidence was among it.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from .engine import Engine, find_method, load
from .errors import NanoglimpseError, UsageError
from .files import write_whole
from .methods import METHODS
from .processor import TextStream
from .reading import KV_DROPS
from .results import Prefill
from .train.accuracy import contains
from .train.base import asked
from .train.examples import Asked, token_mask
from .world import DOMAINS, SPLITS, render

PER_PICTURE = 4
RESULT = ("question", "arm", "domain", "kind", "reply", "wanted", "right", "kept", "recall")


@dataclass(frozen=True)
class Item:
    """A question to be answered: a name that tells it from all others, a picture, what is asked."""

    name: str
    domain: str
    kind: str
    number: int
    image: object
    asked: Asked


@dataclass(frozen=True)
class Arm:
    """What is compared: a method, its cap, and the form of the prompts."""

    method: str
    ratio: float | None
    brief: bool
    kv_drop: str = "all"

    @property
    def name(self) -> str:
        """As it stands in results."""
        cap = "" if self.ratio is None else f" {self.ratio:g}"
        later = "" if self.kv_drop == "all" else f" {self.kv_drop}"
        return f"{self.method}{cap}{later}{' brief' if self.brief else ''}"


def questions(split: str, domain: str, count: int, brief: bool) -> Iterator[Item]:
    """The first `count` questions of a split of the world, a few a picture, kinds drawn evenly."""
    seed, number, index = SPLITS[split].start, 0, 0
    while number < count:
        picture, rng = render(seed, index, domain=domain), random.Random(f"questions {index}")
        kinds = sorted({question.kind for question in picture.questions})
        for kind in rng.sample(kinds, min(PER_PICTURE, len(kinds), count - number)):
            question = rng.choice([q for q in picture.questions if q.kind == kind])
            name = f"{split} {domain} {index} {kind}"
            yield Item(name, domain, kind, number, picture.image, asked(question, brief))
            number += 1
        index += 1


def answer(engine: Engine, items: Sequence[Item], arm: Arm) -> list[dict]:
    """A result for each item, computed in one batch."""
    prompts = [engine.prompt(item.image, item.asked.question) for item in items]
    masks = [
        token_mask(item.asked.boxes, prompt.grids[0], engine.config)
        for item, prompt in zip(items, prompts, strict=True)
    ]
    prefill = engine.prefill_many(
        prompts,
        arm.method,
        max_ratio=arm.ratio,
        kv_drop=arm.kv_drop,
        max_new_tokens=64,
        evidence=masks,
        seed=[item.number for item in items],
    )
    replies = _replies(engine, prefill, len(items))
    kept = prefill.kept.cpu().split(prefill.batch.visual_counts)
    return [
        {
            "question": item.name,
            "arm": arm.name,
            "domain": item.domain,
            "kind": item.kind,
            "reply": reply,
            "wanted": item.asked.short,
            "right": contains(reply, item.asked.short),
            "kept": float(own.float().mean()),
            "recall": float(own[mask].float().mean()) if bool(mask.any()) else None,
        }
        for item, reply, own, mask in zip(items, replies, kept, masks, strict=True)
    ]


def _replies(engine: Engine, prefill: Prefill, count: int) -> list[str]:
    texts, streams = [""] * count, [TextStream(engine.processor) for _ in range(count)]
    for tokens in engine.decode_many(prefill, 64):
        for i, token in enumerate(tokens):
            if token is not None:
                texts[i] += streams[i].push(token)
    return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


class Results:
    """Results in a file, a line each, in the order they came."""

    def __init__(self, path: Path | None):
        self.path, self.rows = path, []
        if path and path.exists():
            text = path.read_text(encoding="utf-8")
            # The last line of a killed run may be half a line; its question is asked again.
            whole, _, _ = text.rpartition("\n")
            self.rows = [_row(line, path) for line in whole.splitlines()]
            if not text.endswith("\n"):
                write_whole(path, (whole + "\n" * bool(whole)).encode())
        self.done = {(row["arm"], row["question"]) for row in self.rows}

    def add(self, rows: Sequence[dict]) -> None:
        """Keeps results, in the file too."""
        self.rows += rows
        if self.path:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                raise NanoglimpseError(f"{self.path} cannot be written: {error}") from None


def _row(line: str, path: Path) -> dict:
    try:
        row = json.loads(line)
        return {key: row[key] for key in RESULT}
    except (ValueError, KeyError, TypeError) as error:
        raise NanoglimpseError(f"{path} holds something else than results: {error}") from None


def table(rows: Sequence[dict], domains: Sequence[str], arms: Sequence[Arm]) -> str:
    """Markdown: a line an arm; accuracy, share kept and evidence found, in per cent, by domain."""
    head = ["method", *(f"{d} {what}" for d in domains for what in ("right", "kept", "found"))]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for arm in arms:
        line = [arm.name]
        for domain in domains:
            own = [row for row in rows if row["arm"] == arm.name and row["domain"] == domain]
            for key in ("right", "kept", "recall"):
                values = [row[key] for row in own if row[key] is not None]
                line.append(f"{100 * sum(values) / len(values):.1f}" if values else "")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        arms = _arms(args)
        engine = load(args.model, glimpse=args.glimpse, device=args.device, dtype=args.dtype)
        results = Results(args.out)
        for number, arm in enumerate(arms):
            _run(engine, arm, results, args, f"{number + 1} of {len(arms)}")
    except NanoglimpseError as error:
        print(f"nanoglimpse: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; with --out the same command goes on", file=sys.stderr)
        return 130
    print(table(results.rows, args.domains, arms))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nanoglimpse.evaluate", description="Compare methods on the synthetic world."
    )
    add = parser.add_argument
    add("--model", default="nano", help="nano, a folder or a Hub id (default: nano)")
    add("--glimpse", help="glimpse weights, if they are elsewhere")
    add("--split", choices=tuple(SPLITS), default="heldout", help="(default: heldout)")
    add("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="(default: all)")
    add("--count", type=int, default=1000, help="questions of each domain (default: 1000)")
    add("--methods", nargs="+", default=["dense", "glimpse"], metavar="METHOD", help=_names())
    add("--ratios", nargs="+", default=["none"], metavar="RATIO", help="caps; none for no cap")
    add("--kv-drop", choices=KV_DROPS, default="all", help="from which caches (default: all)")
    add("--brief", choices=("no", "yes", "both"), default="no", help="ask for one word (no)")
    add("--batch", type=int, default=8, help="questions at a time (default: 8)")
    add("--out", type=Path, help="JSONL of results; a run goes on where it ends")
    add("--device", default="auto", help="(default: cuda where there is one)")
    add("--dtype", default="auto", help="(default: auto)")
    add("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _names() -> str:
    return f"of {', '.join(METHODS)} (default: dense glimpse)"


def _arms(args: argparse.Namespace) -> list[Arm]:
    """All combinations that make sense: dense and oracle once, capped methods with caps alone."""
    ratios = [_ratio(text) for text in args.ratios]
    forms = {"no": [False], "yes": [True], "both": [False, True]}[args.brief]
    arms = []
    for brief, name, ratio in product(forms, args.methods, ratios):
        if name in ("dense", "oracle"):
            ratio = None
        elif ratio is None and find_method(name, 1.0).capped:
            continue
        if (arm := Arm(name, ratio, brief, args.kv_drop)) not in arms:
            arms.append(arm)
    if not arms:
        raise UsageError("these methods need a cap; give --ratios, for example 0.111")
    return arms


def _ratio(text: str) -> float | None:
    if text == "none":
        return None
    try:
        ratio = float(text)
    except ValueError:
        raise UsageError(f"ratio {text} is neither a number nor none") from None
    if not 0 < ratio <= 1:
        raise UsageError(f"ratio {text} is no share; give 0 to 1")
    return ratio


def _run(engine: Engine, arm: Arm, results: Results, args: argparse.Namespace, which: str) -> None:
    """Asks what has not been asked yet."""
    left = (
        item
        for domain in args.domains
        for item in questions(args.split, domain, args.count, arm.brief)
        if (arm.name, item.name) not in results.done
    )
    total, done, batch = args.count * len(args.domains), 0, []
    for item in left:
        batch.append(item)
        if len(batch) == args.batch:
            results.add(answer(engine, batch, arm))
            done, batch = done + len(batch), []
            if not args.quiet:
                print(f"\r{which}: {arm.name}, {done} of {total}", end="", file=sys.stderr)
    if batch:
        results.add(answer(engine, batch, arm))
    if not args.quiet:
        print(f"\r{which}: {arm.name}, done{' ' * 12}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
