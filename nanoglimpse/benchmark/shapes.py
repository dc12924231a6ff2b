"""What is timed: the checkpoint named, or an engine of a shape with random weights."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..config import Config, GlimpseConfig, parse_config, read_json
from ..decoder import Decoder
from ..engine import Engine, find_device, find_dtype, load, take_raw
from ..glimpse import Glimpse
from ..kernels.ops import Ops, select
from ..kernels.quantized import check as check_quantized
from ..methods import Choice, Look
from ..methods.glimpse import GlimpsePrune
from ..processor import Processor, Prompt, preprocess_image
from ..vision import VisionEncoder
from ..weights.checkpoint import fill
from ..weights.names import parts
from . import ROOT

SHAPES = ROOT / "tests" / "configs"


def stored_engine(args: argparse.Namespace) -> Engine:
    """The checkpoint named."""
    engine = load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
        quantize=args.quantize,
        fold_pixels=args.fold_pixels,
    )
    if not engine.processor.tokenizer:
        engine.processor = Untokenized(engine.processor.folder, engine.config)
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
    device = find_device(args.device)
    ops, config = select(args.backend, device), parse_config(shape_config(args), args.shape)
    dtype = find_dtype(args.dtype, device, config)
    if quantize:
        check_quantized(quantize, device, dtype)
    model = skeleton(config, ops)
    vision, decoder = model["vision"], model["decoder"]

    def whole(name: str, tensor: Tensor) -> dict[str, Tensor]:
        own = name.removeprefix("decoder.")
        if not quantize or own == name:
            return {name: tensor}
        return {f"decoder.{k}": v for k, v in decoder.quantize(own, tensor, quantize).items()}

    source = random_tensors(model, device, dtype)
    fill(model, source, parts(model), lambda name: False, dtype, device, whole)
    processor = Untokenized(SHAPES, config)
    take_raw(processor, vision, ops, args.fold_pixels)
    vision.pack(ops)
    decoder.pack(ops)
    glimpse = random_glimpse(config, ops, device, dtype)
    # Answers that may end do so at different places, half of them before half of their room.
    eos = frozenset(range(0, config.text_config.vocab_size, max(args.new // 2, 2)))
    return Engine(args.shape, config, vision, decoder, glimpse, processor, eos, ops, quantize)


def random_glimpse(config: Config, ops: Ops, device: torch.device, dtype: torch.dtype) -> Glimpse:
    """Glimpse weights of the published sizes for a model of any depth."""
    published = read_json(SHAPES / "glimpseprune-3b.json")
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

    def choose(self, look: Look) -> Choice:
        """The share of each prompt's visual tokens."""
        choice = super().choose(look)
        kept = torch.zeros_like(choice.kept)
        for own in look.prompts():
            count = own.stop - own.start
            left = max(round(self.share_kept * count), 1)
            kept[own.start + torch.arange(left, device=kept.device) * count // left] = True
        return replace(choice, kept=kept)
