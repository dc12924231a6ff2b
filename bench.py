"""Times this engine, dense and pruned, beside transformers with the same weights, in one run.

    python bench.py                                       the embedded checkpoint, 448 × 448 px
    python bench.py --shape 3b --visual-tokens 256 1024 5000 16384 --retain 1 0.333 0.111 0.04
    python bench.py --shape 3b --layers 4 --device cpu    for a machine that is too small
    python bench.py --ragged 8 32                         questions of different sizes at once
    python bench.py --kernels --shape 7b                  each operation alone

A shape has random weights, which are made on the device. Such weights prune at random, so the share
to keep is forced, while glimpse and predictor do all of their work. Rounds alternate between the
contenders, so that a ratio holds when the machine drifts. A gate comes first: what computes wrong
is not timed. Floors are operations over the rate of a large product, and bytes over the bandwidth
of reading a large tensor, both measured first; a ceiling is the speed-up of an engine at its floor.
Beside each answer to a single prompt stand two questions to a session, up to their logits: the
first one, for which the picture is encoded, and a further one. With --ragged the questions are
about pictures of different sizes, and their answers end at different places; the tables say how
many are answered in a second at once, one by one, and by transformers in a padded batch. The last
line of stdout is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from nanoglimpse.benchmark.cases import Case, accuracy
from nanoglimpse.benchmark.contenders import Transformers
from nanoglimpse.benchmark.measuring import Roofs, machine, say
from nanoglimpse.benchmark.models import Workload, make_engine
from nanoglimpse.benchmark.operations import time_operations
from nanoglimpse.benchmark.plot import plot
from nanoglimpse.benchmark.ragged import Ragged, gains_at_once
from nanoglimpse.benchmark.report import gains, report
from nanoglimpse.cli import console
from nanoglimpse.cli.ask import built_in
from nanoglimpse.cli.console import Parser, adder
from nanoglimpse.cli.kinds import COUNT, NAME, SHARE, THREADS, whole
from nanoglimpse.cli.options import add_shared
from nanoglimpse.engine import Engine
from nanoglimpse.errors import UsageError


def parser() -> Parser:
    """All options."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared(p, "model", "--model", "--device", "--dtype", "--backend", "--quantize")
    add = adder(p)
    static = "in addition, transformers with a static cache and a compiled decode step"
    add("--image", built_in()[0], "picture to ask about", "a scene of 448 × 448 pixels", kind=NAME)
    add("--shape", NAME, "3b, 7b or a config.json: random weights in place of a checkpoint")
    add("--layers", whole(1, 1024), "layers of each tower of a shape", "all")
    add("--visual-tokens", [256], "visual tokens of the picture of a shape", kind=whole(1, 2**18))
    add("--retain", SHARE, "shares of visual tokens to keep", "0.111 for a shape", nargs="+")
    add("--text", 40, "text tokens of the prompt of a shape", kind=whole(1, 2**18))
    add("--batch", [1], "prompts in a batch", kind=whole(1, 4096))
    add(
        "--ragged",
        whole(1, 4096),
        "ask these numbers of questions of different sizes instead",
        nargs="+",
    )
    add("--new", 64, "tokens of an answer", kind=whole(2))
    add("--rounds", 11, "rounds that are counted", kind=COUNT)
    add("--static", False, static)
    add("--threads", 0, "CPU threads", "torch's choice", kind=THREADS)
    add("--alone", False, "do not run transformers")
    add("--kernels", False, "time operations in place of answers")
    add("--plot", NAME, "write a figure of prefill and decode times", metavar="PNG")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    return console.run(run, parser(), arguments)


def run(args: argparse.Namespace) -> int:
    """Builds, measures the roofs, then kernels or cases."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.ragged and args.plot:
        raise UsageError("--plot draws prefill and decode, which --ragged does not time apart")
    say("building")
    engine = make_engine(args)
    roofs = Roofs(engine)
    summary = {"machine": machine(args, engine, roofs), "cases": []}
    print("  ".join(f"{key} {value}" for key, value in summary["machine"].items()))
    if args.kernels:
        summary["kernels"] = time_operations(engine, roofs, args)
        print(json.dumps(summary))
        return 0
    if args.quantize:
        summary["accuracy"] = accuracy(engine, args)
    tell, gained = (Ragged.report, gains_at_once) if args.ragged else (report, gains)
    wrong = 0
    for case in cases(engine, roofs, args):
        faults = case.faults()
        if faults:
            wrong += 1
            print(f"\n{case.title}: not timed, it computes wrong: {'; '.join(faults)}")
            continue
        case.measure()
        summary["cases"].append(tell(case))
    if args.plot and summary["cases"]:
        plot(Path(args.plot), summary["cases"])
    if summary["cases"]:
        print("\n" + gained(summary["cases"][-1]))
    print(json.dumps(summary))
    return 1 if wrong else 0


def cases(engine: Engine, roofs: Roofs, args: argparse.Namespace) -> Iterator[Case | Ragged]:
    """The cases that the options name, one after the other."""
    transformers = None if args.alone else Transformers.load(engine, args)
    for visual in args.visual_tokens if args.shape else [0]:
        for count in args.ragged or ():
            yield Ragged(Workload(engine, args, visual, count), transformers)
        for batch in [] if args.ragged else args.batch:
            yield Case(Workload(engine, args, visual, copies=batch), transformers, roofs)


if __name__ == "__main__":
    sys.exit(main())
