"""Builds the networks of a checkpoint from its tensors."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanoglimpse.config import Config, PixelConfig, Stored, shards
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.vision import VisionEncoder
from nanoglimpse.weights.checkpoint import Checkpoint, Progress, fill
from nanoglimpse.weights.lora import Adapter, place
from nanoglimpse.weights.mapping import parts

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
# Rows that are compared at once.
ROWS = 4096


def open_checkpoint(
    folder: Path,
    config: Config,
    dtype: torch.dtype,
    adapter: Adapter | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Config, Checkpoint]:
    """The tensors in a folder, and the configuration with the ties that they really have.

    As in transformers 5: tied by the configuration, a head that differs from the embeddings is kept
    apart, and a head without embeddings stands for both. As in PEFT 0.21: an adapter of the head,
    or one that replaces the head or the embeddings, leaves the other as it was.

    Raises:
        NanoglimpseError: a file is missing, corrupt, or outside the folder.
    """
    checkpoint = Checkpoint(shards(folder), progress)
    stored, replaced = checkpoint.stored, adapter.replaced if adapter else {}
    if config.tie_word_embeddings:
        head = stored.pop(HEAD, None)
        embeddings = stored.setdefault(EMBEDDINGS, head) if head else stored.get(EMBEDDINGS)
        apart = head and embeddings and not _equal(head, embeddings, dtype)
        if adapter and embeddings and not apart:
            head, apart = embeddings, adapter.unties
        if apart and head:
            stored[HEAD], config = head, replace(config, tie_word_embeddings=False)
    stored.update(replaced)
    return config, checkpoint


def _equal(one: Stored, other: Stored, dtype: torch.dtype) -> bool:
    """Whether two matrices are equal in the dtype of the model."""
    if one.shape != other.shape or not one.shape:
        return False
    cuts = [slice(row, row + ROWS) for row in range(0, one.shape[0], ROWS)]
    return all(torch.equal(one.read(cut).to(dtype), other.read(cut).to(dtype)) for cut in cuts)


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
        tensors: (file, name, tensor), with the canonical names of the checkpoint.
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
    changes = place(adapter, table, model) if adapter else {}

    def finish(name: str, tensor: Tensor) -> dict[str, Tensor]:
        for part, change in changes.get(name, ()):
            change.merge(tensor[part.start : part.stop])
        own = name.removeprefix("decoder.")
        if quantize is None or own == name:
            return {name: tensor}
        quantized = decoder.quantize(own, tensor, quantize)
        return {f"decoder.{leaf}": part for leaf, part in quantized.items()}

    # An old checkpoint may still contain its rotary frequencies.
    fill(model, tensors, table, lambda n: n.endswith("rotary_emb.inv_freq"), dtype, device, finish)
    return vision, decoder
