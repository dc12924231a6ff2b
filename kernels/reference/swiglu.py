"""SwiGLU (arXiv 2002.05202), the gated activation of the feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up for x = [gate | up] along the last axis.

    Args:
        x: [..., 2I].

    Returns:
        [..., I]
    """
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)
