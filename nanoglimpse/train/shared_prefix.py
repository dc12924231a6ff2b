"""Several questions about one picture, whose rows are shared and computed once.

B pictures have a prefix of P rows each (system prompt and visual tokens), and every prefix has n
branches of S rows (a question and its answer). A branch attends to its prefix and to itself,
exactly as if it were alone. The packed rows hold all prefixes first, then all branches.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.attention import Queries
from nanoglimpse.kernels.reference.rope import Rope, rotate_qk
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.kernels.varlen import Segments
from nanoglimpse.kvcache.cache import LayerKV


@dataclass(frozen=True)
class SharedPrefixLayout:
    """The layout of B · P + B · n · S packed rows; shorter branches are padded at the end.

    Attributes:
        pictures: B.
        prefix_rows: P.
        branches: n, the branches of each picture.
        branch_rows: S.
    """

    pictures: int
    prefix_rows: int
    branches: int
    branch_rows: int

    @property
    def branch_start(self) -> int:
        """The first row of the branches."""
        return self.pictures * self.prefix_rows


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments | SharedPrefixLayout,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> Tensor:
    """The op `attention`, which here also accepts a `SharedPrefixLayout`."""
    if q.device.type == "cpu" and q.dtype != torch.float32:
        # The backward pass of torch's flash attention is five times slower there in bf16.
        out = attention(q.float(), k.float(), v.float(), segments, causal=causal, queries=queries)
        return out.to(q.dtype)
    if isinstance(segments, Segments):
        return TORCH.attention(q, k, v, segments, causal=causal, queries=queries)
    b, p = segments.pictures, segments.prefix_rows
    n, s = segments.branches, segments.branch_rows

    def prefix(x: Tensor) -> Tensor:
        return x[: segments.branch_start].view(b, p, *x.shape[1:]).transpose(1, 2)

    def branch(x: Tensor) -> Tensor:
        return x[segments.branch_start :].view(b * n, s, *x.shape[1:]).transpose(1, 2)

    def both(x: Tensor) -> Tensor:
        shared = prefix(x).repeat_interleave(n, dim=0)
        return torch.cat((shared, branch(x)), dim=2)

    gqa = q.shape[1] != k.shape[1]
    above = F.scaled_dot_product_attention(
        prefix(q), prefix(k), prefix(v), is_causal=True, enable_gqa=gqa
    )
    # A row of a branch attends to the whole prefix and causally to its branch.
    seen = torch.ones(s, p + s, dtype=torch.bool, device=q.device).tril(p)
    below = F.scaled_dot_product_attention(
        branch(q), both(k), both(v), attn_mask=seen, enable_gqa=gqa
    )
    return torch.cat([out.transpose(1, 2).reshape(-1, q[0].numel()) for out in (above, below)])


OPS = replace(TORCH, attention=attention)


class KeptKeys:
    """Where training writes keys and values: only the keys of one layer are kept.

    Args:
        kept: the layer.
        heads: kv heads.

    Attributes:
        k: [T, H, D], keys of the layer.
    """

    def __init__(self, kept: int, heads: int):
        self.kept, self.heads, self.k = kept, heads, torch.empty(0)

    def layer(self, layer: int) -> LayerKV:
        """As `kvcache.cache.Reserved.layer`; a block only appends to it."""
        return cast(LayerKV, _Layer(self, layer))


class _Layer(NamedTuple):
    keys: KeptKeys
    layer: int

    def append(self, qkv: Tensor, rope: Rope, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rotate_qk(qkv, rope, self.keys.heads, ops.rotate)
        if self.layer == self.keys.kept:
            self.keys.k = k
        return q, k, v


def visual_logits(q: Tensor, k: Tensor, pictures: int) -> Tensor:
    """Attention logits [B · n, N / B, HQ] of one row of each branch to its visual tokens.

    Args:
        q: [B · n, HQ, D], the queries of these rows.
        k: [N, H, D], the keys of the visual tokens.
        pictures: B.
    """
    q = q.view(pictures, -1, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    k = k.view(pictures, -1, *k.shape[1:])
    logits = torch.einsum("pqhgd,pnhd->pqnhg", q, k) * k.shape[-1] ** -0.5
    return logits.flatten(0, 1).flatten(2)


def recomputed(block: nn.Module, *args: Any) -> Tensor:
    """Runs a block whose activations are recomputed in the backward pass instead of stored."""
    return checkpoint(block, *args, use_reentrant=False)
