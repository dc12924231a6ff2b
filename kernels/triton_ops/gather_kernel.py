"""The kernel of the gather, which runs alone or inside that of attention."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nanoglimpse.kernels.triton_ops.launch import tile_shape


class Copies(NamedTuple):
    """A gather as kernels take it.

    Attributes:
        arguments: of `gather_kernel`, from `k` to `C`.
        width: elements of a row of the cache.
    """

    arguments: tuple[Any, ...]
    width: int

    def tiling(self, num_warps: int) -> tuple[int, dict[str, int]]:
        """How many tiles there are, and their size as the kernel takes it."""
        layers, rows, size = self.arguments[-3:]
        block_s, block_w = tile_shape(self.width)
        # A plain tile is for four warps.
        block_s *= max(num_warps // 4, 1)
        planes = 2 * layers + triton.cdiv(size, self.width)
        options = {"WIDTH": self.width, "BLOCK_S": block_s, "BLOCK_W": block_w}
        return planes * triton.cdiv(rows, block_s), options


@triton.jit(do_not_specialize=["first", "L", "S"])
def gather_kernel(
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
    tile=None,  # given by a kernel that calls this one
):
    """Copies BLOCK_S of the surviving rows in one plane.

    The planes are L of keys, L of values, and then slices of the hidden states that are as wide as
    a row of the cache. Tiles beyond the last plane copy nothing.
    """
    if tile is None:
        tile = tl.program_id(0)
    blocks = tl.cdiv(S, BLOCK_S)
    o_s = tile % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    plane = (tile // blocks).to(tl.int64)
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
