"""A checkpoint's weights into the networks that use them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoglimpse.config import Config, PixelConfig, read_eos
from nanoglimpse.kernels.backends import select
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.quantize import check_supported
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.device import find_dtype
from nanoglimpse.model.model import Model
from nanoglimpse.model.vision import VisionEncoder
from nanoglimpse.weights.checkpoint import Progress, fill, shards, stream
from nanoglimpse.weights.glimpse import load_glimpse
from nanoglimpse.weights.hub import ADAPTER_FILES, GLIMPSE_FILES, locate
from nanoglimpse.weights.lora import Adapter, merge, read_adapter
from nanoglimpse.weights.mapping import parts


def load_model(
    name: str,
    folder: Path,
    config: Config,
    pixels: PixelConfig,
    device: torch.device,
    *,
    dtype: str,
    backend: str | Ops,
    glimpse: str | Path | None,
    adapter: str | Path | None,
    quantize: str | None,
    progress: Progress,
) -> Model:
    """The model of a checkpoint; arguments as `nanoglimpse.load`.

    Raises:
        UsageError: an argument names something that does not exist here.
        NanoglimpseError: a file or tensor is missing, broken, unknown or misshapen.
    """
    ops, dtype_ = select(backend, device), find_dtype(dtype, device, config)
    if quantize is not None:
        check_supported(quantize, device, ops)
    eos, own = read_eos(folder / "generation_config.json", config), folder / "glimpse"
    source = locate(glimpse, GLIMPSE_FILES) if glimpse else own if own.is_dir() else None
    extra = load_glimpse(source, config, ops, dtype_, device) if source else None
    lora = read_adapter(locate(adapter, ADAPTER_FILES)) if adapter else None
    tensors = stream(shards(folder), progress)
    vision, decoder = build(config, ops, tensors, dtype_, device, pixels, lora, quantize)
    vision.pack(ops)
    decoder.pack(ops)
    return Model(name, config, vision, decoder, extra, eos, ops, quantize)


def build(
    config: Config,
    ops: Ops,
    tensors: Iterable[tuple[str, str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    pixels: PixelConfig | None = None,
    adapter: Adapter | None = None,
    quantize: str | None = None,
) -> tuple[VisionEncoder, Decoder]:
    """Vision encoder and decoder from tensors, a LoRA adapter merged into them.

    With `quantize`, a mode of `kernels.quantize`, each matrix of the decoder is quantised when its
    last tensor has been read, so that the dense model is never in memory.

    Args:
        config: of the checkpoint.
        ops: operations of the modules.
        tensors: (file, name, tensor) each, named as in the checkpoint.
        dtype, device: of the parameters.
        pixels: how raw patches are normalised.
        adapter: from `read_adapter`.
        quantize: "int8", "int4" or None.

    Raises:
        NanoglimpseError: a tensor is missing, unknown or misshapen.
    """
    with torch.device("meta"):
        vision = VisionEncoder(config.vision_config, ops, pixels)
        decoder = Decoder(config, ops)
    model = nn.ModuleDict({"vision": vision, "decoder": decoder})
    table = parts(model)
    # A tied checkpoint may still carry its head, and old ones their rotary frequencies.
    unused = {"lm_head.weight"} if config.tie_word_embeddings else set()

    def finish(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if adapter:
            merge(name, tensor, adapter, table)
        own = name.removeprefix("decoder.")
        if quantize is None or own == name:
            return {name: tensor}
        quantized = decoder.quantize(own, tensor, quantize)
        return {f"decoder.{leaf}": part for leaf, part in quantized.items()}

    def is_unused(name: str) -> bool:
        return name in unused or name.endswith("rotary_emb.inv_freq")

    fill(model, tensors, table, is_unused, dtype, device, finish)
    return vision, decoder
