"""Attention over packed sequences, for prefill, for the vision encoder and for the predictor.

Sequences are told apart by a `Packing` (cu_seqlens), so windows, images and prompts are the same
thing here. The reference runs each run of equal lengths as one batch of
`scaled_dot_product_attention`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Packing, Run


class Queries(NamedTuple):
    """Rows that attend, where they are fewer than those attended to.

    Attributes:
        packing: of the queries alone, at least one a sequence.
        positions: int64 [TQ], the place of each among the rows of its sequence, in order.
    """

    packing: Packing
    positions: Tensor


class Probe(NamedTuple):
    """One query row a sequence whose raw logits are wanted, and the keys for which they are.

    Attributes:
        rows: int64 [B], query rows, counted over all sequences.
        first, stop: int64 [B], the range of keys, counted over all sequences.
    """

    rows: Tensor
    first: Tensor
    stop: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> Tensor:
    """Softmax attention of every query row to the rows of its own sequence, scaled by 1/√D.

    Args:
        q: [T, HQ, D], or [TQ, HQ, D] with `queries`.
        k: [T, H, D], HQ a multiple of H: query head h reads kv head h // (HQ / H).
        v: [T, H, DV], DV at most D.
        packing: which rows belong together.
        causal: a row sees itself and the rows before it, or the whole sequence.
        queries: which rows of the sequences q holds; all if None.

    Returns:
        [TQ, HQ · DV], heads side by side.
    """
    if queries is not None:
        return _some(q, k, v, packing, causal, queries)
    if packing.rows is None:
        return _contiguous(q, k, v, packing, causal)
    rows = packing.rows
    out = q.new_empty(len(q), q.shape[1] * v.shape[-1])
    out[rows] = _contiguous(q[rows], k[rows], v[rows], packing, causal)
    return out


def attention_reading(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    reading: Probe,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attention`, and the raw logits of one row a sequence: no softmax, scaled by 1/√D.

    GlimpsePrune reads the glimpse row this way (official `use_attention_logits`, model_gp.py).

    Args:
        q, k, v, packing, causal, queries: as `attention`; the packing has no `rows`.
        reading: what is read. Keys that the row does not see are left out.

    Returns:
        The result of `attention`, and logits [T, HQ], 0 where none are wanted.
    """
    logits = k.new_zeros(len(k), q.shape[1])
    starts, rows = packing.cu_seqlens, reading.rows
    stop = starts[1:]
    if causal:
        stop = (rows if queries is None else starts[:-1] + queries.positions[rows]) + 1
    stop = torch.minimum(reading.stop, stop)
    for row, *span in zip(rows.tolist(), reading.first.tolist(), stop.tolist(), strict=True):
        logits[slice(*span)] = row_logits(q[row], k[slice(*span)])
    return attention(q, k, v, packing, causal=causal, queries=queries), logits


def row_logits(q: Tensor, k: Tensor) -> Tensor:
    """Raw attention logits of one query row, scaled by 1/√D: no mask, no softmax.

    Args:
        q: [HQ, D], one row.
        k: [N, H, D], the keys asked for; query head h reads kv head h // (HQ / H).

    Returns:
        [N, HQ], columns in query-head order.
    """
    heads, width = k.shape[1:]
    grouped = q.view(heads, -1, width)  # [H, G, D]
    return torch.einsum("hgd,nhd->nhg", grouped, k).flatten(1) * width**-0.5


def _some(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool, queries: Queries
) -> Tensor:
    """All rows attend, so that the result is theirs to the bit and no mask is built.

    Attention of one layer is little beside its products; the Triton kernel leaves the others out.
    """
    assert packing.rows is None
    counts = torch.tensor(queries.packing.lengths, device=q.device)
    rows = queries.positions + packing.cu_seqlens[:-1].repeat_interleave(counts)
    every = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, rows, q)
    return _contiguous(every, k, v, packing, causal)[rows]


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
