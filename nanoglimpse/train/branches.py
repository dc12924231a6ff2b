"""Several questions behind one picture: the rows of its prompt are shared, and computed once.

B pictures have a prefix of P rows each (system prompt and visual tokens), and every prefix has n
branches of S rows (a question and its answer). A branch sees its prefix and itself, exactly as if
it were alone. All prefixes come first in the packed rows, then all branches.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..decoder import Decoder
from ..kernels.ops import TORCH, Packing, Queries, Rope


@dataclass(frozen=True)
class Branches:
    """The layout of B · P + B · n · S packed rows; short branches are padded behind their end."""

    pictures: int
    prefix: int
    branches: int
    length: int

    @property
    def split(self) -> int:
        """The first row of the branches."""
        return self.pictures * self.prefix

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.split + self.pictures * self.branches * self.length


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | Branches,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> Tensor:
    """As the op `attention`, and over `Branches`; same arguments and result."""
    if q.device.type == "cpu" and q.dtype != torch.float32:
        # The backward pass of torch's flash attention is five times slower there in bf16.
        wide = (x.float() for x in (q, k, v))
        return attention(*wide, packing, causal=causal, queries=queries).to(q.dtype)
    if isinstance(packing, Packing):
        return TORCH.attention(q, k, v, packing, causal=causal, queries=queries)
    b, p, n, s = packing.pictures, packing.prefix, packing.branches, packing.length

    def prefix(x: Tensor) -> Tensor:
        return x[: packing.split].view(b, p, *x.shape[1:]).transpose(1, 2)

    def branch(x: Tensor) -> Tensor:
        return x[packing.split :].view(b * n, s, *x.shape[1:]).transpose(1, 2)

    def both(x: Tensor) -> Tensor:
        shared = prefix(x).repeat_interleave(n, dim=0)
        return torch.cat((shared, branch(x)), dim=2)

    gqa = q.shape[1] != k.shape[1]
    above = F.scaled_dot_product_attention(
        prefix(q), prefix(k), prefix(v), is_causal=True, enable_gqa=gqa
    )
    # A row of a branch sees the whole prefix, and of its branch what is not behind it.
    seen = torch.ones(s, p + s, dtype=torch.bool, device=q.device).tril(p)
    below = F.scaled_dot_product_attention(
        branch(q), both(k), both(v), attn_mask=seen, enable_gqa=gqa
    )
    return torch.cat([out.transpose(1, 2).reshape(-1, q[0].numel()) for out in (above, below)])


OPS = replace(TORCH, attention=attention)


class NoCache:
    """What a decoder block writes to when its keys and values are not needed again."""

    def append(self, layer: int, rows: None, k: Tensor, v: Tensor) -> None:
        """Keeps nothing."""


NO_CACHE = NoCache()


class Keys:
    """A cache that keeps the keys of one layer, for rows to be read against."""

    def __init__(self, layer: int):
        self.layer = layer

    def append(self, layer: int, rows: None, k: Tensor, v: Tensor) -> None:
        """Keeps k [T, H, D] of the chosen layer."""
        if layer == self.layer:
            self.k = k


def visual_logits(q: Tensor, k: Tensor, pictures: int) -> Tensor:
    """Raw attention logits [B · n, N / B, HQ] of one row of each branch to its visual tokens.

    Args:
        q: [B · n, HQ, D].
        k: of the visual tokens, [N, H, D].
        pictures: B.
    """
    q = q.view(pictures, -1, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    k = k.view(pictures, -1, *k.shape[1:])
    logits = torch.einsum("pqhgd,pnhd->pqnhg", q, k) * k.shape[-1] ** -0.5
    return logits.flatten(0, 1).flatten(2)


def run_layer(
    decoder: Decoder,
    layer: int,
    hidden: Tensor,
    rope: Rope,
    packing: Branches,
    checkpointing: bool,
    cache=NO_CACHE,
) -> Tensor:
    """One decoder layer over packed rows, [T, C] -> [T, C].

    Args:
        checkpointing: compute it again in the backward pass instead of remembering it.
        cache: is told the keys and values, by `append`.
    """
    arguments = (hidden, rope, cache, layer, None, packing)
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(decoder.layers[layer], *arguments, use_reentrant=False)
    return decoder.layers[layer](*arguments)
