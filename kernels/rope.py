"""Rotary position embedding, half-split as in the checkpoints, by tables made once a prompt."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """Rotation tables of packed rows.

    Attributes:
        cos: fp32 [T, 1, D].
        sin: fp32 [T, 1, D], the first half negated: out = x·cos + roll(x, D/2)·sin.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angles: Tensor) -> "Rope":
        """Tables from angles [T, D/2] in radians; dimension j turns together with j + D/2."""
        cos, sin = angles.cos(), angles.sin()
        return cls(torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])

    def __getitem__(self, rows) -> "Rope":
        return Rope(self.cos[rows], self.sin[rows])


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates every head of every row, in fp32, cast back once.

    Args:
        x: [T, H, D].
        rope: tables of the T rows.

    Returns:
        [T, H, D] in the dtype of x.
    """
    wide = x.float()
    rolled = wide.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(wide * rope.cos, rolled, rope.sin).type_as(x)
