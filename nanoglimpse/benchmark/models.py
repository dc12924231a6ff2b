"""What is timed: an engine, of a checkpoint or with random weights, and the prompts it answers."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isqrt, sqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from nanoglimpse import weights
from nanoglimpse.config import Config, parse_config, read_glimpse_config, read_json
from nanoglimpse.engine import Engine
from nanoglimpse.errors import UsageError
from nanoglimpse.inference.session import Session
from nanoglimpse.inputs.processor import Processor, as_visuals
from nanoglimpse.inputs.prompt import Prompt
from nanoglimpse.kernels.backends import select
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.quantize import check_supported
from nanoglimpse.loader import load
from nanoglimpse.methods.base import PruningMethod
from nanoglimpse.methods.context import Decision, PruningContext
from nanoglimpse.methods.glimpse import GlimpsePrune
from nanoglimpse.methods.schedule import two_thirds
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.device import find_device, find_dtype
from nanoglimpse.model.glimpse import Glimpse
from nanoglimpse.model.model import Model
from nanoglimpse.model.vision import VisionEncoder
from nanoglimpse.pictures.picture import load_picture
from nanoglimpse.pictures.video import Visual
from nanoglimpse.weights.checkpoint import fill
from nanoglimpse.weights.load import build
from nanoglimpse.weights.mapping import parts
from nanoglimpse.world import BRIEF_SUFFIX

# Pictures and questions of different sizes; the first ones are those of a single prompt.
SIDES = (1.0, 0.5, 0.75, 0.25)
QUESTIONS = (
    "Which number does the diamond show?",
    "What shape is the object with 8?" + BRIEF_SUFFIX,
    "How many red objects are there?",
)
# Without a tokenizer: lengths of the questions, as multiples of --text.
LENGTHS = (1.0, 0.4, 1.7)
# Visual tokens of the picture of a shape, and of the pictures of a figure, if no option says so.
SHAPE_VISUAL, PLOTTED = 256, (64, 144, 256, 576)
# Pixels of the side of a visual token.
CELL = 28
CONFIGS = Path(weights.__file__).parent / "configs"
SHAPES = {name: CONFIGS / f"qwen2.5-vl-{name}.json" for name in ("3b", "7b")}
SHAPES["nano"] = CONFIGS.parent / "nano" / "config.json"


def make_engine(args: argparse.Namespace) -> Engine:
    """The engine that the options name: a checkpoint, or a shape with random weights.

    Raises:
        UsageError, NanoglimpseError: as `load`; also where there is no such shape.
    """
    if args.shape:
        return random_engine(args)
    names = ("device", "dtype", "backend", "quantize")
    engine = load(args.model, **{name: getattr(args, name) for name in names})
    if not engine.processor.tokenizer:
        raw = engine.processor.pixels.raw
        engine.processor = Untokenized(engine.processor.folder, engine.config, raw)
    return engine


class Untokenized(Processor):
    """A processor without a tokenizer: a question is a number of tokens, an answer has no text."""

    def prompt(
        self, images: Visual | Sequence[Visual], question: str | Sequence[Visual], **options: Any
    ) -> Prompt:
        """A picture in the middle of as many text tokens as the question says."""
        text = [5 + i % 90 for i in range(int(str(question)))]
        half = len(text) // 2
        return self.fill([*text[:half], *as_visuals(images), *text[half:]])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The empty text."""
        return ""


def shape_config(args: argparse.Namespace) -> dict[str, Any]:
    """The config.json of a shape, with fewer layers if the options say so."""
    file = SHAPES.get(args.shape) or Path(args.shape)
    if not file.exists():
        raise UsageError(
            f"there is no shape {args.shape}; choose {', '.join(SHAPES)} or a config.json"
        )
    config = read_json(file)
    if args.layers:
        config["num_hidden_layers"] = config["vision_config"]["depth"] = args.layers
        full = config["vision_config"]["fullatt_block_indexes"]
        left = [block for block in full if block < args.layers]
        config["vision_config"]["fullatt_block_indexes"] = left or [args.layers - 1]
    return config


def random_tensors(
    module: nn.Module, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, str, Tensor]]:
    """Random (file, name, tensor) for everything that `module` loads; equal in every call."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    for name, part in parts(module).items():
        shape = (part.stop - part.start, *shapes[part.name][1:])
        # Drawn in fp32, so that engines of several dtypes have the same weights.
        draw = torch.empty(shape, device=device)
        draw.normal_(0, 0.02 if len(shape) == 1 else shape[1] ** -0.5, generator=generator)
        yield "random", name, (draw + 1 if "norm" in name or "ln_q" in name else draw).to(dtype)


def skeleton(config: Config, ops: Ops) -> nn.ModuleDict:
    """The model on the meta device."""
    with torch.device("meta"):
        vision, decoder = VisionEncoder(config.vision_config, ops), Decoder(config, ops)
    return nn.ModuleDict({"vision": vision, "decoder": decoder})


def random_engine(args: argparse.Namespace) -> Engine:
    """A model of a shape, with glimpse weights, on the device."""
    device = find_device(args.device)
    ops, config = select(args.backend, device), parse_config(shape_config(args), args.shape)
    dtype = find_dtype(args.dtype, device, config)
    if args.quantize:
        check_supported(args.quantize, device, ops)
    tensors = random_tensors(skeleton(config, ops), device, dtype)
    vision, decoder = build(config, ops, tensors, dtype, device, quantize=args.quantize)
    vision.pack(ops)
    decoder.pack(ops)
    glimpse = random_glimpse(config, ops, device, dtype)
    # Answers that may end do so at different places, half of them in the first half.
    eos = frozenset(range(0, config.text_config.vocab_size, max(args.new // 2, 2)))
    model = Model(args.shape, config, vision, decoder, glimpse, eos, ops, args.quantize)
    return Engine(model, Untokenized(CONFIGS, config, raw=device.type == "cuda"))


def random_glimpse(config: Config, ops: Ops, device: torch.device, dtype: torch.dtype) -> Glimpse:
    """Glimpse weights of the published sizes for a model of any depth."""
    depth, blocks = config.text_config.num_hidden_layers, config.vision_config.depth
    layer, taps = two_thirds(depth) - 1, {blocks - 1 - i * blocks // 4 for i in range(4)}
    published = replace(
        read_glimpse_config(CONFIGS / "glimpseprune-3b.json")[1],
        reduce_layer=layer,
        selected_layers=(layer,),
        le_layers=tuple(range(depth)),
        selected_visual_layers=tuple(sorted(taps, reverse=True)),
    )
    with torch.device("meta"):
        glimpse = Glimpse(config, published, ops)
    module = nn.ModuleDict({"predictor": glimpse.predictor})
    tensors = random_tensors(module, device, dtype)
    fill(module, tensors, parts(module), lambda _: False, dtype, device)
    vectors = torch.randn(depth, config.text_config.hidden_size).to(device, dtype)
    glimpse.vectors = nn.Parameter(vectors, requires_grad=False)
    return glimpse


class Forced(GlimpsePrune):
    """GlimpsePrune that does all its work and then keeps a given share, evenly spaced."""

    def __init__(self, share: float):
        self.share_kept, self.name = share, f"pruned to {share:.1%}"

    def choose(self, context: PruningContext) -> Decision:
        """Keeps the share of each prompt's visual tokens."""
        decision = super().choose(context)
        kept = torch.zeros_like(decision.kept)
        for own in context.prompts():
            count = own.stop - own.start
            few = max(round(self.share_kept * count), 1)
            kept[own.start + torch.arange(few, device=kept.device) * count // few] = True
        return replace(decision, kept=kept)


class Workload:
    """The prompts to answer, with their pictures and questions.

    Args:
        engine: makes the prompts.
        args: the options of the command line.
        visual: visual tokens of the largest picture; 0 for the picture of the options as it is.
        count: number of different prompts; all but the first have other sizes.
        copies: copies of each prompt in a batch.
        more: columns of visual tokens and tokens of the question beyond these sizes.

    Attributes:
        items: the picture and the question of each different prompt.
        prompts: all prompts of the batch.
    """

    def __init__(
        self,
        engine: Engine,
        args: argparse.Namespace,
        visual: int,
        count: int = 1,
        copies: int = 1,
        more: tuple[int, int] = (0, 0),
    ):
        self.engine, self.args, self.visual, self.copies = engine, args, visual, copies
        columns, tokens = more
        self.items = [
            (
                make_picture(args, visual, SIDES[i % len(SIDES)], columns),
                make_question(engine, args, i, tokens),
            )
            for i in range(count)
        ]
        self.prompts = [engine.prompt(*item) for item in self.items] * copies

    def longer(self, columns: int, tokens: int) -> "Workload":
        """The same with a wider picture and a longer question."""
        more = (columns, tokens)
        return Workload(self.engine, self.args, self.visual, len(self.items), self.copies, more)

    def preprocess(self) -> Prompt:
        """The first prompt, made again from its picture."""
        return self.engine.prompt(*self.items[0])

    def begin(self, method: str | PruningMethod) -> tuple[Session, list[int]]:
        """A session that has encoded the first picture, and the token ids of its question."""
        prompt = self.preprocess()
        stop = int(prompt.visual.nonzero()[-1]) + 2  # after <|vision_end|>
        shown, question = prompt.token_ids.tensor_split([stop])
        config = self.engine.config
        begun = Prompt.from_tokens(shown, prompt.patches, prompt.grids, config=config)
        return self.engine.session(begun, method), question.tolist()


def visual_sizes(args: argparse.Namespace) -> list[int]:
    """Visual tokens of the pictures to time; 0 for the picture of the options as it is."""
    if args.visual_tokens:
        return args.visual_tokens
    if args.plot:
        return list(PLOTTED)
    return [SHAPE_VISUAL if args.shape else 0]


def make_picture(args: argparse.Namespace, visual: int, side: float, more: int = 0) -> Image.Image:
    """Noise for a shape, or else the picture of the options; its sides are scaled.

    Args:
        args: the options.
        visual: visual tokens before scaling; 0 for as many as the picture has.
        side: what the sides are multiplied by.
        more: columns of visual tokens that are added.
    """
    if args.shape:
        return noise(max(round(visual * side * side), 1), more)
    whole = load_picture(args.image)
    if visual:
        side *= sqrt(visual * CELL**2 / (whole.width * whole.height))
    width, height = (max(round(side * length), 1) for length in whole.size)
    return whole.resize((width + CELL * more, height))


def noise(visual: int, more: int = 0) -> Image.Image:
    """Noise of a number of visual tokens, as square as it allows, and of more columns."""
    root = isqrt(visual)
    rows = next((r for r in range(root, root // 2, -1) if visual % r == 0), root)
    columns = max(visual // rows, 1) + more
    return Image.effect_noise((CELL * columns, CELL * rows), 64).convert("RGB")


def make_question(engine: Engine, args: argparse.Namespace, number: int, more: int = 0) -> str:
    """A question with more digits at its end; without a tokenizer, the number of its tokens.

    Qwen's tokenizer makes a token of each digit.
    """
    if engine.processor.tokenizer:
        return QUESTIONS[number % len(QUESTIONS)] + "7" * more
    return str(max(round(args.text * LENGTHS[number % len(LENGTHS)]), 1) + more)
