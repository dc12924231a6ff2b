"""The gather of pruning in one launch: keys and values of all layers, and the hidden states.

Where survivors attend as well, the gather runs in the launch of that attention, whose programs for
a few hundred survivors leave most of a GPU idle.
"""

from torch import Tensor

from nanoglimpse.kernels.reference import gather as reference
from nanoglimpse.kernels.reference.gather import SurvivorAttention
from nanoglimpse.kernels.triton_ops.attention import launch_attention
from nanoglimpse.kernels.triton_ops.gather_kernel import Copies, gather_kernel
from nanoglimpse.kernels.triton_ops.launch import launch, row_target, supported, supported_heads


def gather(
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    rows: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    target_rows: slice | Tensor,
    attends: SurvivorAttention | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As the reference, in one launch."""
    caches = (k, v, hidden, new_k, new_v)
    if not supported(*caches) or (attends and not supported_heads(k, *attends[:3])):
        return reference.gather(k, v, hidden, rows, new_k, new_v, target_rows, attends)
    layers, count, width = k.shape[0], len(rows), k.shape[2] * k.shape[3]
    assert k.shape == v.shape
    assert new_k.shape == new_v.shape
    assert new_k.shape[::2] == k.shape[::2]
    for x in (*caches, rows):
        assert x.is_contiguous()
    new_hidden = hidden.new_empty(count, hidden.shape[1])
    target, strides = row_target(target_rows), (k.stride(0), new_k.stride(0))
    sizes = (layers, count, hidden.shape[1])
    copies = Copies(
        (k, v, hidden, rows, new_k, new_v, new_hidden, *target, *strides, *sizes), width
    )
    if attends:
        q, layer_k, layer_v, segments, queries = attends
        return new_hidden, launch_attention(q, layer_k, layer_v, segments, True, queries, copies)
    tiles, options = copies.tiling(num_warps=4)
    launch(gather_kernel, (tiles,), *copies.arguments, **options)
    return new_hidden, None
