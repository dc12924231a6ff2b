"""Attention over packed sequences, for prefill, for the vision encoder and for the predictor.

Sequences are told apart by a `Packing` (cu_seqlens), so windows, images and prompts are the same
thing here. The reference runs each run of equal lengths as one batch of
`scaled_dot_product_attention`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing, Run


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, causal: bool) -> Tensor:
    """Softmax attention of every row to the rows of its own sequence, scaled by 1/√D.

    Args:
        q: [T, HQ, D].
        k: [T, H, D], HQ a multiple of H: query head h reads kv head h // (HQ / H).
        v: [T, H, DV], DV at most D.
        packing: which rows belong together.
        causal: a row sees itself and the rows before it, or the whole sequence.

    Returns:
        [T, HQ · DV], heads side by side.
    """
    if packing.rows is None:
        return _contiguous(q, k, v, packing, causal)
    rows = packing.rows
    out = q.new_empty(len(q), q.shape[1] * v.shape[-1])
    out[rows] = _contiguous(q[rows], k[rows], v[rows], packing, causal)
    return out


def _contiguous(q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool) -> Tensor:
    width = v.shape[-1]
    # SDPA's flash kernels want one head size; without the padding it would build the score matrix.
    v = F.pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v
    parts = [_batched(q, k, v, run, causal)[..., :width].flatten(1) for run in packing.runs]
    if not parts:
        return q.new_empty(0, q.shape[1] * width)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _batched(q: Tensor, k: Tensor, v: Tensor, run: Run, causal: bool) -> Tensor:
    start, count, length = run

    def batch(x: Tensor) -> Tensor:
        x = x[start : start + count * length]
        return x.reshape(count, length, *x.shape[1:]).transpose(1, 2)  # [count, H, length, D]

    out = F.scaled_dot_product_attention(
        batch(q), batch(k), batch(v), is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(count * length, *q.shape[1:])
