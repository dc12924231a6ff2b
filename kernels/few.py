"""Products of few rows with what stands before and behind them, as a decode step has them."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .norm import rms_norm
from .swiglu import swiglu


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    product: Callable = F.linear,
) -> Tensor:
    """RMSNorm, W x + b, SwiGLU and residual sum, in this order, those that are asked for.

    Args:
        x: [B, in].
        weight: [out, in], or what `product` takes for it.
        bias: [out] or None.
        norm: weight [in] and eps of an RMSNorm before the product.
        gated: SwiGLU behind it, whose gate is the first half of the product.
        residual: [B, out], added to the result.
        product: of x, weight and bias; a kernel serves `F.linear` alone.

    Returns:
        [B, out], or [B, out / 2] if gated.
    """
    if norm is not None:
        x = rms_norm(x, *norm)
    x = product(x, weight, bias)
    if gated:
        x = swiglu(x)
    return x if residual is None else x.add_(residual)
