"""Rotary position embedding, of the decoder and in two dimensions alike: the tables say which."""

import triton
import triton.language as tl
from torch import Tensor

from . import rope as reference
from .launch import launch, served, tile
from .rope import Rope


@triton.jit(do_not_specialize=["N"])
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    stride,  # elements from row to row of x
    N,  # rows times heads
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (o_n < N)[:, None] & (o_d < HALF)
    row, head = (o_n // H)[:, None], (o_n % H)[:, None]
    source = row * stride + head * 2 * HALF + o_d
    table = row * 2 * HALF + HALF + o_d
    b_low = tl.load(x + source, mask, 0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    b_high = tl.load(x + source + HALF, mask, 0.0).to(tl.float32)
    b_cos = tl.load(cos + table, mask, 0.0)
    b_sin = tl.load(sin + table, mask, 0.0)
    target = out + o_n[:, None] * 2 * HALF + o_d
    dtype = out.dtype.element_ty
    tl.store(target, (b_low * b_cos - b_high * b_sin).to(dtype), mask)
    tl.store(target + HALF, (b_high * b_cos + b_low * b_sin).to(dtype), mask)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """As the reference; of the tables only the second half is read, which says it all."""
    if not served(x):
        return reference.rotate(x, rope)
    rows, heads, width = x.shape
    assert x.stride()[1:] == (width, 1)
    assert rope.cos.shape == rope.sin.shape == (rows, 1, width)
    assert rope.cos.is_contiguous()
    assert rope.sin.is_contiguous()
    out = x.new_empty(x.shape)
    block_n, block_d = tile(rows * heads, width // 2)
    # Half as many: there are two halves, and two tables in fp32.
    block_n = max(block_n // 2, 1)
    launch(
        _rotate_kernel,
        (triton.cdiv(rows * heads, block_n),),
        x,
        rope.cos,
        rope.sin,
        out,
        x.stride(0),
        rows * heads,
        H=heads,
        HALF=width // 2,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )
    return out
