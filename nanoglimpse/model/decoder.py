"""The decoder of Qwen2.5-VL over packed sequences and a contiguous cache.

A block runs either whole (`forward`), or in two steps: `write` puts the keys and values of all rows
into the cache, and `query`, attention and `output` follow for the rows whose result is needed. In
the last layer these are the last row of each prompt (`attend_last`), and in the layer after which a
method prunes, the survivors.
`decode` is one token of each sequence, with fused projections.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from nanoglimpse.config import Config, TextConfig
from nanoglimpse.errors import UsageError
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.quantize import GROUP, fits
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.rope import Rope, rotate_qk
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.kvcache.cache import LayerKV
from nanoglimpse.model.layers import MLP, Blocks, Embedding, FusedLinear, Linear, Module, RMSNorm

# Bytes from which on a matrix in oneDNN's layout is also faster for a single row.
LARGE = 2**20


class Block(Module):
    """A decoder layer; T rows of packed sequences, B of them, C wide."""

    def __init__(self, config: TextConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.qkv_shape = (-1, self.heads + 2 * self.kv_heads, self.head_dim)
        size, q, kv = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps, ops)
        self.qkv = FusedLinear(size, (q, kv, kv), bias=True)
        self.o = Linear(q, size, bias=False)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps, ops)
        self.mlp = MLP(size, config.intermediate_size, bias=False, ops=ops)

    def forward(
        self, hidden: Tensor, rope: Rope, kv: LayerKV, segments: Segments, queries: Queries | None
    ) -> Tensor:
        """Prefill: writes rows and runs them to the end of the layer, [T, C] -> [T, C].

        Args:
            hidden: input of the layer.
            rope: tables of the rows.
            kv: takes their keys and values, and returns all to attend to.
            segments: the sequences that these make up.
            queries: which of them the rows are; all if None.
        """
        qkv = self.qkv(self.input_layernorm(hidden)).view(*self.qkv_shape)
        q, k, v = kv.append(qkv, rope, self.ops)
        attended = self.ops.attention(q, k, v, segments, causal=True, queries=queries)
        return self.output(hidden, attended)

    def write(
        self,
        hidden: Tensor,
        rope: Rope,
        kv: LayerKV,
        segments: Segments,
        scored_by: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Keys and values of rows into the cache; the rest of the layer is left.

        Args:
            hidden, rope, kv, segments: as `forward`.
            scored_by: int64 [B], a row of each sequence, to score the keys of all rows with.

        Returns:
            The normed rows [T, C], and raw logits [T, HQ] or None without `scored_by`.
        """
        normed, scored = self.input_layernorm(hidden), None
        if scored_by is not None:
            scored = (self.query_of_normed(normed[scored_by], rope[scored_by]), segments)
        keys_values = self.project_heads(normed, self.heads, self.heads + 2 * self.kv_heads)
        return normed, self.ops.rope_append(keys_values, rope, *kv.targets, scored)[1]

    def attend_last(self, hidden: Tensor, rope: Rope, kv: LayerKV) -> Tensor:
        """The rest of the layer for the last written row of each sequence, [B, C] -> [B, C]."""
        attended = self.ops.decode_attention(self.query(hidden, rope), *kv.sequences)
        return self.output(hidden, attended)

    def decode(self, hidden: Tensor, rope: Rope, kv: LayerKV) -> Tensor:
        """Writes and runs the next row of each sequence, [B, C] -> [B, C]."""
        ops, mlp = self.ops, self.mlp
        qkv = self.qkv.fused(hidden, ops, self.input_layernorm).view(*self.qkv_shape)
        q, _ = ops.rope_append(qkv, rope, *kv.targets)
        attended = ops.decode_attention(q, *kv.sequences)
        hidden = self.o.fused(attended, ops, residual=hidden)
        inner = mlp.gate_up.fused(hidden, ops, self.post_attention_layernorm, gated=True)
        return mlp.down.fused(inner, ops, residual=hidden)

    def query(self, hidden: Tensor, rope: Rope) -> Tensor:
        """q [T, HQ, D] of rows [T, C]."""
        return self.query_of_normed(self.input_layernorm(hidden), rope)

    def query_of_normed(self, normed: Tensor, rope: Rope) -> Tensor:
        """As `query`, of rows to which the layer's first norm has been applied."""
        return self.ops.rotate(self.project_heads(normed, 0, self.heads), rope)

    def project(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, HQ, D], k and v [T, H, D] of rows [T, C]."""
        qkv = self.qkv(self.input_layernorm(hidden)).view(*self.qkv_shape)
        return rotate_qk(qkv, rope, self.kv_heads, self.ops.rotate)

    def project_heads(self, normed: Tensor, first: int, stop: int) -> Tensor:
        """Heads `first` to `stop` of the projection [q | k | v] of normed rows, [T, heads, D]."""
        out = self.qkv.slice(normed, first * self.head_dim, stop * self.head_dim)
        return out.view(len(normed), stop - first, self.head_dim)

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection, MLP and the two residual sums."""
        normed, hidden = self.post_attention_layernorm.add(self.o(attended), hidden)
        return self.mlp(normed).add_(hidden)


class Decoder(Module):
    """Embedding, layers and head."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        text = config.text_config
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size)
        self.layers: Blocks[Block] = Blocks(Block(text, ops) for _ in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, ops)
        self.lm_head: Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False)

    def step(self, token_ids: Tensor, rope: Rope, cache: "DecodeCache") -> Tensor:
        """One token a sequence, int64 [B], through all layers: logits [B, vocab] of the next."""
        kv = cache.reserve([1] * len(token_ids))
        hidden = self.embed_tokens(token_ids)
        for layer, block in enumerate(self.layers):
            hidden = block.decode(hidden, rope, kv.layer(layer))
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, C] -> [B, vocab]"""
        if self.lm_head is None:
            return F.linear(self.norm(hidden), self.embed_tokens.weight)
        return self.lm_head.fused(hidden, self.norm.ops, self.norm)

    def pack(self, ops: Ops) -> None:
        """Lays out the matrices that are large enough for single rows to gain from it.

        Tied embeddings are then stored twice: for look-up, and packed for the product.
        """
        table = self.embed_tokens.weight
        if self.lm_head is None and table.nbytes >= LARGE:
            packed = ops.pack(table)
            if packed is not table:
                self.lm_head = Linear(0, 0, bias=False)
                self.lm_head.set_packed(packed, ops)
        for module in self.modules():
            if not isinstance(module, Linear) or module.is_packed:
                continue
            if module.weight.nbytes >= LARGE:
                module.pack(ops)

    def quantize(self, name: str, weight: Tensor, mode: str) -> dict[str, Tensor]:
        """Takes the parameter `name` in 8 or 4 bits if it is a matrix of a layer or the head.

        Tied embeddings are then stored twice: for look-up, and quantised for the product.

        Returns:
            The decoder's new parameters, by name.

        Raises:
            UsageError: the matrix of a layer has a size that `mode` does not support.
        """
        (owner, _, leaf), ops = name.rpartition("."), self.norm.ops
        layer, matrix = self.get_submodule(owner), leaf == "weight" and weight.ndim == 2
        if layer is self.embed_tokens and self.lm_head is None and fits(*weight.shape):
            self.lm_head = Linear(0, 0, bias=False)
            head = self.lm_head.quantize(weight, mode, ops)
            return {name: weight} | {f"lm_head.{leaf}": part for leaf, part in head.items()}
        if not matrix or not isinstance(layer, Linear):
            return {name: weight}
        if not fits(*weight.shape):
            if layer is self.lm_head:
                return {name: weight}
            raise UsageError(
                f"quantize {mode} needs matrices of whole groups, multiples of 16 × {GROUP}; "
                f"{owner} is {len(weight)} × {weight.shape[1]}; leave quantize out"
            )
        return {f"{owner}.{leaf}": part for leaf, part in layer.quantize(weight, mode, ops).items()}


class PassKV(Protocol):
    """Where one pass over layers writes its keys and values, as `kvcache.cache.Reserved`."""

    def layer(self, layer: int) -> LayerKV:
        """The rows in one decoder layer."""
        ...


class DecodeCache(Protocol):
    """A cache of all layers that decoding appends to."""

    def reserve(self, counts: Sequence[int]) -> PassKV:
        """Takes the next rows of each sequence into use."""
        ...


class Probe(NamedTuple):
    """Rows that a method adds to the prompts, one each, such as GlimpsePrune's glimpse token.

    Attributes:
        vectors: [L, C], added to these rows before each layer.
        rows: int64 [B], where they are in the hidden state.
    """

    vectors: Tensor
    rows: Tensor


def run_block(block: Block, *args: Any) -> Tensor:
    """Runs a block whole."""
    return block(*args)


def run_layers(
    decoder: Decoder,
    hidden: Tensor,
    rope: Rope,
    kv: PassKV,
    segments: Any,
    layers: range,
    *,
    queries: Queries | None = None,
    probe: Probe | None = None,
    capture: Sequence[int] = (),
    write_last: Callable[..., object] | None = None,
    call: Callable[..., Tensor] = run_block,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Runs decoder layers over packed rows: the one loop of prefill, prefixes and training.

    Args:
        decoder: its layers run.
        hidden: [T, C], input of the first layer; probe rows of it are changed in place.
        rope: tables of the rows.
        kv: takes keys and values.
        segments, queries: as `Block.forward`; a trainer's own layout if its `call` reads it.
        layers: which of them.
        probe: added before each layer.
        capture: layers whose input is returned.
        write_last: `Block.write`, or what calls it. The last of the layers then only writes.
        call: runs a block; a trainer may compute activations again in the backward pass.

    Returns:
        [T, C], the output of the last layer, or its input with `write_last`; and the captured
        inputs [T, C] by layer.
    """
    captured: dict[int, Tensor] = {}
    for layer in layers:
        block = decoder.layers[layer]
        if probe is not None:
            hidden[probe.rows] += probe.vectors[layer]
        if layer in capture:
            captured[layer] = hidden
        if write_last and layer == layers[-1]:
            write_last(block, hidden, rope, kv.layer(layer), segments)
        else:
            hidden = call(block, hidden, rope, kv.layer(layer), segments, queries)
    return hidden, captured
