"""Attention that rows receive: the column sums of the softmax, which several methods score by.

Nothing of the size rows × rows is kept, neither here nor in the kernel.
"""

import torch
from torch import Tensor

from .packing import Packing

# Scores that the reference looks at together: less than the rows weigh that attend, however many.
TILE = 2**20


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
    grouped = q.unflatten(1, (heads, -1))  # [T, H, G, D]
    for own_q, own_k, sums in zip(
        *(x.split(packing.lengths) for x in (grouped, k, out)), strict=True
    ):
        together = max(TILE // (len(own_k) * sums.shape[2]), 1)
        for head in range(heads):
            keys = own_k[:, head].T
            for rows in own_q[:, head].split(together):
                scores = (rows @ keys).float().mul_(width**-0.5)  # [R, G, N]
                sums[:, head] += scores.softmax(-1).sum(0).T
    return out.flatten(1)
