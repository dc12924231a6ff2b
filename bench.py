"""Times this engine, dense and pruned, beside transformers with the same weights, in one run.

    python bench.py                                       the embedded checkpoint, 448 × 448 px
    python bench.py --shape 3b --visual-tokens 256 1024 5000 16384 --retain 1 0.333 0.111 0.04
    python bench.py --shape 3b --layers 4 --device cpu    for a machine that is too small
    python bench.py --kernels --shape 7b                  each operation alone

A shape is built from random weights on the device; as those prune at random, the share that stays
is forced while glimpse and predictor run all the same. Rounds alternate between the arms, so that
a ratio holds when the machine drifts. A gate comes first: what computes wrong is not timed. Floors
are operations over the rate of a large product and bytes over the bandwidth of reading a large
tensor, both measured first. A ceiling is the speed-up of who reaches the floor. The last line of
stdout is one JSON object.
"""

import argparse
import io
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import nanoglimpse
from nanoglimpse.config import Config, GlimpseConfig, parse_config, read_json
from nanoglimpse.cost import Cost, Work, paper_prefill
from nanoglimpse.decoder import Decoder
from nanoglimpse.engine import Engine
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.files import write_whole
from nanoglimpse.glimpse import Glimpse
from nanoglimpse.kernels.ops import TORCH, Ops, Packing, Rope, select
from nanoglimpse.kernels.quantized import KINDS
from nanoglimpse.kernels.quantized import check as check_quantized
from nanoglimpse.methods import METHODS, Choice, Look
from nanoglimpse.methods.glimpse import GlimpsePrune
from nanoglimpse.processor import Processor, Prompt, preprocess_image
from nanoglimpse.vision import VisionEncoder
from nanoglimpse.weights.checkpoint import fill
from nanoglimpse.weights.names import parts

HERE = Path(__file__).parent
EXAMPLES = HERE / "weights" / "nano" / "examples"
SHAPES = HERE / "tests" / "configs"
QUESTION = "Which number is written on the red triangle?"
# How far logits may be from those of the same weights elsewhere, relative to their norm.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
KINDS_OF_NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="nano", help="checkpoint to time (default: nano)")
    p.add_argument("--image", default=EXAMPLES / "scene_4.png", help="(default: a 448 px scene)")
    p.add_argument("--shape", help="3b, 7b or a config.json: random weights instead")
    p.add_argument("--layers", type=int, help="of a shape, in each tower (default: all)")
    p.add_argument("--visual-tokens", type=int, nargs="+", default=[256], help="(default: 256)")
    p.add_argument("--retain", type=float, nargs="+", help="shares to force (a shape's: 0.111)")
    p.add_argument("--text", type=int, default=40, help="text tokens of a shape (default: 40)")
    p.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts (default: 1)")
    p.add_argument("--new", type=int, default=64, help="tokens to answer (default: 64)")
    p.add_argument("--rounds", type=int, default=11, help="counted rounds (default: 11)")
    p.add_argument("--dtype", default="auto", help="(default: auto)")
    p.add_argument("--device", default="auto", help="(default: auto)")
    p.add_argument("--backend", default="auto", help="of the kernels (default: auto)")
    p.add_argument("--quantize", choices=KINDS, help="decoder weights in few bits")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    p.add_argument("--alone", action="store_true", help="without transformers")
    p.add_argument("--kernels", action="store_true", help="time operations instead of answers")
    p.add_argument("--plot", metavar="PNG", help="prefill and decode against visual tokens")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        return run(args)
    except (NanoglimpseError, OSError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Builds, measures the roofs, then kernels or cases."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if min(args.new, args.rounds, args.text, *args.batch, *args.visual_tokens) < 1 or args.new < 2:
        raise UsageError("rounds, batch, text and visual tokens are at least 1, new at least 2")
    if not all(0 < share <= 1 for share in args.retain or ()):
        raise UsageError(f"retain {args.retain} are no shares; give more than 0, up to 1")
    say("building")
    engine = random_engine(args, args.quantize) if args.shape else stored_engine(args)
    roofs = Roofs(engine)
    summary = {"machine": machine(args, engine, roofs), "cases": []}
    print("  ".join(f"{key} {value}" for key, value in summary["machine"].items()))
    if args.kernels:
        summary["kernels"] = kernels(engine, roofs, args)
        print(json.dumps(summary))
        return 0
    if args.quantize:
        summary["accuracy"] = accuracy(engine, args)
    peer = None if args.alone else Peer.load(engine, args)
    wrong = 0
    for visual in args.visual_tokens if args.shape else [0]:
        for batch in args.batch:
            case = Case(engine, peer, roofs, args, visual, batch)
            faults = case.faults()
            if faults:
                wrong += 1
                print(f"\n{case.title}: not timed, it computes wrong: {'; '.join(faults)}")
                continue
            case.measure()
            summary["cases"].append(case.report())
    if args.plot and summary["cases"]:
        plot(Path(args.plot), summary["cases"])
    if summary["cases"]:
        print("\n" + gains(summary["cases"][-1]))
    print(json.dumps(summary))
    return 1 if wrong else 0


# Models


def stored_engine(args: argparse.Namespace) -> Engine:
    """The checkpoint named."""
    return nanoglimpse.load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
        quantize=args.quantize,
    )


def shape_config(args: argparse.Namespace) -> dict:
    """config.json of a shape, with fewer layers if asked."""
    file = SHAPES / f"qwen2.5-vl-{args.shape}.json"
    config = read_json(file if args.shape in ("3b", "7b") else Path(args.shape))
    if args.layers:
        config["num_hidden_layers"] = config["vision_config"]["depth"] = args.layers
        full = config["vision_config"]["fullatt_block_indexes"]
        left = [block for block in full if block < args.layers]
        config["vision_config"]["fullatt_block_indexes"] = left or [args.layers - 1]
    return config


def random_tensors(
    module: nn.Module, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, Tensor]]:
    """Random (file, name, tensor) for all that `module` loads; the same in every call."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    for name, part in parts(module).items():
        shape = (part.stop - part.start, *shapes[part.name][1:])
        # Drawn in fp32 whatever the dtype, so that the same model can be had in several.
        draw = torch.empty(shape, device=device)
        draw.normal_(0, 0.02 if len(shape) == 1 else shape[1] ** -0.5, generator=generator)
        yield "random", name, (draw + 1 if "norm" in name or "ln_q" in name else draw).to(dtype)


def skeleton(config: Config, ops: Ops) -> nn.ModuleDict:
    """The model on the meta device."""
    with torch.device("meta"):
        vision, decoder = VisionEncoder(config.vision_config, ops), Decoder(config, ops)
    return nn.ModuleDict({"vision": vision, "decoder": decoder})


def random_engine(args: argparse.Namespace, quantize: str | None) -> Engine:
    """A model of a shape, with glimpse weights, on the device."""
    device = nanoglimpse.engine._device(args.device)
    ops, config = select(args.backend, device), parse_config(shape_config(args), args.shape)
    dtype = nanoglimpse.engine._dtype(args.dtype, device, config)
    if quantize:
        check_quantized(quantize, device)
    model = skeleton(config, ops)
    vision, decoder = model["vision"], model["decoder"]

    def whole(name: str, tensor: Tensor) -> dict[str, Tensor]:
        own = name.removeprefix("decoder.")
        if not quantize or own == name:
            return {name: tensor}
        return {f"decoder.{k}": v for k, v in decoder.quantize(own, tensor, quantize).items()}

    source = random_tensors(model, device, dtype)
    fill(model, source, parts(model), lambda name: False, dtype, device, whole)
    vision.pack(ops)
    decoder.pack(ops)
    glimpse = random_glimpse(config, ops, device, dtype)
    processor = Processor(SHAPES, config)
    return Engine(
        args.shape, config, vision, decoder, glimpse, processor, frozenset(), ops, quantize
    )


def random_glimpse(config: Config, ops: Ops, device: torch.device, dtype: torch.dtype) -> Glimpse:
    """Glimpse weights of the published sizes for a model of any depth."""
    published, depth = (
        read_json(SHAPES / "glimpseprune-3b.json"),
        config.text_config.num_hidden_layers,
    )
    last = config.vision_config.depth - 1
    known = {f.name: published[f.name] for f in fields(GlimpseConfig) if f.name in published}
    known |= {
        "reduce_layer": -(-2 * depth // 3) - 1,
        "selected_layers": [-(-2 * depth // 3) - 1],
        "le_layers": range(depth),
        "selected_visual_layers": sorted({last - i * (last + 1) // 4 for i in range(4)})[::-1],
    }
    known = {k: tuple(v) if isinstance(v, list | range) else v for k, v in known.items()}
    with torch.device("meta"):
        glimpse = Glimpse(config, GlimpseConfig(**known), ops)
    module = nn.ModuleDict({"predictor": glimpse.predictor})
    fill(
        module, random_tensors(module, device, dtype), parts(module), lambda _: False, dtype, device
    )
    vectors = torch.randn(depth, config.text_config.hidden_size).to(device, dtype)
    glimpse.vectors = nn.Parameter(vectors, requires_grad=False)
    return glimpse


class Forced(GlimpsePrune):
    """GlimpsePrune that does all its work and then keeps a given share, evenly spaced."""

    def __init__(self, share: float):
        self.share_kept, self.name = share, f"pruned to {share:.1%}"

    def choose(self, look: Look) -> Choice:
        """The share of each prompt's visual tokens."""
        choice = super().choose(look)
        kept = torch.zeros_like(choice.kept)
        for own in look.prompts():
            count = own.stop - own.start
            left = max(round(self.share_kept * count), 1)
            kept[own.start + torch.arange(left, device=kept.device) * count // left] = True
        return replace(choice, kept=kept)


# Arms


def now() -> float:
    """Seconds, after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Task:
    """What is asked: B copies of a picture and a question, and how the prompt is made."""

    def __init__(self, engine: Engine, args: argparse.Namespace, visual: int, batch: int):
        self.engine, self.args, self.batch = engine, args, batch
        self.picture = noise(visual) if visual else Image.open(args.image).convert("RGB")
        self.prompt = self.preprocess()

    def preprocess(self) -> Prompt:
        """The prompt from the picture; where there is no tokenizer, random text."""
        if self.engine.processor.tokenizer:
            return self.engine.prompt(self.picture, QUESTION)
        config = self.engine.config
        patches, grid = preprocess_image(self.picture, config=self.engine.processor.pixels)
        count = grid[1] * grid[2] // config.vision_config.merge_unit
        text = [5 + i % 90 for i in range(self.args.text)]
        half = len(text) // 2
        ids = [*text[:half], config.vision_start_token_id, *[config.image_token_id] * count]
        ids += [config.vision_end_token_id, *text[half:]]
        return Prompt.from_tokens(ids, patches, [grid], config=config)


def noise(visual: int) -> Image.Image:
    """A picture of so many visual tokens, as square as their number allows."""
    root = isqrt(visual)
    rows = next((r for r in range(root, root // 2, -1) if visual % r == 0), root)
    return Image.effect_noise((28 * max(visual // rows, 1), 28 * rows), 64).convert("RGB")


class Ours:
    """This engine with one method; a round is an answer from the picture to the last token."""

    def __init__(self, task: Task, method: str):
        self.task, self.engine, self.method = task, task.engine, method

    def prefill(self, count: int, **options):
        """The task's prompts, read."""
        prompts = [self.task.prompt] * self.task.batch
        return self.engine.prefill_many(prompts, self.method, max_new_tokens=count, **options)

    def round(self, new: int) -> dict:
        """Milliseconds by stage, and of each token in a list."""
        memory, start = Memory(self.engine.device), now()
        self.task.preprocess()
        prepared = now()
        prefill = self.prefill(new)
        self.kv = prefill.cache.rows, prefill.cache.nbytes
        moments = [now() for _ in self.engine.decode_many(prefill, new, ignore_eos=True)]
        peak = memory.peak()
        stages = prefill.timings
        vision = stages.pop("vision")
        head = self.head()
        upper = next(reversed(stages))  # the layers that end with the head
        stages[upper] = max(stages[upper] - head, 0.0)
        self.left = prefill.positions.shape[1] // self.task.batch
        return {
            "preprocess": 1000 * (prepared - start),
            "vision": vision,
            **{name.replace("layers", "prefill"): value for name, value in stages.items()},
            "lm_head": head,
            "all prefill": sum(stages.values()) + head,
            "first token": 1000 * (moments[0] - start),
            **per_token(moments),
            "end to end": 1000 * (moments[-1] - start),
            "memory": peak,
        }

    @torch.inference_mode()
    def head(self) -> float:
        """Milliseconds of the final norm and the head alone."""
        hidden = torch.ones(
            self.task.batch, self.engine.config.text_config.hidden_size, device=self.engine.device
        )
        hidden = hidden.to(self.engine.dtype)
        return 1000 * best(lambda: self.engine.decoder.logits(hidden), 1)


class Peer:
    """transformers as its users run it: SDPA, DynamicCache, `generate`, last-row logits."""

    def __init__(self, model, pixels, version: str):
        self.model, self.pixels, self.version = model.eval(), pixels, version

    @classmethod
    def load(cls, engine: Engine, args: argparse.Namespace) -> "Peer | None":
        """None where transformers is not installed."""
        try:
            import transformers
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
                Qwen2VLImageProcessorPil,
            )
        except ImportError:
            return None
        say("building transformers")
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        options = {"dtype": engine.dtype, "attn_implementation": "sdpa"}
        build = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained
        if args.shape:
            meta, vision = skeleton(engine.config, TORCH), engine.config.vision_config
            tensors = {n: t for _, n, t in random_tensors(meta, engine.device, engine.dtype)}
            kernel = (-1, vision.in_channels, vision.temporal_patch_size, *[vision.patch_size] * 2)
            patch = "visual.patch_embed.proj.weight"
            tensors[patch] = tensors[patch].view(kernel)
            config = transformers.Qwen2_5_VLConfig.from_dict(shape_config(args))
            model = build(None, config=config, state_dict=tensors, **options)
        else:
            model = build(engine.processor.folder, **options)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        own = engine.processor.pixels
        names = ("min_pixels", "max_pixels", "image_mean", "image_std")
        pixels = Qwen2VLImageProcessorPil(**{name: getattr(own, name) for name in names})
        return cls(model.to(engine.device), pixels, transformers.__version__)

    def at(self, task: Task) -> "Peer":
        """The same model on a task."""
        peer = Peer(self.model, self.pixels, self.version)
        peer.task = task
        peer.inputs = peer.preprocess()
        return peer

    def preprocess(self) -> dict[str, Tensor]:
        """Pixels from the picture; token ids are taken over, which spares it the chat template."""
        task, device = self.task, self.task.engine.device
        pixels = self.pixels(images=task.picture, return_tensors="pt")
        ids = task.prompt.token_ids[None].expand(task.batch, -1).contiguous()
        kinds = (ids == task.engine.config.image_token_id).int()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = kinds
        copies = {name: torch.cat([tensor] * task.batch) for name, tensor in pixels.items()}
        return {name: tensor.to(device) for name, tensor in (inputs | copies).items()}

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """Of the last rows, [B, vocab]."""
        return self.model(**self.inputs, logits_to_keep=1, use_cache=True).logits[:, -1]

    @torch.inference_mode()
    def vision(self):
        """Visual tokens."""
        patches = self.inputs["pixel_values"].to(self.model.dtype)
        return self.model.model.visual(patches, grid_thw=self.inputs["image_grid_thw"])

    def tokens(self, count: int, **options) -> Tensor:
        """The first tokens, [B, count]."""
        out = self.model.generate(**self.inputs, max_new_tokens=count, do_sample=False, **options)
        return out[:, self.inputs["input_ids"].shape[1] :]

    def round(self, new: int) -> dict:
        """Milliseconds by stage."""
        spent = {}
        for stage in ("preprocess", "vision", "logits"):
            start = now()
            getattr(self, stage)()
            spent[stage] = 1000 * (now() - start)
        memory, moments, start = Memory(self.task.engine.device), Moments(), now()
        self.tokens(new, streamer=moments)
        before, tokens = spent["preprocess"] - 1000 * start, moments.of_tokens
        return {
            "preprocess": spent["preprocess"],
            "vision": spent["vision"],
            "all prefill": max(spent["logits"] - spent["vision"], 0.0),
            "first token": before + 1000 * tokens[0],
            **per_token(tokens),
            "end to end": before + 1000 * tokens[-1],
            "memory": memory.peak(),
        }


class Moments:
    """A streamer of transformers that notes when each token came."""

    def __init__(self):
        self.of_tokens: list[float] = []
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        if self.prompt_seen:
            self.of_tokens.append(now())
        self.prompt_seen = True

    def end(self) -> None:
        """The answer ends."""


def per_token(moments: list[float]) -> dict:
    """Milliseconds of each token behind the first, and their mean."""
    tokens = [1000 * (after - before) for before, after in pairwise(moments)]
    return {"a token": statistics.mean(tokens), "tokens": tokens}


class Memory:
    """The most memory since it was made: on a GPU beyond what there was, else of the process."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError):  # no Linux
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what there is now

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return peak_resident()


def peak_resident() -> int:
    """Bytes of the process at most; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 0


# Roofs


# What the roofs are measured with: rows and columns of a product, bytes to read.
SIDE = {"cuda": 8192, "cpu": 2048}
READ = 2**28


class Roofs:
    """What the device reaches: FLOP/s of a large product, bytes/s of reading, in this dtype."""

    def __init__(self, engine: Engine):
        device, dtype, ops = engine.device, engine.dtype, engine.ops
        size = SIDE.get(device.type, 2048)
        with torch.inference_mode():
            a = torch.randn(size, size, device=device).to(dtype)
            packed = ops.pack(a)
            products = (lambda: a @ a, lambda: ops.linear(a, packed, None))
            self.rate = 2 * size**3 / min(best(call, 4) for call in products)
            big = torch.ones(READ // a.element_size(), device=device, dtype=dtype).view(-1, 8192)
            matrix, row = ops.pack(big), big[:1].clone()
            reads = (big.sum, lambda: ops.linear(row, matrix, None), lambda: F.linear(row, big))
            self.bandwidth = READ / min(best(call, 5) for call in reads)

    def floor(self, cost: Cost) -> float:
        """Milliseconds."""
        return 1000 * cost.seconds(self.rate, self.bandwidth)


def best(call: Callable, rounds: int) -> float:
    """Seconds of the fastest of some runs behind one that warms up."""
    call()
    spent = []
    for _ in range(rounds):
        start = now()
        call()
        spent.append(now() - start)
    return min(spent)


# Cases

BETWEEN = ("preprocess", "vision", "all prefill", "first token", "a token", "end to end")


class Case:
    """One number of visual tokens and one batch size, with all arms."""

    def __init__(self, engine, peer, roofs, args, visual, batch):
        self.engine, self.roofs, self.args = engine, roofs, args
        self.task = task = Task(engine, args, visual, batch)
        self.visual = int(task.prompt.visual.sum())
        self.title = f"{self.visual} visual tokens, {len(task.prompt)} rows, batch {batch}"
        self.arms = {"dense": Ours(task, "dense")}
        shares = args.retain or ([0.111] if args.shape else [])
        for method in (Forced(share) for share in shares if share < 1 and engine.glimpse):
            METHODS[method.name] = method
            self.arms[method.name] = Ours(task, method.name)
        if not shares and engine.glimpse:
            self.arms["pruned"] = Ours(task, "glimpse")
        self.peer = peer.at(task) if peer else None
        if self.peer:
            self.arms[f"transformers {peer.version}, SDPA"] = self.peer

    def faults(self) -> list[str]:
        """What computes something else than it should."""
        say(f"{self.title}: checking")
        limit, found = CLOSE[self.engine.dtype], []
        dense = self.arms["dense"]

        def check(what: str, ours: Tensor, theirs: Tensor) -> None:
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            if not error <= limit:
                found.append(f"{what} differ by {error:.1e}, more than {limit:g}")

        logits = dense.prefill(2).logits
        if self.peer and not self.engine.quantized:
            check("logits from transformers'", logits, self.peer.logits())
            if self.engine.dtype == torch.float32:
                count = min(self.args.new, 16)
                steps = self.engine.decode_many(dense.prefill(count), count, ignore_eos=True)
                if list(map(list, zip(*steps, strict=True))) != self.peer.tokens(count).tolist():
                    found.append("tokens differ from transformers'")
        if self.engine.glimpse:
            METHODS["all"] = Forced(1.0)
            check("keeping all and dense", Ours(self.task, "all").prefill(2).logits, logits)
        for name, arm in self.arms.items():
            if isinstance(arm, Ours) and name != "dense":
                inside, after = arm.prefill(2), arm.prefill(2, trace=True)
                check(f"{name} inside and after layer K", inside.logits, after.logits)
                left = inside.positions.shape[1]
                if inside.cache.rows != left * self.engine.config.text_config.num_hidden_layers:
                    found.append(f"{name} leaves other rows in the cache")
        return found

    def measure(self) -> None:
        """Rounds that alternate between the arms; the first warms up."""
        self.figures = {name: defaultdict(list) for name in self.arms}
        for number in range(self.args.rounds + 1):
            say(f"{self.title}: round {number} of {self.args.rounds}")
            for name, arm in self.arms.items():
                for stage, value in arm.round(self.args.new).items():
                    if number:
                        self.figures[name][stage].append(value)

    def costs(self, arm: Ours) -> dict[str, Cost]:
        """Of the stages of an arm."""
        work = Work(
            self.engine, self.task.prompt.grids, len(self.task.prompt), self.visual, self.task.batch
        )
        left = arm.left
        costs = {"vision": work.vision()}
        if arm.method == "dense":
            costs["prefill"] = work.prefill(0, work.rows)
        else:
            stop = self.engine.glimpse.config.layers
            costs |= {
                f"prefill < {stop}": work.below(stop, left),
                "score": work.score(),
                "keep": work.keep(stop, left),
                f"prefill ≥ {stop}": work.prefill(stop, left),
            }
        self.stages = [*costs]
        costs["lm_head"] = work.head()
        costs["a token"] = work.step(left + self.args.new // 2)
        return costs

    def floors(self, arm: Ours) -> dict[str, float]:
        """Least milliseconds of the stages, and of what they add up to."""
        floors = {stage: self.roofs.floor(cost) for stage, cost in self.costs(arm).items()}
        prefill = [s for s in floors if s not in ("vision", "a token")]
        floors["all prefill"] = sum(floors[stage] for stage in prefill)
        floors["first token"] = floors["vision"] + floors["all prefill"]
        floors["end to end"] = floors["first token"] + (self.args.new - 1) * floors["a token"]
        return floors

    def middle(self, name: str, stage: str) -> float | None:
        """The median."""
        values = self.figures[name][stage]
        return statistics.median(values) if values else None

    def report(self) -> dict:
        """Prints the tables; what goes into the JSON line."""
        print(f"\n{self.title}, {self.args.new} new tokens, medians of {self.args.rounds} rounds")
        ours = [name for name, arm in self.arms.items() if isinstance(arm, Ours)]
        entry = {"title": self.title, "visual_tokens": self.visual, "batch": self.task.batch}
        entry["arms"] = {name: self._arm(name) for name in ours}
        if self.peer:
            name = [*self.arms][-1]
            entry["arms"][name] = {"ms": {s: self._rounded(name, s) for s in BETWEEN}}
        entry["ratios"] = self._ratios(ours)
        return entry

    def _rounded(self, name: str, stage: str) -> float | None:
        value = self.middle(name, stage)
        return None if value is None else round(value, 4)

    def _arm(self, name: str) -> dict:
        """One of our arms, stage by stage."""
        arm, costs, floors = (
            self.arms[name],
            self.costs(self.arms[name]),
            self.floors(self.arms[name]),
        )
        total, rows, entry = self.middle(name, "end to end"), [], {}
        for stage in [s for s in self.figures[name] if s not in ("memory", "tokens")]:
            value, cost, floor = self.middle(name, stage), costs.get(stage), floors.get(stage)
            share = value * (self.args.new - 1 if stage == "a token" else 1) / total
            rows.append(
                [
                    named(stage),
                    f"{value:.2f}",
                    f"{share:.1%}",
                    f"{cost.flops / 1e9:.2f}" if cost else "",
                    f"{cost.bytes / 1e6:.2f}" if cost else "",
                    "" if floor is None else f"{floor:.3f}",
                    "" if not floor else f"{value / floor:.2f}",
                ]
            )
            entry[stage] = {"ms": round(value, 4), "floor_ms": floor}
            entry[stage] |= cost._asdict() if cost else {}
        p20, p80 = spread([ms for tokens in self.figures[name]["tokens"] for ms in tokens])
        entry["a token"] |= {"p20": round(p20, 4), "p80": round(p80, 4)}
        table([f"{name}", "ms", "share", "GFLOP", "MB", "floor ms", "× floor"], rows)
        of_what = "beyond the models" if self.engine.device.type == "cuda" else "of the process"
        memory, (kv_rows, kv_bytes) = self.middle(name, "memory"), arm.kv
        print(
            f"a token, p20 to p80: {p20:.2f} to {p80:.2f} ms; KV {kv_rows} rows, "
            f"{kv_bytes / 1e6:.2f} MB; peak memory {memory / 1e6:.1f} MB {of_what}"
        )
        entry["kv_rows"], entry["kv_bytes"], entry["peak_bytes"] = kv_rows, kv_bytes, memory
        entry |= self._conventions(arm, costs)
        return entry

    def _conventions(self, arm: Ours, costs: dict[str, Cost]) -> dict:
        """FLOPs of the decoder's prefill, counted exactly and as the paper does."""
        dense = arm.method == "dense"
        depth = self.engine.config.text_config.num_hidden_layers
        stop = depth if dense else self.engine.glimpse.config.layers
        exact = sum(costs[s].flops for s in [*self.stages, "lm_head"] if s != "vision")
        left = self.visual - (len(self.task.prompt) - arm.left)
        paper = paper_prefill(self.engine.config, stop, len(self.task.prompt), left)
        paper = self.task.batch * paper + (0 if dense else costs["score"].flops)
        print(f"prefill {exact / 1e9:.2f} GFLOP; {paper / 1e9:.2f} by the paper's convention")
        return {"prefill_flops": exact, "prefill_flops_paper": paper}

    def _ratios(self, ours: list[str]) -> dict:
        """Speed-ups, of the engine over transformers and of pruning over dense, and ceilings."""
        peer = [*self.arms][-1] if self.peer else None
        dense_floor, result, rows = self.floors(self.arms["dense"]), {}, []
        head = [""]
        if peer:
            head += ["engine over transformers", "ceiling"]
        for name in ours[1:]:
            head += [f"{name} over dense", "ceiling"] + (["over transformers"] if peer else [])
        for stage in BETWEEN:
            row, entry = [named(stage)], {}
            if peer:
                entry["engine"] = self._ratio(peer, "dense", stage)
                floor = dense_floor.get(stage)
                entry["engine_ceiling"] = self.middle(peer, stage) / floor if floor else None
                row += [shown(entry["engine"]), shown(entry["engine_ceiling"])]
            for name in ours[1:]:
                floor = self.floors(self.arms[name]).get(stage)
                entry[name] = self._ratio("dense", name, stage)
                entry[f"{name}_ceiling"] = dense_floor[stage] / floor if floor else None
                row += [shown(entry[name]), shown(entry[f"{name}_ceiling"])]
                if peer:
                    entry[f"{name}_both"] = self._ratio(peer, name, stage)
                    row += [shown(entry[f"{name}_both"])]
            result[stage] = entry
            rows.append(row)
        print("\nmilliseconds")
        cells = [[named(s), *(f"{self.middle(n, s):.2f}" for n in self.arms)] for s in BETWEEN]
        table(["", *self.arms], cells)
        print("\ntimes as fast; a ceiling is what this engine's floor would give")
        table(head, rows)
        return result

    def _ratio(self, over: str, under: str, stage: str) -> float:
        """The median over rounds of the quotient."""
        pairs = zip(self.figures[over][stage], self.figures[under][stage], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def spread(values: list[float]) -> tuple[float, float]:
    """The 20th and the 80th percentile."""
    values = sorted(values)
    fifth = len(values) // 5
    return values[fifth], values[-1 - fifth]


def named(stage: str) -> str:
    """A stage in a table."""
    return "prefill, all" if stage == "all prefill" else stage


def shown(ratio: float | None) -> str:
    """A ratio in a table."""
    return "" if ratio is None else f"{ratio:.2f}"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they need to be, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def gains(case: dict) -> str:
    """What was gained by what, in a line."""
    prefill, token = case["ratios"]["all prefill"], case["ratios"]["a token"]
    first = case["ratios"]["first token"]
    parts_of = []
    if "engine" in first:
        parts_of.append(
            f"the engine makes the first token {first['engine']:.2f}, a token "
            f"{token['engine']:.2f} times as fast as transformers"
        )
    arms = case["arms"]
    for name in [n for n in arms if "kv_rows" in arms[n] and n != "dense"]:
        rows = arms["dense"]["kv_rows"] / arms[name]["kv_rows"]
        parts_of.append(
            f"{name}, its prefill is {prefill[name]:.2f} (floors: "
            f"{prefill[f'{name}_ceiling']:.2f}), a token {token[name]:.2f} (floors: "
            f"{token[f'{name}_ceiling']:.2f}) times as fast as dense, with {rows:.1f} times fewer "
            "KV rows"
        )
    return f"{case['title']}: " + "; ".join(parts_of)


def accuracy(engine: Engine, args: argparse.Namespace) -> dict:
    """How far logits in few bits, and in bfloat16, are from those of the weights as they are."""
    plain = argparse.Namespace(**vars(args) | {"quantize": None})

    def build(dtype: str) -> Engine:
        plain.dtype = dtype
        return random_engine(plain, None) if args.shape else stored_engine(plain)

    task = Task(engine, args, args.visual_tokens[0] if args.shape else 0, 1)
    exact = build("float32").prefill(task.prompt, "dense").logits.float()
    errors = {}
    for name, one in {args.quantize: engine, "bfloat16": build("bfloat16")}.items():
        logits = one.prefill(task.prompt, "dense").logits.float()
        errors[name] = float((logits - exact).norm() / exact.norm())
    words = ", ".join(f"{name} {error:.2%}" for name, error in errors.items())
    print(f"accuracy: distance of the first logits from those in float32: {words}")
    return errors


# Operations alone


def kernels(engine: Engine, roofs: Roofs, args: argparse.Namespace) -> list[dict]:
    """Every operation of the backend beside the best of torch's own ways."""
    rows, entries = [], []
    for name, ours, others, cost in operations(engine, args.visual_tokens[0] + args.text):
        say(name)
        with torch.inference_mode():
            own, rival = best(ours, args.rounds), min(best(c, args.rounds) for c in others)
        compute = cost.flops / roofs.rate > cost.bytes / roofs.bandwidth
        amount = cost.flops / own / 1e9 if compute else cost.bytes / own / 1e9
        roof = 1e-9 * (roofs.rate if compute else roofs.bandwidth)
        unit = "GFLOP/s" if compute else "GB/s"
        rate, of_roof = f"{amount:.1f} {unit}", f"{amount / roof:.0%}"
        rows.append(
            [name, *(f"{1e3 * t:.3f}" for t in (own, rival)), f"{rival / own:.2f}", rate, of_roof]
        )
        entries.append({"name": name, "ms": 1e3 * own, "torch_ms": 1e3 * rival, unit: amount})
        entries[-1]["of_roof"] = amount / roof
    table(["operation", "ms", "torch's best ms", "×", "rate", "of the roof"], rows)
    return entries


def operations(engine: Engine, rows: int) -> Iterator[tuple[str, Callable, list[Callable], Cost]]:
    """(name, ours, torch's ways, cost) at the shapes of the model."""
    ops, text, dtype = engine.ops, engine.config.text_config, engine.dtype
    heads, kv, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    size, inner = text.hidden_size, text.intermediate_size

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=engine.device).to(dtype)

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None]

    one, packing = dtype.itemsize, Packing([rows], engine.device)
    q, k, v = make(rows, heads, width), make(rows, kv, width), make(rows, kv, width)
    sdpa = partial(F.scaled_dot_product_attention, *map(heads_first, (q, k, v)), enable_gqa=True)
    wide = partial(F.scaled_dot_product_attention, heads_first(q))
    repeated = [heads_first(x.repeat_interleave(heads // kv, 1)) for x in (k, v)]
    moved = (2 * q.numel() + 2 * k.numel()) * one
    yield (
        "prefill attention",
        lambda: ops.attention(q, k, v, packing, causal=True),
        [partial(sdpa, is_causal=True), lambda: wide(*repeated, is_causal=True)],
        Cost(2 * rows * rows * heads * width, moved),
    )
    yield (
        "decode attention",
        lambda: ops.decode_attention(q[:1], heads_first(k), heads_first(v), [0], [rows]),
        [
            lambda: F.scaled_dot_product_attention(
                heads_first(q[:1]), heads_first(k), heads_first(v), enable_gqa=True
            )
        ],
        Cost(4 * rows * heads * width, 2 * k.numel() * one),
    )
    x, weight = make(rows, size), make(size)
    yield (
        "RMSNorm",
        lambda: ops.rms_norm(x, weight, 1e-6),
        [lambda: F.rms_norm(x, (size,), weight, 1e-6)],
        Cost(4 * x.numel(), 2 * x.numel() * one),
    )
    gate_up = make(rows, 2 * inner)
    gate, up = gate_up.chunk(2, -1)
    yield (
        "SwiGLU",
        lambda: ops.swiglu(gate_up),
        [lambda: F.silu(gate) * up],
        Cost(4 * gate.numel(), 3 * gate.numel() * one),
    )
    rope = Rope.of(torch.randn(rows, width // 2, device=engine.device))
    yield (
        "rotation",
        lambda: ops.rotate(q, rope),
        [lambda: (q * rope.cos + q.roll(width // 2, -1) * rope.sin).type_as(q)],
        Cost(3 * q.numel(), 2 * q.numel() * one),
    )
    cache = (
        make(text.num_hidden_layers, rows, kv, width),
        make(text.num_hidden_layers, rows, kv, width),
    )
    kept = torch.arange(0, rows, 9, device=engine.device)
    hidden, room = make(rows, size), [torch.empty_like(c[:, : len(kept)]) for c in cache]
    moved = 2 * len(kept) * (2 * kv * width * text.num_hidden_layers + size) * one
    yield (
        "cache keep",
        lambda: ops.keep_rows(*cache, hidden, kept, *room, slice(0, len(kept))),
        [lambda: ([c.index_select(1, kept) for c in cache], hidden[kept])],
        Cost(0, moved),
    )
    matrix = make(2 * inner, size)
    packed = ops.pack(matrix)
    for name, some in (("product, all rows", x), ("product, one row", x[:1])):
        yield (
            name,
            partial(ops.linear, some, packed, None),
            [partial(F.linear, some, matrix)],
            Cost(2 * len(some) * matrix.numel(), (matrix.numel() + some.numel()) * one),
        )


# The figure

PANELS = {"all prefill": "prefill of the decoder", "a token": "decode, a token"}
COLOURS = ["#1f4e9c", "#c0392b", "#e08e0b", "#2e8b57", "#7d3c98", "#111111", "#17a2b8", "#d63384"]


def plot(path: Path, cases: list[dict]) -> None:
    """Milliseconds of prefill and decode against visual tokens, a line for each arm and batch."""
    lines = defaultdict(list)
    for case in cases:
        for name, arm in case["arms"].items():
            if "kv_rows" in arm:
                label = name if case["batch"] == 1 else f"{name}, batch {case['batch']}"
                lines[label].append((case["visual_tokens"], arm))
    image = Image.new("RGB", (1280, 570 + 24 * -(-len(lines) // 4)), "white")
    draw = ImageDraw.Draw(image)
    for number, label in enumerate(lines):
        x, y, colour = 90 + 290 * (number % 4), 546 + 24 * (number // 4), _colour(number)
        draw.line([x, y, x + 24, y], fill=colour, width=3)
        draw.text((x + 32, y), label, fill=colour, font=ImageFont.load_default(16), anchor="lm")
    for number, (stage, title) in enumerate(PANELS.items()):
        panel(draw, 90 + 640 * number, title, stage, lines)
    data = io.BytesIO()
    image.save(data, "PNG")
    write_whole(path, data.getvalue())
    say(f"wrote {path}\n")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def panel(draw: ImageDraw.ImageDraw, left: int, title: str, stage: str, lines: dict) -> None:
    """One chart, axes from zero."""
    font, top, width, height = ImageFont.load_default(16), 60, 500, 400
    most_x = max(x for points in lines.values() for x, _ in points)
    most_y = 1.1 * max(arm[stage]["ms"] for points in lines.values() for _, arm in points)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * x / most_x, top + height * (1 - y / most_y)

    draw.text((left, top - 40), f"{title}, ms", fill="black", font=font)
    for tick in range(5):
        x, y = most_x * tick / 4, most_y * tick / 4
        draw.line([place(0, y), place(most_x, y)], fill="#dddddd")
        draw.text(
            place(0, y),
            f"{y:.0f} " if most_y > 40 else f"{y:.2f} ",
            fill="black",
            font=font,
            anchor="rm",
        )
        draw.text(
            (place(x, 0)[0], top + height + 8), f"{x:.0f}", fill="black", font=font, anchor="ma"
        )
    draw.text(
        (left + width / 2, top + height + 32), "visual tokens", fill="black", font=font, anchor="ma"
    )
    for number, points in enumerate(lines.values()):
        colour = _colour(number)
        spots = [place(x, arm[stage]["ms"]) for x, arm in points]
        draw.line(spots, fill=colour, width=3)
        for x, y in spots:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
    draw.rectangle([left, top, left + width, top + height], outline="black")


def say(line: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def machine(args: argparse.Namespace, engine: Engine, roofs: Roofs) -> dict:
    """What ran where."""
    cuda = engine.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(engine.device) if cuda else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(engine.dtype)[6:],
        "quantize": engine.quantized,
        "backend": args.backend,
        "model": args.shape or args.model,
        "layers": engine.config.text_config.num_hidden_layers,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nanoglimpse": nanoglimpse.__version__,
        "commit": commit(),
        "matrix_gflops": round(roofs.rate / 1e9),
        "read_gb_per_s": round(roofs.bandwidth / 1e9, 1),
    }


def commit() -> str:
    """Of this checkout, marked if it has changes; empty elsewhere."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
