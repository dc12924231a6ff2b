"""Trains glimpse weights or a small base model: `nanoglimpse train base|glimpse FOLDER …`.

`nanoglimpse train check FILE` says what of a file of questions can be trained on.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from nanoglimpse.cli import console
from nanoglimpse.cli.console import Parser, Progress, adder
from nanoglimpse.cli.kinds import (
    COUNT,
    DEVICE,
    FILE,
    FRACTION,
    NAME,
    NATURAL,
    RATE,
    SEED,
    SHARE,
    THREADS,
    WEIGHT,
    WORKERS,
    Kind,
    number,
    whole,
)
from nanoglimpse.cli.options import add_shared
from nanoglimpse.config import Config, GlimpseConfig, check_glimpse, read_json
from nanoglimpse.data.sources import FileExamples, WorldExamples, domains_of
from nanoglimpse.distributed import local_device, num_processes
from nanoglimpse.engine import Engine
from nanoglimpse.errors import UsageError
from nanoglimpse.files import locked
from nanoglimpse.loader import load
from nanoglimpse.methods.schedule import two_thirds
from nanoglimpse.model.device import find_device
from nanoglimpse.train.check import check_file
from nanoglimpse.train.curriculum import CURRICULA
from nanoglimpse.train.glimpse import GlimpseTask, LossWeights
from nanoglimpse.train.loop import SCHEDULES, STATE, Recipe, TrainTask, train
from nanoglimpse.train.pretrain import NANO, SETTINGS, BaseTask, copy_files, write_folder
from nanoglimpse.train.shared_prefix import OPS
from nanoglimpse.weights.hub import locate
from nanoglimpse.world import DOMAINS

# Options that do not influence the result, so that a resumed run may change them.
FREE = {"run", "folder", "device", "threads", "workers", "checkpointing", "debug"}
FREE |= {"save_every", "evaluate_every", "log_every"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code (`console.run`)."""
    return console.run(_command, _parser(), arguments, memory="use smaller micro-batches")


def _command(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    return args.run(args)


def _parser() -> Parser:
    parser = Parser(prog="nanoglimpse train", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="base|glimpse|check")
    base = kinds.add_parser("base", help="train a small Qwen2.5-VL from scratch on the world")
    base.set_defaults(run=_base)
    optimisation = {"betas": (0.9, 0.98), "weight_decay": 0.01, "accumulate": 1}
    schedule = {"lr": 1.5e-3, "schedule": "trapezoid", "warmup": 0.01, "decay": 0.5}
    _add_common(base, steps=30000, **schedule, **optimisation)
    _add_base(base)
    glimpse = kinds.add_parser("glimpse", help="train glimpse token and predictor for a checkpoint")
    glimpse.set_defaults(run=_glimpse)
    _add_common(glimpse, steps=0)
    _add_data(glimpse)
    _add_glimpse(glimpse)
    check = kinds.add_parser("check", help="say what of a file can be trained on, and draw it")
    check.set_defaults(run=check_file, threads=0)
    add = adder(check)
    add("file", FILE, "file of questions with evidence")
    add("--images", FILE, "folder of the pictures", "that of the file")
    sheet = "picture to draw, of the first questions with their boxes"
    add("--sheet", "check.png", sheet, kind=NAME)
    return parser


def _add_base(parser: Parser) -> None:
    init = "start from these weights and their tokenizer: nano, a run or another folder"
    start = adder(parser.add_mutually_exclusive_group())
    start("--shape", FILE, "config.json to use in place of nano's")
    start("--init", NAME, init, metavar="CHECKPOINT")
    stages = (
        "stages: whole (from scratch), late (its last two), or for reading: reading (small print), "
        "letters, spelling"
    )
    add = adder(parser)
    add("--retokenize", False, "with --init: make a new tokenizer from the world's phrases")
    add("--curriculum", "whole", stages, choices=CURRICULA)
    add("--domains", list(DOMAINS), "domains to draw", "all", DOMAINS)
    add("--scale", 1, "factor on the size of micro-batches", kind=whole(1, 1024))


def _add_data(parser: Parser) -> None:
    data = "world, world:DOMAINS (as scene,chart; repeat one to draw it more often) or a file"
    brief = "world: share of the micro-batches with brief prompts"
    add_shared(parser, "model", "--model", "--offline")
    add = adder(parser.add_argument_group("data"))
    add("--data", "world:scene", data, kind=NAME)
    add("--images", FILE, "folder of the pictures", "that of the file")
    add("--pictures", 8, "world: pictures in a micro-batch", kind=whole(1, 1024))
    add("--questions", 8, "world: questions about a picture", kind=whole(1, 1024))
    add("--short", False, "world: short answers to free-form questions, too")
    add("--brief", 0.0, brief, kind=FRACTION, metavar="SHARE")


def _add_glimpse(parser: Parser) -> None:
    rate = "learning rate of the glimpse token, as a share of --lr"
    layers = "layers to whose input the glimpse is added, from 0"
    taps = "vision blocks that condition the predictor, in the order of its blocks"
    logits = "give the predictor log-probabilities of the glimpse's attention, not raw logits"
    add = adder(parser.add_argument_group("glimpse"))
    add("--token", str, "text token to initialise the glimpse", "random", metavar="TEXT")
    add("--token-rate", 1.0, rate, kind=FRACTION, metavar="SHARE")
    add("--le-layers", NATURAL, layers, "all", nargs="+")
    add("--layer", COUNT, "K, number of layers before pruning", "two thirds")
    add("--taps", NATURAL, taps, "four, from the last one down", nargs="*")
    add("--log-softmax", False, logits)
    add("--size", 256, "E, width of the predictor", kind=whole(1, 2**16))
    add("--condition", 512, "F, width of its conditions", kind=whole(1, 2**16))
    add("--threshold", 0.5, "importance above which the weights keep a token", kind=FRACTION)
    add("--dropout", 0.1, "dropout of the glimpse vectors", kind=number(0, 0.99))
    add("--dice", 1.0, "weight of the dice loss", kind=WEIGHT)
    add("--bce", 0.1, "weight of the BCE loss", kind=WEIGHT)
    add("--lm", 1.0, "weight of the language loss", kind=WEIGHT)
    add("--no-lm-loss", False, "ablation: no language loss (Table 5)")
    add("--no-location-loss", False, "ablation; implies --no-predictor")
    add("--no-predictor", False, "ablation: the weighted mean over heads")
    add("--no-visual-condition", False, "ablation: no vision features")
    add("--checkpointing", False, "recompute activations to save memory")


RECIPE = {
    "steps": "number of optimiser steps",
    "lr": "peak learning rate",
    "schedule": "learning-rate schedule",
    "warmup": "share of the steps in which the learning rate rises",
    "decay": "share of the steps in which a trapezoid falls",
    "betas": "betas of AdamW",
    "weight_decay": "weight decay of matrices",
    "grad_norm": "norm to which gradients are clipped",
    "accumulate": "micro-batches per step",
    "save_every": "steps between saved states",
    "evaluate_every": "steps between evaluations",
    "log_every": "steps between lines of the log",
    "workers": "subprocesses that make data, 0 for none",
}
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("steps", "accumulate", "save_every", "evaluate_every", "log_every"), COUNT),
    "lr": RATE,
    "warmup": FRACTION,
    "decay": SHARE,
    "betas": number(0, 0.999999),
    "weight_decay": number(0, 100),
    "grad_norm": number(0, open_low=True),
    "workers": WORKERS,
}
DTYPES = ("auto", "float32", "bfloat16")


def _add_common(parser: Parser, **defaults: Any) -> None:
    """Options of both commands; `defaults` stand in for those of the recipe."""
    add = adder(parser)
    add("folder", FILE, "folder of the run: state, log and weights")
    add("--seed", 0, "seed of data and weights", kind=SEED)
    add("--device", "auto", "cpu, cuda or cuda:N", "cuda where available", kind=DEVICE)
    add("--dtype", "auto", "float32 or bfloat16", "bfloat16 with a GPU", DTYPES)
    add("--threads", 0, "CPU threads", "torch's choice", kind=THREADS)
    add = adder(parser.add_argument_group("optimisation"))
    shown = {"steps": "" if defaults["steps"] else "one epoch of a file"}
    more: dict[str, dict[str, Any]] = {"schedule": {"choices": SCHEDULES}, "betas": {"nargs": 2}}
    # A number of 0 steps stands for one epoch of a file.
    kinds = KINDS | ({} if defaults["steps"] else {"steps": NATURAL})
    for field in fields(Recipe):
        name, value = field.name, defaults.get(field.name, field.default)
        flag = f"--{name.replace('_', '-')}"
        add(
            flag,
            value,
            RECIPE[name],
            shown.get(name, ""),
            kind=kinds.get(name),
            **more.get(name, {}),
        )


def _recipe(args: argparse.Namespace) -> Recipe:
    values = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    return Recipe(**values | {"betas": tuple(args.betas)})


def _place(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    cuda = torch.cuda.is_available()
    device = find_device(local_device(args.device))
    name = ("bfloat16" if cuda else "float32") if args.dtype == "auto" else args.dtype
    return device, getattr(torch, name)


def _print(line: str) -> None:
    print(line, flush=True)


def _base(args: argparse.Namespace) -> int:
    device, dtype = _place(args)
    recipe = _recipe(args)
    if args.retokenize and not args.init:
        raise UsageError("--retokenize needs --init, the checkpoint to convert")
    init = None
    if args.init and not (args.folder / STATE).exists():
        init = locate(args.init, [*SETTINGS, "*.safetensors"])
    with _held(args.folder):
        return _run(_base_task(args, init, recipe, device, dtype), args)


def _base_task(
    args: argparse.Namespace,
    init: Path | None,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
) -> BaseTask:
    if not (args.folder / "config.json").exists():
        if init and not args.retokenize:
            copy_files(init, args.folder)
        else:
            shape = init / "config.json" if init else args.shape or NANO / "config.json"
            write_folder(args.folder, read_json(shape), args.seed)
    micros = recipe.steps * recipe.accumulate * num_processes()
    stages = [
        replace(
            stage,
            work=args.scale * stage.work,
            draws=tuple(draw for draw in stage.draws if draw.domain in args.domains),
        )
        for stage in CURRICULA[args.curriculum]
    ]
    stages = [stage for stage in stages if stage.draws]
    return BaseTask(args.folder, stages, micros, args.seed, device, dtype, init)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds the folder of a run against a second command; of several processes the first does."""
    with locked(folder / STATE) if int(os.environ.get("RANK", "0")) == 0 else nullcontext():
        yield


def _run(task: TrainTask, args: argparse.Namespace) -> int:
    settings = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    stopped = train(task, _recipe(args), args.folder, settings=settings, log=_print)
    _print(f"{'stopped; the same command continues' if stopped else 'written to'} {args.folder}")
    return console.exit_code(stopped) if stopped else 0


def _glimpse(args: argparse.Namespace) -> int:
    device, dtype = _place(args)
    engine = load(args.model, device=str(device), dtype=str(dtype)[6:], backend=OPS)
    source = _source(args)
    location = not args.no_location_loss
    losses = LossWeights(args.dice * location, args.bce * location, args.lm * (not args.no_lm_loss))
    task = GlimpseTask(
        engine,
        _glimpse_config(args, engine.config),
        losses,
        source,
        dropout=args.dropout,
        seed=args.seed,
        checkpointing=args.checkpointing,
        initial_token=None if args.token is None else _token(engine, args.token),
        token_rate=args.token_rate,
    )
    with _held(args.folder):
        return _run(task, args)


def _source(args: argparse.Namespace) -> WorldExamples | FileExamples:
    """The examples; sets the steps of one epoch where no number is given."""
    if args.data.partition(":")[0] == "world":
        world = WorldExamples(
            domains_of(args.data),
            args.pictures,
            args.questions,
            args.seed,
            short=args.short,
            brief=args.brief,
        )
        if not args.steps:
            raise UsageError("--steps is required, since the world has no end")
        return world
    if args.short or args.brief:
        raise UsageError("--short and --brief apply to the world only; leave them out for a file")
    path, quiet = Path(args.data), num_processes() > 1
    pictures = args.images or path.parent
    source = FileExamples(path, pictures, args.seed, Progress("pictures", quiet))
    for line in source.lacks():
        _print(line)
    if not source.located and not args.no_location_loss:
        raise UsageError(
            f"{path} has no evidence: its rows need boxes (shares of width and height) or bboxs "
            "(pixels); --no-location-loss trains without"
        )
    args.steps = args.steps or -(-source.count // (args.accumulate * num_processes()))
    return source


def _token(engine: Engine, text: str) -> int:
    ids = engine.processor.need_tokenizer().encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        raise UsageError(
            f"--token must be a single token of this model, but {text!r} is {len(ids)}"
        )
    return ids[0]


def _glimpse_config(args: argparse.Namespace, config: Config) -> GlimpseConfig:
    """The paper's configuration for a model of this size (Tab. 14), changed by the options."""
    depth, blocks = config.text_config.num_hidden_layers, config.vision_config.depth
    layer = args.layer or two_thirds(depth)
    if not 1 <= layer <= depth:
        raise UsageError(f"--layer must be in [1, {depth}], got {layer}")
    taps = (
        [blocks * quarter // 4 - 1 for quarter in (4, 3, 2, 1)] if args.taps is None else args.taps
    )
    plain = args.no_predictor or args.no_location_loss
    glimpse = GlimpseConfig(
        reduce_layer=layer - 1,
        selected_layers=(layer - 1,),
        le_layers=tuple(range(depth) if args.le_layers is None else args.le_layers),
        attn_fuse_size=args.size,
        visual_cond_size=0 if args.no_visual_condition or plain else args.condition,
        attn_fuse_num_heads=4,
        attn_fuse_global=True,
        selected_visual_layers=() if plain else tuple(taps),
        deep_supervision=False,
        use_attention_logits=not args.log_softmax,
        # Attention that was not trained on locations has no natural threshold, only a cap.
        reduce_threshold=0.0 if args.no_location_loss else args.threshold,
        max_remain_ratio=1 / 9 if args.no_location_loss else None,
    )
    check_glimpse(config, glimpse, "the options")
    return glimpse


if __name__ == "__main__":
    sys.exit(main())
