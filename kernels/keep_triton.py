"""The gather of pruning in one launch: all layers of keys and values, and the hidden rows."""

import triton
import triton.language as tl
from torch import Tensor

from . import keep as reference
from .launch import launch, served, tile


@triton.jit(do_not_specialize=["first", "L", "S"])
def _keep_kernel(
    k,
    v,
    hidden,
    rows,  # int64 [S]
    new_k,
    new_v,
    new_hidden,
    target_rows,  # int64 [S], or None: from `first` on
    first,
    stride,  # elements from layer to layer of k and v
    new_stride,
    L,
    S,
    C,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # Planes: L of keys, L of values, then the hidden rows in slices as wide as a cache row.
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


def keep_rows(
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    rows: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    target_rows: slice | Tensor,
) -> Tensor:
    """As the reference, in one launch."""
    if not served(k, v, hidden, new_k, new_v):
        return reference.keep_rows(k, v, hidden, rows, new_k, new_v, target_rows)
    layers, count, width = k.shape[0], len(rows), k.shape[2] * k.shape[3]
    assert k.shape == v.shape
    assert new_k.shape == new_v.shape
    assert new_k.shape[::2] == k.shape[::2]
    for x in (k, v, hidden, rows, new_k, new_v):
        assert x.is_contiguous()
    new_hidden = hidden.new_empty(count, hidden.shape[1])
    block_s, block_w = tile(count, width)
    sliced = isinstance(target_rows, slice)
    launch(
        _keep_kernel,
        (triton.cdiv(count, block_s), 2 * layers + triton.cdiv(hidden.shape[1], width)),
        k,
        v,
        hidden,
        rows,
        new_k,
        new_v,
        new_hidden,
        None if sliced else target_rows,
        target_rows.start if sliced else 0,
        k.stride(0),
        new_k.stride(0),
        layers,
        count,
        hidden.shape[1],
        WIDTH=width,
        BLOCK_S=block_s,
        BLOCK_W=block_w,
    )
    return new_hidden
