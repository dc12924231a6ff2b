"""The options that commands share, each declared once, and the objects that they describe."""

import argparse
import time
import warnings
from dataclasses import fields
from typing import Any

from nanoglimpse.cli.console import Parser, Progress, adder, note
from nanoglimpse.cli.kinds import (
    COUNT,
    DEVICE,
    FRACTION,
    NAME,
    NATURAL,
    PIXELS,
    SEED,
    SHARE,
    WEIGHT,
    number,
)
from nanoglimpse.config import GREEDY, Sampling
from nanoglimpse.engine import Engine
from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.backends import BACKENDS
from nanoglimpse.kernels.quantize import MODES
from nanoglimpse.loader import load
from nanoglimpse.methods.options import KV_DROPS, Pruning

CHECKPOINT = "as generation_config.json says, or "
DTYPES = ("auto", "float32", "bfloat16", "float16")
# By group and flag: the arguments of `console.add_option` after the flag.
SHARED: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {
        "--model": ("nano", "'nano', a folder, or a Hub id", "", None, NAME),
        "--glimpse": (NAME, "folder or Hub id of glimpse weights", "MODEL/glimpse"),
        "--adapter": (NAME, "folder or Hub id of a LoRA adapter to merge (PEFT layout)"),
        "--device": ("auto", "auto, cpu, cuda or cuda:N", "", None, DEVICE),
        "--dtype": ("auto", "type of the weights", "", DTYPES),
        "--backend": ("auto", "kernels to use", "", BACKENDS),
        "--offline": (False, "fetch nothing: no model, no picture; as HF_HUB_OFFLINE=1"),
        "--quantize": (str, "quantise the weights of the decoder", "", MODES),
    },
    "pictures": {
        "--min-pixels": (PIXELS, "enlarge pictures with fewer pixels", "the model's"),
        "--max-pixels": (PIXELS, "shrink pictures or frames with more pixels", "the model's"),
    },
    "pruning": {
        "--method": (
            NAME,
            "name of a pruning method (see --list-methods) or file.py:Class",
            "glimpse where there are weights for it",
        ),
        "--threshold": (FRACTION, "keep tokens with a probability above this", "the weights' own"),
        "--max-ratio": (FRACTION, "keep at most this share of the visual tokens", "no cap"),
        "--max-frame-ratio": (FRACTION, "keep at most this share of each pair of frames", "no cap"),
        "--min-tokens": (
            NATURAL,
            "keep at least this many visual tokens",
            "the weights' own, or 1",
        ),
        "--kv-drop": (
            Pruning.kv_drop,
            "drop tokens from the KV cache of all layers, or of later layers only",
            "",
            KV_DROPS,
        ),
        "--keep-videos": (False, "prune images only, not videos"),
    },
    "answer": {
        "--max-new-tokens": (128, "maximum number of tokens in an answer", "", None, COUNT),
        "--temperature": (WEIGHT, "sampling temperature; 0 is greedy", f"{CHECKPOINT}0"),
        "--top-p": (
            SHARE,
            "sample from the smallest set of tokens with this probability",
            f"{CHECKPOINT}1",
        ),
        "--top-k": (NATURAL, "sample from the k most likely tokens; 0 for all", f"{CHECKPOINT}0"),
        "--repetition-penalty": (
            number(0, open_low=True),
            "divide the logits of tokens seen before by this",
            f"{CHECKPOINT}1",
        ),
        "--greedy": (False, "take the most likely token, whatever generation_config.json says"),
        "--seed": (SEED, "seed that makes sampling repeatable"),
    },
}


def add_shared(parser: Parser, group: str, *flags: str, **defaults: Any) -> None:
    """Declares a group of shared options.

    Args:
        parser: parser that gets the options.
        group: name of the group.
        flags: the options to declare; all of the group if there are none.
        defaults: other defaults, by the name of the option.
    """
    add = adder(parser.add_argument_group(group))
    for flag, (default, *rest) in SHARED[group].items():
        if not flags or flag in flags:
            add(flag, defaults.get(flag[2:].replace("-", "_"), default), *rest)


def pruning_of(args: argparse.Namespace) -> Pruning:
    """The pruning that the options ask for.

    Raises:
        UsageError: a value is outside its range.
    """
    return Pruning(**_fields(Pruning, args), prune_videos=not args.keep_videos)


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling that the options ask for.

    Raises:
        UsageError: a value is outside its range, or contradicts `--greedy`.
    """
    sampling = Sampling(**_fields(Sampling, args))
    if args.greedy and sampling.temperature:
        raise UsageError("--greedy cannot be combined with a --temperature above 0")
    return sampling.over(GREEDY) if args.greedy else sampling


def _fields(options: type, args: argparse.Namespace) -> dict[str, Any]:
    """Values of the options that are fields of a dataclass."""
    names = [field.name for field in fields(options)]
    return {name: getattr(args, name) for name in names if name in args}


def prompt_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `Processor.prompt`."""
    return {name: getattr(args, name) for name in ("system", "min_pixels", "max_pixels")}


def given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options that differ from their defaults."""
    defaults = vars(parser.parse_args([]))
    return {name: value for name, value in vars(args).items() if value != defaults[name]}


def load_engine(args: argparse.Namespace, *, check: bool = True, **changes: Any) -> Engine:
    """Loads the engine that the options describe, and prints progress and its name on stderr.

    Args:
        args: the options.
        check: warm it up where it is on a GPU, and name the operations that are at fault.
        changes: other arguments of `load`.

    Raises:
        UsageError, NanoglimpseError: as `load`.
    """
    started = time.perf_counter()
    names = ("glimpse", "adapter", "device", "dtype", "backend", "quantize")
    options = {name: getattr(args, name) for name in names if name in args} | changes
    tell = note(args)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: tell(f"warning     {message}")
        engine = load(args.model, **options, progress=Progress("weights", args.quiet, bytes=True))
    tell(f"model       {describe(engine)}, loaded in {time.perf_counter() - started:.1f} s")
    for op in engine.warm_up() if check and engine.device.type == "cuda" else ():
        if op.fault:
            tell(f"kernels     {op.name}: {op.fault}; torch runs it (see nanoglimpse doctor)")
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
    """A number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
