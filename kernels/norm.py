"""RMSNorm, alone and behind a residual sum."""

from functools import lru_cache

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, the mean and the quotient in fp32, cast back once.

    Few operations: while decoding on a CPU each costs microseconds, whatever its size.

    Args:
        x: [..., C].
        weight: [C].
        eps: added to the mean square.

    Returns:
        [..., C] in the dtype of x.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    mean_square = torch.addcmul(_scalar(eps, x.device), norm, norm, value=1 / x.shape[-1])
    return (x * mean_square.rsqrt_()).type_as(x).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + residual, and its RMSNorm.

    Args:
        x: [..., C], used up: the sum takes its place.
        residual: [..., C].
        weight, eps: as `rms_norm`.

    Returns:
        The normed sum and the sum, [..., C] each.
    """
    total = x.add_(residual)
    return rms_norm(total, weight, eps), total


@lru_cache
def _scalar(value: float, device: torch.device) -> Tensor:
    # A Python number would become a tensor anew in every call.
    with torch.inference_mode(False):
        return torch.tensor(value, device=device)
