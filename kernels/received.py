"""Attention that rows receive: the column sums of the softmax, which several methods score by.

Nothing of the size rows × rows is kept, neither here nor in the kernel.
"""

import torch
from torch import Tensor

from .packing import Packing

# Query rows that the reference looks at together.
CHUNK = 512


def received_attention(q: Tensor, k: Tensor, packing: Packing) -> Tensor:
    """Sum over the rows of a sequence of the attention that each pays to each, not causal.

    Args:
        q: [T, HQ, D].
        k: [T, H, D], HQ a multiple of H: query head h reads kv head h // (HQ / H).
        packing: which rows belong together; none are scattered.

    Returns:
        fp32 [T, HQ]. Over the rows of a sequence every column sums up to their number.
    """
    assert packing.rows is None
    heads, width = k.shape[1:]
    out = q.new_zeros(len(q), heads, q.shape[1] // heads, dtype=torch.float32)
    parts = zip(*(x.split(packing.lengths) for x in (q, k, out)), strict=True)
    for own_q, own_k, sums in parts:
        for rows in own_q.split(CHUNK):
            grouped = rows.unflatten(1, (heads, -1))  # [R, H, G, D]
            scores = torch.einsum("rhgd,nhd->hgrn", grouped, own_k).float() * width**-0.5
            sums += scores.softmax(-1).sum(2).permute(2, 0, 1)
    return out.flatten(1)
