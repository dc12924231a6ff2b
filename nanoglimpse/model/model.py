"""A loaded model: the networks and what they were loaded with, without a processor or a method."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nanoglimpse.config import UNSET, Config, Sampling, TextConfig
from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.quantize import QuantizedMatmul
from nanoglimpse.kernels.varlen import upload
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.glimpse import Glimpse
from nanoglimpse.model.layers import Linear
from nanoglimpse.model.rope import Grid
from nanoglimpse.model.vision import BlockStats, VisionEncoder, VisionOutput


@dataclass(frozen=True, eq=False)
class Model:
    """Vision encoder, decoder and GlimpsePrune's part of one checkpoint.

    `dataclasses.replace` gives the same model with other glimpse weights.

    Attributes:
        name: as given to `load`.
        config: of the checkpoint.
        glimpse: None without glimpse weights.
        eos_token_id: tokens that end an answer.
        ops: operations of the chosen backend.
        quantized: mode of the decoder's matrices; None if they are dense.
        sampling: how the checkpoint says that tokens are chosen.
    """

    name: str
    config: Config
    vision: VisionEncoder
    decoder: Decoder
    glimpse: Glimpse | None
    eos_token_id: frozenset[int]
    ops: Ops
    quantized: str | None = None
    sampling: Sampling = UNSET

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.decoder.embed_tokens.weight.dtype

    @property
    def text(self) -> TextConfig:
        """Configuration of the decoder."""
        return self.config.text_config

    @property
    def depth(self) -> int:
        """Layers of the decoder, L."""
        return self.config.text_config.num_hidden_layers

    @property
    def glimpse_weights(self) -> Glimpse:
        """GlimpsePrune's part.

        Raises:
            UsageError: there is none.
        """
        if self.glimpse is None:
            raise UsageError(
                f"method glimpse needs glimpse weights, and {self.name} has none beside it; name "
                "them (published: ashun989/GlimpsePrune_Qwen2.5-VL-3B-Instruct, and -7B-)"
            )
        return self.glimpse

    def encode(
        self,
        patches: Tensor,
        grids: Sequence[Grid],
        taps: Sequence[int] = (),
        vision_blocks: Sequence[int] = (),
    ) -> VisionOutput:
        """Pictures through the vision encoder; arguments as its `forward`.

        `vision_blocks` are the blocks whose received attention and keys are recorded.
        """
        stats = BlockStats(vision_blocks)
        visual, features = self.vision(upload(patches, self.device), grids, taps, stats)
        return VisionOutput(visual, features, stats)

    def check_context(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Refuses prompts of these lengths that leave no room for an answer.

        Raises:
            UsageError: there is no prompt, or one exceeds the context.
        """
        limit, longest = self.text.max_position_embeddings, max(lengths, default=0)
        if not longest:
            raise UsageError("there is no prompt")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if longest + max_new_tokens > limit:
            raise UsageError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of "
                f"{limit}; use fewer or smaller pictures (max_pixels), or fewer new tokens"
            )

    def with_ops(self, ops: Ops) -> "Model":
        """The same networks, which from now on use other operations."""
        for _, part in self.modules():
            for module in part.modules():
                if "ops" in vars(module):
                    vars(module)["ops"] = ops
                if isinstance(module, Linear) and isinstance(module.matmul, QuantizedMatmul):
                    module.matmul = module.matmul.with_ops(ops)
        return replace(self, ops=ops)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts that hold weights, by name."""
        yield "vision", self.vision
        yield "decoder", self.decoder
        if self.glimpse is not None:
            yield "glimpse", self.glimpse


class ModelHolder:
    """The parts of a model as attributes of what holds it."""

    model: Model

    @property
    def config(self) -> Config:
        """Of the checkpoint."""
        return self.model.config

    @property
    def vision(self) -> VisionEncoder:
        """The vision encoder."""
        return self.model.vision

    @property
    def decoder(self) -> Decoder:
        """The decoder."""
        return self.model.decoder

    @property
    def glimpse(self) -> Glimpse | None:
        """GlimpsePrune's part, or None."""
        return self.model.glimpse

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.model.dtype
