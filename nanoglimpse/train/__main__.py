"""Command line of the trainer: `python -m nanoglimpse.train base|glimpse …`."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from ..config import Config, GlimpseConfig, check_glimpse, read_json
from ..engine import Engine, load
from ..errors import NanoglimpseError, UsageError
from ..generate import Parser
from ..weights import locate
from ..world import DOMAINS
from .base import SETTINGS, TOKENIZER, BaseTask, copy_folder, write_folder
from .branches import OPS
from .curriculum import CURRICULA
from .data import File, World, domains_of
from .glimpse import GlimpseTask, Losses
from .loop import SCHEDULES, STATE, Recipe, Task, processes, train
from .shapes import NANO

# Options that a resumed run may change: they change nothing of the result.
FREE = {"run", "folder", "device", "threads", "workers", "checkpointing"}
FREE |= {"save_every", "evaluate_every", "log_every"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        return args.run(args)
    except NanoglimpseError as error:
        print(f"nanoglimpse: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="python -m nanoglimpse.train", description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="base|glimpse")
    base = kinds.add_parser("base", help="a small Qwen2.5-VL from scratch on the synthetic world")
    base.set_defaults(run=_base)
    _common(
        base,
        steps=30000,
        lr=1.5e-3,
        schedule="trapezoid",
        warmup=0.01,
        decay=0.5,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        accumulate=1,
    )
    begin = base.add_mutually_exclusive_group()
    begin.add_argument("--shape", type=Path, help="config.json to train instead of nano's")
    begin.add_argument(
        "--init",
        metavar="CHECKPOINT",
        help="go on from this one, with its tokenizer: nano, a run or another folder",
    )
    base.add_argument(
        "--retokenize",
        action="store_true",
        help="with --init: a tokenizer of the world's phrases instead of that of the checkpoint",
    )
    base.add_argument(
        "--curriculum",
        choices=CURRICULA,
        default="whole",
        help="from nothing, its last two stages, or to read: small print, letters, spelled names "
        "(default: whole)",
    )
    base.add_argument(
        "--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="(default: all)"
    )
    base.add_argument("--scale", type=int, default=1, help="times the work of a micro-batch")
    glimpse = kinds.add_parser("glimpse", help="glimpse token and predictor for any checkpoint")
    glimpse.set_defaults(run=_glimpse)
    _common(glimpse, steps=0)
    _glimpse_options(glimpse)
    return parser


def _glimpse_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="nano", help="checkpoint: nano, a folder or a Hub id (default: nano)")
    add(
        "--data",
        default="world:scene",
        help="world, world:DOMAINS (scene,chart; twice is twice as often) or a .jsonl "
        "(default: world:scene)",
    )
    add("--images", type=Path, help="folder of a file's pictures (default: the file's own)")
    add("--pictures", type=int, default=8, help="of the world in a micro-batch (default: 8)")
    add("--questions", type=int, default=8, help="about each of them (default: 8)")
    add("--short", action="store_true", help="the world answers with a word, unasked")
    add(
        "--brief",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the world's micro-batches that ask for a word (default: 0)",
    )
    add("--token", metavar="TEXT", help="a token that the glimpse begins as (default: noise)")
    add(
        "--token-rate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the learning rate, at which the glimpse token learns (default: 1)",
    )
    add(
        "--le-layers",
        type=int,
        nargs="+",
        help="layers whose input the glimpse is added to; the first is 0 (default: all)",
    )
    add("--layer", type=int, help="K, layers before pruning (default: two thirds of all)")
    add(
        "--taps",
        type=int,
        nargs="*",
        help="vision blocks that condition the predictor, first to last "
        "(default: four, the last one first)",
    )
    add(
        "--log-softmax",
        action="store_true",
        help="the predictor reads log-probabilities of the glimpse's attention, not its raw logits",
    )
    add("--size", type=int, default=256, help="E, width of the predictor (default: 256)")
    add("--condition", type=int, default=512, help="F, width of the conditions (default: 512)")
    add(
        "--threshold",
        type=float,
        default=0.5,
        help="that the weights state: keep what is more important (default: 0.5)",
    )
    add("--dropout", type=float, default=0.1, help="of the glimpse vectors (default: 0.1)")
    add("--dice", type=float, default=1.0, help="weight of the dice loss (default: 1)")
    add("--bce", type=float, default=0.1, help="weight of the BCE loss (default: 0.1)")
    add("--lm", type=float, default=1.0, help="weight of the language loss (default: 1)")
    add("--no-lm-loss", action="store_true", help="ablation (paper, Tab. 5)")
    add("--no-location-loss", action="store_true", help="ablation; implies --no-predictor")
    add("--no-predictor", action="store_true", help="ablation: a weighted mean over heads instead")
    add("--no-visual-condition", action="store_true", help="ablation")
    add("--checkpointing", action="store_true", help="less memory: compute activations twice")


def _common(parser: argparse.ArgumentParser, **defaults) -> None:
    parser.add_argument("folder", type=Path, help="of the run: state, log, and what is written")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: 0)")
    parser.add_argument("--device", default="auto", help="(default: cuda where there is one)")
    parser.add_argument("--dtype", default="auto", help="(default: bfloat16 on cuda, else float32)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    helps = {
        "steps": "optimiser steps in all",
        "lr": "peak learning rate",
        "schedule": "cosine or trapezoid",
        "warmup": "share of the steps",
        "decay": "share of the steps that a trapezoid falls at its end",
        "betas": "of AdamW",
        "weight_decay": "of matrices",
        "grad_norm": "gradients are clipped to this norm",
        "accumulate": "micro-batches of a step",
        "save_every": "steps between saved states",
        "evaluate_every": "steps between evaluations",
        "log_every": "steps between lines of the log",
        "workers": "processes that make data; 0 makes it in place",
    }
    ends = {"steps": "one epoch of a file"}
    for field in fields(Recipe):
        value = defaults.get(field.name, field.default)
        pair = {"nargs": 2} if field.name == "betas" else {}
        pair |= {"choices": SCHEDULES} if field.name == "schedule" else {}
        kind = float if field.name == "betas" else type(value)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=value,
            help=f"{helps[field.name]} (default: {value or ends.get(field.name, value)})",
            **pair,
        )


def _recipe(args: argparse.Namespace) -> Recipe:
    values = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    return Recipe(**values | {"betas": tuple(args.betas)})


def _place(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    cuda = torch.cuda.is_available()
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = torch.device((own if cuda else "cpu") if args.device == "auto" else args.device)
    name = ("bfloat16" if cuda else "float32") if args.dtype == "auto" else args.dtype
    if name not in ("float32", "bfloat16"):
        raise UsageError(f"dtype {name} cannot be trained in; take float32 or bfloat16")
    return device, getattr(torch, name)


def _say(line: str) -> None:
    print(line, flush=True)


def _base(args: argparse.Namespace) -> int:
    device, dtype = _place(args)
    recipe = _recipe(args)
    if args.retokenize and not args.init:
        raise UsageError("--retokenize is of a checkpoint; name it with --init")
    init = None
    if args.init and not (args.folder / STATE).exists():
        init = locate(args.init, [*SETTINGS, TOKENIZER, "*.safetensors"])
    if not (args.folder / "config.json").exists():
        if init and not args.retokenize:
            copy_folder(init, args.folder)
        else:
            shape = init / "config.json" if init else args.shape
            write_folder(args.folder, read_json(shape) if shape else NANO, args.seed)
    micros = recipe.steps * recipe.accumulate * processes()
    stages = [
        replace(
            stage,
            work=args.scale * stage.work,
            draws=tuple(draw for draw in stage.draws if draw.domain in args.domains),
        )
        for stage in CURRICULA[args.curriculum]
    ]
    stages = [stage for stage in stages if stage.draws]
    task = BaseTask(args.folder, stages, micros, args.seed, device, dtype, init)
    return _run(task, args)


def _run(task: Task, args: argparse.Namespace) -> int:
    same = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    finished = train(task, _recipe(args), args.folder, same=same, said=_say)
    _say(f"{'written to' if finished else 'stopped; the same command goes on from'} {args.folder}")
    return 0 if finished else 130


def _glimpse(args: argparse.Namespace) -> int:
    device, dtype = _place(args)
    engine = load(args.model, device=str(device), dtype=str(dtype)[6:], backend=OPS)
    for name in ("brief", "token_rate", "threshold"):
        value = getattr(args, name)
        if not 0 <= value <= 1:
            raise UsageError(f"--{name.replace('_', '-')} {value:g} is no share; give 0 to 1")
    if args.data.partition(":")[0] == "world":
        source = World(
            domains_of(args.data),
            args.pictures,
            args.questions,
            args.seed,
            short=args.short,
            brief=args.brief,
        )
        if not args.steps:
            raise UsageError("the world has no end; say how many --steps")
    elif args.short or args.brief:
        raise UsageError("--short and --brief are of the world; a file has its own answers")
    else:
        source = File(Path(args.data), args.images or Path(args.data).parent, args.seed)
        if source.missing:
            _say(f"{len(source.missing)} pictures are missing, the first is {source.missing[0]}")
    if not args.steps:
        args.steps = -(-source.count // (args.accumulate * processes()))
    location = not args.no_location_loss
    losses = Losses(args.dice * location, args.bce * location, args.lm * (not args.no_lm_loss))
    task = GlimpseTask(
        engine,
        _glimpse_config(args, engine.config),
        losses,
        source,
        dropout=args.dropout,
        seed=args.seed,
        checkpointing=args.checkpointing,
        begin=None if args.token is None else _token(engine, args.token),
        token_rate=args.token_rate,
    )
    return _run(task, args)


def _token(engine: Engine, text: str) -> int:
    ids = engine.processor.tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        raise UsageError(f"--token {text!r} is {len(ids)} tokens of this model; give one")
    return ids[0]


def _glimpse_config(args: argparse.Namespace, config: Config) -> GlimpseConfig:
    """The paper's choices for this model (Tab. 14), with the ablations asked for."""
    depth, blocks = config.text_config.num_hidden_layers, config.vision_config.depth
    layer = args.layer or -(-2 * depth // 3)
    if not 1 <= layer <= depth:
        raise UsageError(f"layer {layer} is not one of the model's {depth}")
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
        # Attention that nobody taught a place for has no natural threshold: only a cap prunes.
        reduce_threshold=0.0 if args.no_location_loss else args.threshold,
        max_remain_ratio=1 / 9 if args.no_location_loss else None,
    )
    check_glimpse(config, glimpse, "the options")
    return glimpse


if __name__ == "__main__":
    sys.exit(main())
