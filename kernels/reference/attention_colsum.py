"""Column sums of the attention matrix: how much attention each row receives.

Several pruning methods score tokens by it. Neither the reference nor the kernel holds a rows × rows
matrix.
"""

import torch
from torch import Tensor

from nanoglimpse.kernels.varlen import Segments

# Scores that are computed at a time, so that memory does not grow with the number of rows.
MAX_SCORES = 2**20


def attention_colsum(q: Tensor, k: Tensor, segments: Segments) -> Tensor:
    """Sums non-causal attention, scaled by 1/√D, over the query rows of each segment.

    Args:
        q: [T, HQ, D].
        k: [T, H, D], HQ a multiple of H: query head h reads kv head h // (HQ / H).
        segments: the segments of the T rows, contiguous.

    Returns:
        fp32 [T, HQ], per row and query head the attention that the row receives. Within a segment
        of n rows each column sums to n.
    """
    assert segments.rows is None
    heads, width = k.shape[1:]
    out = q.new_zeros(len(q), heads, q.shape[1] // heads, dtype=torch.float32)
    grouped = q.unflatten(1, (heads, -1))  # [T, H, G, D]
    per_segment = (x.split(segments.lengths) for x in (grouped, k, out))
    for segment_q, segment_k, sums in zip(*per_segment, strict=True):
        chunk_rows = max(MAX_SCORES // (len(segment_k) * sums.shape[2]), 1)
        for head in range(heads):
            keys = segment_k[:, head].T
            for rows in segment_q[:, head].split(chunk_rows):
                scores = (rows @ keys).float().mul_(width**-0.5)  # [R, G, N]
                sums[:, head] += scores.softmax(-1).sum(0).T
    return out.flatten(1)
