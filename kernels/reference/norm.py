"""RMSNorm (arXiv 1910.07467), alone and after a residual sum."""

from functools import lru_cache

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight; mean and quotient in fp32, cast back before the weight.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean of squares.

    Returns:
        [..., C] in the dtype of x.
    """
    # As few operations as possible: in a decode step on a CPU each one costs microseconds.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    mean_square = torch.addcmul(_scalar(eps, x.device), norm, norm, value=1 / x.shape[-1])
    return (x * mean_square.rsqrt_()).type_as(x).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + residual, and its RMSNorm.

    Args:
        x: [..., C], overwritten with the sum.
        residual: [..., C].
        weight, eps: as `rms_norm`.

    Returns:
        The normalised sum and the sum itself, [..., C] each.
    """
    total = x.add_(residual)
    return rms_norm(total, weight, eps), total


@lru_cache
def _scalar(value: float, device: torch.device) -> Tensor:
    # Cached because torch would convert a Python number to a tensor in every call; filled on the
    # device because a copy from the host would wait for it.
    with torch.inference_mode(False):
        return torch.full((), value, device=device)
