"""Builds the networks of a checkpoint from its tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanoglimpse.config import Config, PixelConfig
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.vision import VisionEncoder
from nanoglimpse.weights.checkpoint import fill
from nanoglimpse.weights.lora import Adapter, merge
from nanoglimpse.weights.mapping import parts


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
    """Vision encoder and decoder, with a LoRA adapter merged into them.

    With `quantize`, each matrix of the decoder is quantised as soon as its last tensor has been
    read, so that the dense model is never in memory.

    Args:
        config: configuration of the checkpoint.
        ops: operations of the modules.
        tensors: (file, name, tensor), with the names of the checkpoint.
        dtype, device: dtype and device of the parameters.
        pixels: normalisation of raw patches.
        adapter: LoRA adapter to merge.
        quantize: a mode of `kernels.quantize`; None for dense matrices.

    Raises:
        NanoglimpseError: a tensor is missing, unknown or misshapen.
    """
    with torch.device("meta"):
        vision = VisionEncoder(config.vision_config, ops, pixels)
        decoder = Decoder(config, ops)
    model = nn.ModuleDict({"vision": vision, "decoder": decoder})
    table = parts(model)
    # A tied checkpoint may still contain its head, and an old one its rotary frequencies.
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
