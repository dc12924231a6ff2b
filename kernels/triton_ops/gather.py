"""The gather of pruning in one launch: keys and values of all layers, and the hidden states."""

import triton
import triton.language as tl
from torch import Tensor

from nanoglimpse.kernels.reference import gather as reference
from nanoglimpse.kernels.triton_ops.launch import launch, row_target, supported, tile_shape


@triton.jit(do_not_specialize=["first", "L", "S"])
def _gather_kernel(
    k,
    v,
    hidden,
    rows,  # int64 [S]
    new_k,
    new_v,
    new_hidden,
    target_rows,  # int64 [S], or None if the target is contiguous from `first` on
    first,
    stride,  # elements from layer to layer of k and v
    new_stride,  # the same of new_k and new_v
    L,
    S,
    C,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # The planes are L of keys, L of values, and then slices of the hidden states that are as wide
    # as a row of the cache.
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    plane = tl.program_id(1).to(tl.int64)
    m_s = o_s < S
    source = tl.load(rows + o_s, m_s, 0)[:, None]
    o_w = tl.arange(0, BLOCK_W)[None, :]
    mask = m_s[:, None] & (o_w < WIDTH)
    if plane < 2 * L:
        if target_rows is None:
            target = (first + o_s)[:, None].to(tl.int64)
        else:
            target = tl.load(target_rows + o_s, m_s, 0)[:, None]
        if plane < L:
            b_row = tl.load(k + plane * stride + source * WIDTH + o_w, mask)
            tl.store(new_k + plane * new_stride + target * WIDTH + o_w, b_row, mask)
        else:
            layer = plane - L
            b_row = tl.load(v + layer * stride + source * WIDTH + o_w, mask)
            tl.store(new_v + layer * new_stride + target * WIDTH + o_w, b_row, mask)
    else:
        o_c = (plane - 2 * L) * WIDTH + o_w
        mask = mask & (o_c < C)
        b_row = tl.load(hidden + source * C + o_c, mask)
        tl.store(new_hidden + o_s[:, None].to(tl.int64) * C + o_c, b_row, mask)


def gather(
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    rows: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    target_rows: slice | Tensor,
) -> Tensor:
    """As the reference, in one launch."""
    if not supported(k, v, hidden, new_k, new_v):
        return reference.gather(k, v, hidden, rows, new_k, new_v, target_rows)
    layers, count, width = k.shape[0], len(rows), k.shape[2] * k.shape[3]
    assert k.shape == v.shape
    assert new_k.shape == new_v.shape
    assert new_k.shape[::2] == k.shape[::2]
    for x in (k, v, hidden, rows, new_k, new_v):
        assert x.is_contiguous()
    new_hidden = hidden.new_empty(count, hidden.shape[1])
    block_s, block_w = tile_shape(width)
    target, first = row_target(target_rows)
    grid = (triton.cdiv(count, block_s), 2 * layers + triton.cdiv(hidden.shape[1], width))
    tensors = (k, v, hidden, rows, new_k, new_v, new_hidden, target)
    numbers = first, k.stride(0), new_k.stride(0), layers, count, hidden.shape[1]
    sizes = {"WIDTH": width, "BLOCK_S": block_s, "BLOCK_W": block_w}
    launch(_gather_kernel, grid, *tensors, *numbers, **sizes)
    return new_hidden
