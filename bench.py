"""Times this engine, dense and pruned, beside transformers with the same weights, in one run.

    python bench.py                                       the embedded checkpoint, 448 × 448 px
    python bench.py --shape 3b --visual-tokens 256 1024 5000 16384 --retain 1 0.333 0.111 0.04
    python bench.py --shape 3b --layers 4 --device cpu    for a machine that is too small
    python bench.py --ragged 8 32                         questions of different sizes at once
    python bench.py --kernels --shape 7b                  each operation alone
    python bench.py --first-contact                       what has to be known about a new GPU

A shape has random weights, which are made on the device. Such weights prune at random, so the share
to keep is forced, while glimpse and predictor do all of their work. Rounds alternate between the
contenders, so that a ratio holds when the machine drifts; ± is half the distance between the
quartiles of the rounds, and a ratio that spreads too far is left out with a line that says so. A
gate comes first: what computes wrong is not timed. Floors are operations over the rate of a large
product, and bytes over the bandwidth of reading a large tensor, both measured beside the rounds; a
figure below its floor is marked "roof invalid". A ceiling is the speed-up of an engine at its
floor.
The cold first token is that of the first answer of the process at its length. One contender answers
at lengths that are new in every round. pp<N> and tg<N> are the tests of llama-bench: N rows read by
the decoder, N tokens generated.
Beside each answer to a single prompt stand two questions to a session, up to their logits: the
first one, for which the picture is encoded, and a further one. With --ragged the questions are
about pictures of different sizes, and their answers end at different places; the tables say how
many are answered in a second at once, one by one, and by transformers in a padded batch. The last
line of stdout is one JSON object.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nanoglimpse.benchmark.cases import Case, accuracy
from nanoglimpse.benchmark.contenders import Transformers
from nanoglimpse.benchmark.first_contact import first_contact
from nanoglimpse.benchmark.machine import machine
from nanoglimpse.benchmark.measuring import say
from nanoglimpse.benchmark.models import Workload, make_engine, visual_sizes
from nanoglimpse.benchmark.operations import time_operations
from nanoglimpse.benchmark.output import FORMS, Output
from nanoglimpse.benchmark.plot import plot
from nanoglimpse.benchmark.ragged import Ragged, gains_at_once
from nanoglimpse.benchmark.report import gains, report
from nanoglimpse.benchmark.roofs import Roofs
from nanoglimpse.benchmark.rules import NAMES, time_rule
from nanoglimpse.cli import console
from nanoglimpse.cli.ask import built_in
from nanoglimpse.cli.console import Parser, adder
from nanoglimpse.cli.kinds import COUNT, NAME, SHARE, THREADS, number, whole
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
    tokens = "visual tokens of the picture, which is scaled to about as many"
    usual = "256 for a shape, as many as it has otherwise; 64 144 256 576 with --plot"
    add("--visual-tokens", whole(1, 2**18), tokens, usual, nargs="+")
    add("--retain", SHARE, "shares of visual tokens to keep", "0.111 for a shape", nargs="+")
    add("--text", 40, "text tokens of the prompt of a shape", kind=whole(1, 2**18))
    add("--batch", [1], "prompts in a batch", kind=whole(1, 4096))
    several = "ask these numbers of questions of different sizes instead"
    add("--ragged", whole(1, 4096), several, nargs="+")
    add("--new", 64, "tokens of an answer", kind=whole(2))
    add("--rounds", 11, "rounds that are counted", kind=COUNT)
    add("--static", False, static)
    add("--threads", 0, "CPU threads", "torch's choice", kind=THREADS)
    add("--alone", False, "do not run transformers")
    add("--kernels", False, "time operations in place of answers")
    until = "begin no round, except the first one, after so much time"
    add("--seconds", number(0, open_low=True), until, "none")
    add("-o", "md", "form of the tables on stdout", choices=FORMS, dest="form")
    add("--rule", str, "time both ways of a rule by which a GPU takes kernels", choices=NAMES)
    add("--first-contact", False, "what has to be known about a GPU, in 300 seconds or --seconds")
    add("--plot", NAME, "write a figure of prefill and decode times", metavar="PNG")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    return console.run(run, parser(), arguments)


def run(args: argparse.Namespace) -> int:
    """Builds, measures the roofs, then kernels or cases."""
    check(args)
    args.until = time.monotonic() + args.seconds if args.seconds else math.inf
    if args.threads:
        torch.set_num_threads(args.threads)
    out = Output(args.form)
    if args.first_contact:
        return first_contact(args, out)
    if args.rule:
        out.end({"rules": time_rule(args, out)})
        return 0
    say("building")
    engine = make_engine(args)
    roofs = Roofs(engine)
    layers = engine.config.text_config.num_hidden_layers
    record = machine(args, engine.device, engine.dtype) | {"layers": layers} | roofs.record()
    summary: dict[str, Any] = {"machine": record, "cases": []}
    out.note("  ".join(f"{key} {value}" for key, value in record.items()))
    wrong = 0
    if args.kernels:
        summary["kernels"] = time_operations(engine, roofs, args, out)
    else:
        if args.quantize:
            summary["accuracy"] = accuracy(engine, args, out)
        wrong = time_cases(engine, roofs, args, out, summary["cases"])
    out.end(summary)
    return 1 if wrong else 0


def check(args: argparse.Namespace) -> None:
    """Refuses options that make no sense together.

    Raises:
        UsageError: it says which option.
    """
    if args.rule and not args.shape:
        raise UsageError("--rule needs the sizes of a model; give a --shape")
    if args.ragged and args.plot:
        raise UsageError("--plot draws prefill and decode, which --ragged does not time apart")


def time_cases(
    engine: Engine, roofs: Roofs, args: argparse.Namespace, out: Output, found: list[dict[str, Any]]
) -> int:
    """Writes what the options name; returns how many cases were not timed, as they were wrong."""
    gained, wrong = gains_at_once if args.ragged else gains, 0
    for case in cases(engine, roofs, args):
        if isinstance(case, Case):
            case.first()
        faults = case.faults()
        if faults:
            wrong += 1
            out.note(f"{case.title}: not timed, it computes wrong: {'; '.join(faults)}")
            continue
        case.measure()
        found.append(report(case, out) if isinstance(case, Case) else case.report(out))
    if args.plot and found:
        plot(Path(args.plot), found)
    if found:
        out.note(gained(found[-1]))
    return wrong


def cases(engine: Engine, roofs: Roofs, args: argparse.Namespace) -> Iterator[Case | Ragged]:
    """The cases that the options name, one after the other."""
    transformers = None if args.alone else Transformers.load(engine, args)
    for visual in visual_sizes(args):
        for count in args.ragged or ():
            yield Ragged(Workload(engine, args, visual, count), transformers)
        for batch in [] if args.ragged else args.batch:
            yield Case(Workload(engine, args, visual, copies=batch), transformers, roofs)


if __name__ == "__main__":
    sys.exit(main())
