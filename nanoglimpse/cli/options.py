"""The options that commands share, each declared once, and what they mean for the engine."""

import argparse
import time
from dataclasses import fields
from typing import Any

from nanoglimpse.cli.console import Parser, Progress, adder, note
from nanoglimpse.engine import Engine
from nanoglimpse.inference.sampling import Sampling
from nanoglimpse.kernels.backends import BACKENDS
from nanoglimpse.kernels.quantize import MODES
from nanoglimpse.loader import load
from nanoglimpse.methods.options import KV_DROPS, Pruning

# By group and flag: the default or the type, the help, and whatever else `console.adder` takes.
SHARED: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {
        "--model": ("nano", "'nano', a folder or a Hub id"),
        "--glimpse": (str, "folder or Hub id of glimpse weights", "MODEL/glimpse"),
        "--adapter": (str, "folder or Hub id of a LoRA adapter to merge (PEFT layout)"),
        "--device": ("auto", "auto, cpu, cuda or cuda:N"),
        "--dtype": ("auto", "auto, float32, bfloat16 or float16"),
        "--backend": ("auto", f"kernels: {', '.join(BACKENDS)}"),
        "--quantize": (str, "store the decoder's matrices in few bits", "", MODES),
    },
    "pictures": {
        "--min-pixels": (int, "enlarge pictures with fewer pixels", "the model's"),
        "--max-pixels": (int, "shrink pictures or frames with more pixels", "the model's"),
    },
    "pruning": {
        "--method": (
            str,
            "name of a pruning method (see --list-methods) or file.py:Class",
            "glimpse where there are weights for it",
        ),
        "--threshold": (float, "keep tokens whose probability is above this", "the weights' own"),
        "--max-ratio": (float, "keep at most this share of the visual tokens", "no cap"),
        "--max-frame-ratio": (float, "keep at most this share of a pair of frames", "no cap"),
        "--min-tokens": (int, "keep at least this many visual tokens", "the weights' own, or 1"),
        "--kv-drop": (
            Pruning.kv_drop,
            "drop tokens from the caches of all layers, or only of later layers",
            "",
            KV_DROPS,
        ),
        "--keep-videos": (False, "prune images only, not videos"),
    },
    "answer": {
        "--max-new-tokens": (128, "upper limit for the tokens of an answer"),
        "--temperature": (Sampling.temperature, "0 takes the most likely token"),
        "--top-p": (Sampling.top_p, "draw from the smallest set of tokens with this probability"),
        "--top-k": (Sampling.top_k, "draw from the k most likely tokens; 0 for all"),
        "--repetition-penalty": (1.0, "divide the logits of tokens seen before by this"),
        "--seed": (int, "make sampling repeatable"),
    },
}


def add_shared(parser: Parser, group: str, *flags: str, **defaults: Any) -> None:
    """Declares a group of shared options: the given ones or all, some with another default."""
    add = adder(parser.add_argument_group(group))
    for flag, (default, *rest) in SHARED[group].items():
        if not flags or flag in flags:
            add(flag, defaults.get(flag[2:].replace("-", "_"), default), *rest)


def pruning_of(args: argparse.Namespace) -> Pruning:
    """The pruning that the options ask for.

    Raises:
        UsageError: it makes no sense, whatever the model.
    """
    return Pruning(**_fields(Pruning, args), prune_videos=not args.keep_videos)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling that the options ask for.

    Raises:
        UsageError: a value is out of its range.
    """
    return Sampling(**_fields(Sampling, args))


def _fields(options: type, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a dataclass that are options of the command line."""
    names = [field.name for field in fields(options)]
    return {name: getattr(args, name) for name in names if name in args}


def prompt_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Processor.prompt`."""
    return {name: getattr(args, name) for name in ("system", "min_pixels", "max_pixels")}


def given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options that differ from their defaults."""
    defaults = vars(parser.parse_args([]))
    return {name: value for name, value in vars(args).items() if value != defaults[name]}


def load_engine(args: argparse.Namespace, **changes: Any) -> Engine:
    """The engine that the options name, with progress and a line about it on stderr.

    Raises:
        UsageError, NanoglimpseError: as `load`.
    """
    started = time.perf_counter()
    names = ("glimpse", "adapter", "device", "dtype", "backend", "quantize")
    options = {name: getattr(args, name) for name in names if name in args} | changes
    engine = load(args.model, **options, progress=Progress("weights", args.quiet, bytes=True))
    note(args)(f"model       {describe(engine)}, loaded in {time.perf_counter() - started:.1f} s")
    return engine


def describe(engine: Engine) -> str:
    """Name, size, dtype and device of a model."""
    model = engine.model
    weights = [p for part in (model.vision, model.decoder) for p in part.parameters()]
    where = f"{str(model.dtype)[6:]} on {model.device}"
    if model.quantized:
        size = in_bytes(sum(p.numel() * p.element_size() for p in weights))
        return f"{model.name}, {size} of weights, {model.quantized} in the decoder, {where}"
    count = sum(p.numel() for p in weights)
    size = f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
    return f"{model.name}, {size} parameters, {where}"


def in_bytes(count: int) -> str:
    """A number of bytes, for a person."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
