"""Decode attention, split over keys as in Flash-Decoding (PyTorch blog, Oct. 2023).

It differs in taking one launch instead of two. Each program of a kv head writes its partial sum to
scratch memory and increments a counter; the last one to finish combines the partial sums. Lengths
are read on the device, so that a captured graph is valid for every length: a program whose split is
beyond the end of a short sequence returns at once.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import decode_attention as reference
from nanoglimpse.kernels.triton_ops.launch import counters, launch, supported_heads
from nanoglimpse.kernels.varlen import upload

# Keys per step. With 64 keys, two stages and a head of 128 a program takes 38 KiB of shared memory
# and 143 registers per thread on Hopper, so that three share a multiprocessor and overlap loads.
BLOCK_N = 64
# Programs to aim for in a launch: about two per multiprocessor of the GPUs it was planned for.
TARGET_PROGRAMS = 256
MAX_SPLITS = 32


@triton.jit(do_not_specialize=["H", "G", "splits"])
def _decode_attention_kernel(
    q,
    k,
    v,
    starts,  # int32 [B]
    lengths,  # int32 [B]
    out,
    partials,  # fp32 [B, H, splits, G, D], unnormalised outputs
    stats,  # fp32 [B, H, 2, splits, G]: maxima, then sums
    counters,  # int32 [B, H], 0 before and after each launch
    scale,  # log2(e) / √D
    stride_q,  # elements from sequence to sequence of q
    stride_h,  # elements from head to head of k and v
    stride_r,  # elements from row to row of k and v
    H,
    G,
    splits,  # a number and not a constant, so that batches and capacities share one variant
    D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.program_id(2)
    length = tl.load(lengths + sequence)
    split_keys = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    active = tl.cdiv(length, split_keys)
    if split >= active:
        return
    o_g, o_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    m_gd = (o_g < G)[:, None] & (o_d < D)[None, :]
    o_q = (head * G + o_g)[:, None] * D + o_d[None, :]
    b_q = tl.load(q + sequence.to(tl.int64) * stride_q + o_q, m_gd, 0.0)  # [BLOCK_G, BLOCK_D]
    first = tl.load(starts + sequence).to(tl.int64)
    base = first * stride_r + head.to(tl.int64) * stride_h
    # The maximum starts finite, so that infinity is never subtracted from infinity.
    b_max = tl.full([BLOCK_G], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_G], tl.float32)
    b_acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    stop = tl.minimum(length, (split + 1) * split_keys)
    for n in range(split * split_keys, stop, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_nd = (o_n < stop)[:, None] & (o_d < D)[None, :]
        o_kv = base + o_n.to(tl.int64)[:, None] * stride_r + o_d[None, :]
        b_k = tl.load(k + o_kv, m_nd, 0.0)  # [BLOCK_N, BLOCK_D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BLOCK_G, BLOCK_N]
        b_s = tl.where((o_n < stop)[None, :], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new_max[:, None])
        b_rescale = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_v = tl.load(v + o_kv, m_nd, 0.0)
        b_acc = b_acc * b_rescale[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_max = b_new_max

    kv_head = sequence.to(tl.int64) * H + head  # counted over all sequences
    p_out = out + kv_head * G * D
    if active == 1:
        b_out = b_acc / b_sum[:, None]
        o_out = o_g[:, None] * D + o_d[None, :]
        tl.store(p_out + o_out, b_out.to(out.dtype.element_ty), m_gd)
    else:
        p_partials = partials + kv_head * splits * G * D
        p_stats = stats + kv_head * 2 * splits * G
        o_partial = (split * G + o_g)[:, None] * D + o_d[None, :]
        tl.store(p_partials + o_partial, b_acc, m_gd)
        tl.store(p_stats + split * G + o_g, b_max, o_g < G)
        tl.store(p_stats + (splits + split) * G + o_g, b_sum, o_g < G)
        # All threads must have written before one of them increments the counter.
        tl.debug_barrier()
        if tl.atomic_add(counters + kv_head, 1, sem="acq_rel") == active - 1:
            tl.store(counters + kv_head, 0)
            p_sums = p_stats + splits * G
            _combine(p_partials, p_stats, p_sums, p_out, active, G, D, MAX_SPLITS, BLOCK_G, BLOCK_D)


@triton.jit
def _combine(
    partials,
    maxima,
    sums,
    out,
    active,
    G,
    D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combines the partial sums of one kv head."""
    # Loads bypass the L1 cache because other programs wrote these values.
    o_s, o_g = tl.arange(0, MAX_SPLITS)[:, None], tl.arange(0, BLOCK_G)[None, :]
    mask = (o_s < active) & (o_g < G)
    o_sg = o_s * G + o_g
    b_max = tl.load(maxima + o_sg, mask, -1e30, cache_modifier=".cg")  # [MAX_SPLITS, BLOCK_G]
    b_sum = tl.load(sums + o_sg, mask, 0.0, cache_modifier=".cg")
    b_weight = tl.exp2(b_max - tl.max(b_max, 0)[None, :])
    b_total = tl.sum(b_weight * b_sum, 0)[None, :]
    b_weight = b_weight / tl.where(b_total == 0.0, 1.0, b_total)
    # In slices of the head, so that the partial outputs of all splits, 32 · 16 · 16 elements, fit
    # into registers.
    SLICE: tl.constexpr = 16
    for d in tl.static_range(0, BLOCK_D, SLICE):
        o_d = d + tl.arange(0, SLICE)
        o_partial = o_sg[:, :, None] * D + o_d[None, None, :]
        m_partial = mask[:, :, None] & (o_d < D)[None, None, :]
        b_partial = tl.load(partials + o_partial, m_partial, 0.0, cache_modifier=".cg")
        b_out = tl.sum(b_partial * b_weight[:, :, None], 0)  # [BLOCK_G, SLICE]
        o_row = tl.arange(0, BLOCK_G)[:, None]
        m_out = (o_row < G) & (o_d < D)[None, :]
        tl.store(out + o_row * D + o_d[None, :], b_out.to(out.dtype.element_ty), m_out)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor
) -> Tensor:
    """As the reference, in one launch."""
    if not supported_heads(q, k, v):
        return reference.decode_attention(q, k, v, starts, lengths)
    (sequences, query_heads, width), heads = q.shape, k.shape[1]
    assert q.stride()[1:] == (width, 1)
    assert k.shape == v.shape
    assert k.stride()[1:] == v.stride()[1:]
    assert k.stride(3) == 1
    if not isinstance(starts, Tensor) and not isinstance(lengths, Tensor):
        starts, lengths = _on_device(tuple(starts), tuple(lengths), q.device)
    group = query_heads // heads
    wanted = triton.cdiv(TARGET_PROGRAMS, sequences * heads)
    useful = triton.cdiv(k.shape[2], BLOCK_N)
    splits = min(triton.next_power_of_2(min(wanted, useful)), MAX_SPLITS)
    scratch = (sequences, heads, splits, group)
    out = q.new_empty(sequences, query_heads * width)
    partials = q.new_empty(*scratch, width, dtype=torch.float32)
    stats = q.new_empty(2, *scratch, dtype=torch.float32)
    counted = counters(triton.next_power_of_2(sequences * heads), q.device)
    tensors = (q, k, v, starts, lengths, out, partials, stats, counted)
    strides = q.stride(0), k.stride(1), k.stride(2)
    # fp32 has twice the bytes, hence half the keys. Without tensor cores it needs twice the warps
    # so as not to spill.
    keys, warps = (BLOCK_N, 4) if q.element_size() == 2 else (BLOCK_N // 2, 8)
    sizes = {"BLOCK_N": keys, "num_warps": warps, "num_stages": 2}
    sizes |= {"BLOCK_G": max(triton.next_power_of_2(group), 16)}
    sizes |= {"BLOCK_D": max(triton.next_power_of_2(width), 16), "MAX_SPLITS": MAX_SPLITS}
    numbers = math.log2(math.e) * width**-0.5, *strides, heads, group, splits
    grid = (splits, heads, sequences)
    launch(_decode_attention_kernel, grid, *tensors, *numbers, D=width, **sizes)
    return out


# Cached because all layers of a step pass the same numbers, and each copy makes the host wait.
@lru_cache(maxsize=4)
def _on_device(
    starts: tuple[int, ...], lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    # Both begin at multiples of 16 bytes, whatever B: Triton would compile another variant if not.
    padding = [0] * (-len(starts) % 4)
    numbers = torch.tensor((*starts, *padding, *lengths), dtype=torch.int32)
    spans = upload(numbers, device)
    return spans[: len(starts)], spans[len(starts) + len(padding) :]
