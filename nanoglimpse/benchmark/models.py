"""What is timed: the checkpoint named, or an engine of a shape with random weights."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from nanoglimpse import weights
from nanoglimpse.config import Config, GlimpseConfig, parse_config, read_json
from nanoglimpse.engine import Engine
from nanoglimpse.errors import UsageError
from nanoglimpse.inputs.images import preprocess_image
from nanoglimpse.inputs.processor import Processor
from nanoglimpse.inputs.prompt import Prompt
from nanoglimpse.kernels.backends import select
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.quantize import check_supported
from nanoglimpse.loader import load
from nanoglimpse.methods.context import Decision, PruningContext
from nanoglimpse.methods.glimpse import GlimpsePrune
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.device import find_device, find_dtype
from nanoglimpse.model.glimpse import Glimpse
from nanoglimpse.model.model import Model
from nanoglimpse.model.vision import VisionEncoder
from nanoglimpse.weights.checkpoint import fill
from nanoglimpse.weights.load import build
from nanoglimpse.weights.mapping import parts

CONFIGS = Path(weights.__file__).parent / "configs"


def stored_engine(args: argparse.Namespace) -> Engine:
    """The checkpoint named."""
    engine = load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
        quantize=args.quantize,
    )
    if not engine.processor.tokenizer:
        raw = engine.processor.pixels.raw
        engine.processor = Untokenized(engine.processor.folder, engine.config, raw)
    return engine


class Untokenized(Processor):
    """Where there is no tokenizer: questions are numbers of text tokens, answers have no text."""

    def prompt(self, images: Image.Image, question: int) -> Prompt:
        """A picture in the middle of so many tokens."""
        config = self.config
        patches, grid = preprocess_image(images, config=self.pixels)
        count = grid[1] * grid[2] // config.vision_config.merge_unit
        text = [5 + i % 90 for i in range(question)]
        half = len(text) // 2
        ids = [*text[:half], config.vision_start_token_id, *[config.image_token_id] * count]
        ids += [config.vision_end_token_id, *text[half:]]
        return Prompt.from_tokens(ids, patches, [grid], config=config)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Nothing."""
        return ""


def shape_config(args: argparse.Namespace) -> dict:
    """config.json of a shape, with fewer layers if asked."""
    file = CONFIGS / f"qwen2.5-vl-{args.shape}.json"
    file = file if args.shape in ("3b", "7b") else Path(args.shape)
    if not file.is_file():
        raise UsageError(f"there is no shape {file}; give 3b, 7b or a config.json")
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
    device = find_device(args.device)
    ops, config = select(args.backend, device), parse_config(shape_config(args), args.shape)
    dtype = find_dtype(args.dtype, device, config)
    if quantize:
        check_supported(quantize, device, dtype)
    tensors = random_tensors(skeleton(config, ops), device, dtype)
    vision, decoder = build(config, ops, tensors, dtype, device, quantize=quantize)
    vision.pack(ops)
    decoder.pack(ops)
    glimpse = random_glimpse(config, ops, device, dtype)
    # Answers that may end do so at different places, half of them before half of their room.
    eos = frozenset(range(0, config.text_config.vocab_size, max(args.new // 2, 2)))
    model = Model(args.shape, config, vision, decoder, glimpse, eos, ops, quantize)
    return Engine(model, Untokenized(CONFIGS, config, raw=device.type == "cuda"))


def random_glimpse(config: Config, ops: Ops, device: torch.device, dtype: torch.dtype) -> Glimpse:
    """Glimpse weights of the published sizes for a model of any depth."""
    published = read_json(CONFIGS / "glimpseprune-3b.json")
    depth = config.text_config.num_hidden_layers
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

    def choose(self, context: PruningContext) -> Decision:
        """The share of each prompt's visual tokens."""
        decision = super().choose(context)
        kept = torch.zeros_like(decision.kept)
        for own in context.prompts():
            count = own.stop - own.start
            left = max(round(self.share_kept * count), 1)
            kept[own.start + torch.arange(left, device=kept.device) * count // left] = True
        return replace(decision, kept=kept)
