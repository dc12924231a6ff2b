"""The decoder of Qwen2.5-VL over packed sequences and a contiguous cache.

A block has two verbs. `write` puts the keys and values of rows into the cache; `attend` runs the
rest for the rows whose result is wanted, which may be fewer: in the last layer that is the last row
of each prompt, and where a method prunes, what survives (`attend_some`). `forward`, `append` and
`step` are both verbs for the same rows, with one fused projection.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Cache, Rows
from .config import Config, TextConfig
from .errors import UsageError
from .kernels.ops import Ops, Packing, Queries, Rope
from .kernels.quantized import GROUP, fits
from .layers import MLP, Embedding, FusedLinear, Linear, Module, RMSNorm

# Bytes from which on a matrix in oneDNN's layout is faster for one row, too; a smaller one is not.
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
        self, hidden: Tensor, rope: Rope, cache: Cache, layer: int, rows: Rows, packing: Packing
    ) -> Tensor:
        """Prefill: writes and attends whole sequences, [T, C] -> [T, C]."""
        q, k, v = self.project(hidden, rope)
        cache.append(layer, rows, k, v)
        return self.finish(hidden, self.ops.attention(q, k, v, packing, causal=True))

    def append(
        self,
        hidden: Tensor,
        rope: Rope,
        cache: Cache,
        layer: int,
        rows: Rows,
        packing: Packing,
        queries: Queries | None,
    ) -> Tensor:
        """Prefill behind rows that the cache holds, [S, C] -> [S, C].

        Writes `rows` and attends to all rows in use, `packing`, as the `queries` among them.
        """
        q, used = self.project_append(hidden, rope, cache, layer, rows), cache.used()
        k, v = cache.k_rows[layer][used], cache.v_rows[layer][used]
        attended = self.ops.attention(q, k, v, packing, causal=True, queries=queries)
        return self.finish(hidden, attended)

    def step(self, hidden: Tensor, rope: Rope, cache: Cache, layer: int, rows: Rows) -> Tensor:
        """Decode: writes and attends the next row of each sequence, [B, C] -> [B, C]."""
        ops, mlp = self.ops, self.mlp
        qkv = self.qkv.few(hidden, ops, self.input_layernorm).view(*self.qkv_shape)
        q = ops.rotate_append(qkv, None, rope, *cache.target(layer, rows))
        hidden = self.o.few(self.look_back(q, cache, layer), ops, residual=hidden)
        inner = mlp.gate_up.few(hidden, ops, self.post_attention_layernorm, gated=True)
        return mlp.down.few(inner, ops, residual=hidden)

    def write(self, hidden: Tensor, rope: Rope, cache: Cache, layer: int, rows: Rows) -> None:
        """Keys and values of rows [T, C] into the cache."""
        k, v = self.linear_heads(hidden, self.heads, self.heads + 2 * self.kv_heads).chunk(2, dim=1)
        cache.append(layer, rows, self.ops.rotate(k, rope), v)

    def attend(self, hidden: Tensor, rope: Rope, cache: Cache, layer: int) -> Tensor:
        """The last written row of each sequence, [B, C] -> [B, C]."""
        return self.finish(hidden, self.look_back(self.query(hidden, rope), cache, layer))

    def attend_some(
        self,
        hidden: Tensor,
        rope: Rope,
        cache: Cache,
        layer: int,
        rows: Rows,
        packing: Packing,
        queries: Queries,
    ) -> Tensor:
        """Chosen rows [TQ, C] of whole sequences, `packing`, that have written `rows`."""
        k, v = cache.k_rows[layer][rows], cache.v_rows[layer][rows]
        q = self.query(hidden, rope)
        attended = self.ops.attention(q, k, v, packing, causal=True, queries=queries)
        return self.finish(hidden, attended)

    def query(self, hidden: Tensor, rope: Rope) -> Tensor:
        """q [T, HQ, D] of rows [T, C]."""
        return self.ops.rotate(self.linear_heads(hidden, 0, self.heads), rope)

    def project(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, HQ, D], k and v [T, H, D] of rows [T, C]."""
        qkv = self.qkv(self.input_layernorm(hidden)).view(*self.qkv_shape)
        qk, v = qkv.split_with_sizes((self.heads + self.kv_heads, self.kv_heads), 1)
        q, k = self.ops.rotate(qk, rope).split_with_sizes((self.heads, self.kv_heads), 1)
        return q, k, v

    def project_append(
        self, hidden: Tensor, rope: Rope, cache: Cache, layer: int, rows: Rows
    ) -> Tensor:
        """q [T, HQ, D] of rows [T, C], whose keys and values go into the cache in the same pass."""
        qkv = self.qkv(self.input_layernorm(hidden)).view(*self.qkv_shape)
        return self.ops.rotate_append(qkv, None, rope, *cache.target(layer, rows))

    def linear_heads(self, hidden: Tensor, first: int, stop: int) -> Tensor:
        """Heads `first` to `stop` of the projection [q | k | v] of normed rows, [T, heads, D]."""
        normed = self.input_layernorm(hidden)
        out = self.qkv.rows(normed, first * self.head_dim, stop * self.head_dim)
        return out.view(len(hidden), stop - first, self.head_dim)

    def look_back(self, q: Tensor, cache: Cache, layer: int) -> Tensor:
        """Attention of one row a sequence, q [B, HQ, D], to the rows that the cache holds."""
        return self.ops.decode_attention(q, *cache.view(layer))

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection, MLP and the two residual sums."""
        normed, hidden = self.post_attention_layernorm.add(self.o(attended), hidden)
        return self.mlp(normed).add_(hidden)


class Decoder(Module):
    """Embedding, layers and head."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        text = config.text_config
        self.embed_tokens = Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(Block(text, ops) for _ in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, ops)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(text.hidden_size, text.vocab_size, bias=False)

    def prefill_tail(
        self,
        hidden: Tensor,
        rope: Rope,
        cache: Cache,
        rows: Rows,
        packing: Packing,
        first: int,
        last_rows: Tensor,
    ) -> Tensor:
        """Layers `first`… to the logits [B, vocab] of `last_rows`; the last layer for them alone.

        Args:
            hidden: [T, C], the input of layer `first`.
            rope: tables of these rows.
            cache: takes their keys and values.
            rows: where in the cache.
            packing: the sequences.
            first: index of the first layer to run; the number of layers if none is left.
            last_rows: int64 [B], the last row of each sequence.
        """
        final = len(self.layers) - 1
        for layer in range(first, final):
            hidden = self.layers[layer](hidden, rope, cache, layer, rows, packing)
        if first > final:
            return self.logits(hidden[last_rows])
        block = self.layers[final]
        block.write(hidden, rope, cache, final, rows)
        return self.logits(block.attend(hidden[last_rows], rope[last_rows], cache, final))

    def step(self, token_ids: Tensor, rope: Rope, cache: Cache) -> Tensor:
        """One token a sequence, int64 [B], through all layers: logits [B, vocab] of the next."""
        rows = cache.extend([1] * len(token_ids))
        hidden = self.embed_tokens(token_ids)
        for layer, block in enumerate(self.layers):
            hidden = block.step(hidden, rope, cache, layer, rows)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, C] -> [B, vocab]"""
        normed = self.norm(hidden)
        if self.lm_head is None:
            return F.linear(normed, self.embed_tokens.weight)
        return self.lm_head(normed)

    def pack(self, ops: Ops) -> None:
        """Lays matrices out for products, those that are large enough for single rows to gain.

        A table that is the head as well is held twice: looked up as it is, multiplied laid out.
        """
        table = self.embed_tokens.weight
        if self.lm_head is None and table.nbytes >= LARGE:
            packed = ops.pack(table)
            if packed is not table:
                self.lm_head = Linear(0, 0, bias=False)
                self.lm_head.take(packed, ops)
        for module in self.modules():
            if isinstance(module, Linear) and not module.opaque and module.weight.nbytes >= LARGE:
                module.pack(ops)

    def quantize(self, name: str, weight: Tensor, kind: str) -> dict[str, Tensor]:
        """Takes the parameter `name` in 8 or 4 bits if it is a matrix of a layer or the head.

        A table that is the head as well is held twice: looked up as it is, multiplied quantised.

        Returns:
            What the decoder then holds, by name.

        Raises:
            UsageError: the size of a layer's matrix is none for such weights.
        """
        owner, _, leaf = name.rpartition(".")
        layer, matrix = self.get_submodule(owner), leaf == "weight" and weight.ndim == 2
        if layer is self.embed_tokens and self.lm_head is None and fits(*weight.shape):
            self.lm_head = Linear(0, 0, bias=False)
            head = self.lm_head.quantize(weight, kind)
            return {name: weight} | {f"lm_head.{leaf}": part for leaf, part in head.items()}
        if not matrix or not isinstance(layer, Linear):
            return {name: weight}
        if not fits(*weight.shape):
            if layer is self.lm_head:
                return {name: weight}
            raise UsageError(
                f"quantize {kind} needs matrices of whole groups, multiples of 16 × {GROUP}; "
                f"{owner} is {len(weight)} × {weight.shape[1]}; leave quantize out"
            )
        return {f"{owner}.{leaf}": part for leaf, part in layer.quantize(weight, kind).items()}
