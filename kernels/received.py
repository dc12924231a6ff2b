"""Attention that a row receives: the column sums of a softmax, without the square matrix.

Rankers of visual tokens need them (VisionZip, VScan, VisPruner read a vision block this way); their
public code builds the matrix of all pairs, which at 20,000 patches and 16 heads is 25 GB in fp32.
"""

import torch
from torch import Tensor

from .packing import Packing

TILE = 1024


def received_attention(q: Tensor, k: Tensor, packing: Packing) -> Tensor:
    """Sum over the queries of a sequence of their softmax attention to each of its rows.

    Args:
        q, k: [T, H, D], scaled by 1/√D as in attention.
        packing: which rows belong together.

    Returns:
        fp32 [T, H]; over a sequence every head adds up to its number of rows.
    """
    out = q.new_empty(q.shape[:2], dtype=torch.float32)
    order = packing.rows
    if order is not None:
        q, k = q[order], k[order]
    sums, start = torch.empty_like(out), 0
    for length in packing.lengths:
        own = slice(start, start + length)
        keys = k[own].float().permute(1, 2, 0)  # [H, D, length]
        total = torch.zeros(k.shape[1], length, device=k.device)
        for tile in q[own].split(TILE):
            logits = tile.float().transpose(0, 1) @ keys * q.shape[-1] ** -0.5
            total += logits.softmax(-1).sum(1)
        sums[own], start = total.T, start + length
    if order is None:
        return sums
    out[order] = sums
    return out
