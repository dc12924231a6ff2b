"""Attention within the segments of packed rows: prefill, vision encoder and predictor.

Windows, images and prompts are all segments, so one operation serves them. The reference runs each
run of equally long segments as one batch of `scaled_dot_product_attention`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanoglimpse.kernels.varlen import EqualLengthRun, Segments, upload

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Queries(NamedTuple):
    """The query rows of an attention in which not every row is a query.

    Attributes:
        segments: the query rows of each segment, at least one per segment.
        positions: int64 [TQ], ascending within a segment: the index of each query row among the
            rows of its segment.
    """

    segments: Segments
    positions: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    causal: bool,
    queries: Queries | None = None,
) -> Tensor:
    """Softmax attention of each query row to the rows of its own segment, scaled by 1/√D.

    Args:
        q: [T, HQ, D], or [TQ, HQ, D] with `queries`.
        k: [T, H, D], HQ a multiple of H: query head h reads kv head h // (HQ / H).
        v: [T, H, DV], DV at most D.
        segments: the segments of the T rows.
        causal: whether a row attends to itself and the rows before it only, instead of to its
            whole segment.
        queries: which rows q holds; None if it holds all of them.

    Returns:
        [T, HQ · DV] or [TQ, HQ · DV], heads side by side.
    """
    if queries is not None:
        return _query_rows(q, k, v, segments, causal, queries)
    if segments.rows is None:
        return _contiguous(q, k, v, segments, causal)
    rows = segments.rows
    out = q.new_empty(len(q), q.shape[1] * v.shape[-1])
    out[rows] = _contiguous(q[rows], k[rows], v[rows], segments, causal)
    return out


def _query_rows(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, queries: Queries
) -> Tensor:
    # Attention of all rows, of which the query rows are selected: this is bit-identical to
    # attention without `queries` and needs no mask. The extra cost is small beside the matrix
    # products of a layer; the Triton kernel avoids it.
    assert segments.rows is None
    counts = upload(torch.tensor(queries.segments.lengths), q.device)
    starts = segments.cu_seqlens[:-1].repeat_interleave(counts, output_size=len(q))
    rows = queries.positions + starts
    all_q = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, rows, q)
    return _contiguous(all_q, k, v, segments, causal)[rows]


def _contiguous(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
    width = v.shape[-1]
    # The flash kernels of SDPA require equal head sizes. Without padding SDPA would fall back to a
    # kernel that materialises the score matrix.
    v = F.pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v
    parts = [_batched(q, k, v, run, causal)[..., :width].flatten(1) for run in segments.runs]
    if not parts:
        return q.new_empty(0, q.shape[1] * width)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _batched(q: Tensor, k: Tensor, v: Tensor, run: EqualLengthRun, causal: bool) -> Tensor:
    start, count, length = run

    def batch(x: Tensor) -> Tensor:
        x = x[start : start + count * length]
        return x.reshape(count, length, *x.shape[1:]).transpose(1, 2)  # [count, H, length, D]

    out = sdpa(batch(q), batch(k), batch(v), is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(count * length, *q.shape[1:])


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's `scaled_dot_product_attention`, on a GPU without cuDNN's.

    cuDNN builds a plan for every length that it has not seen, in tens of milliseconds, and decoding
    attends to another length at every token.
    """
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, **options)
    if options.get("enable_gqa") and q.dtype == torch.float32:
        # Older releases have no kernel for it but the one that holds the matrix of scores.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        options = options | {"enable_gqa": False}
    with sdpa_kernel(WITHOUT_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, **options)
