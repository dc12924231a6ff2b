"""Parts that the vision encoder, the decoder and the predictor are built from."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.ops import Ops


class _Direct:
    """Takes two costs out of nn.Module that weigh as much as a product of small matrices does.

    A call is `forward`, without a search for hooks. Parameters and sub-modules are also ordinary
    attributes: nn.Module alone finds them in `__getattr__`, when every ordinary look-up has failed.
    """

    def __init_subclass__(cls):
        if "forward" in cls.__dict__:
            cls.__call__ = cls.forward

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self.__dict__[name] = value

    def register_parameter(self, name, param):
        """As nn.Module does, and as an attribute."""
        super().register_parameter(name, param)
        self.__dict__[name] = param

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.__dict__.update(self._parameters)
        return self


class Module(_Direct, nn.Module):
    """nn.Module for small, often called parts."""


class Linear(_Direct, nn.Linear):
    """nn.Linear for small, often called parts."""

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return F.linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """Linear layers of one input as one matrix.

    Attributes:
        parts: output rows of each layer, in order; the loader fills them one by one.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool):
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = tuple(parts)


class RMSNorm(Module):
    """RMSNorm over the last axis."""

    def __init__(self, size: int, eps: float, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]"""
        return self.ops.rms_norm(x, self.weight, self.eps)


class MLP(Module):
    """SwiGLU feed-forward: down(silu(gate(x)) · up(x))."""

    def __init__(self, size: int, inner: int, bias: bool, ops: Ops):
        super().__init__()
        self.gate_up = FusedLinear(size, (inner, inner), bias=bias)
        self.down = Linear(inner, size, bias=bias)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """[T, C] -> [T, C]"""
        return self.down(self.ops.swiglu(self.gate_up(x)))


class Merger(Module):
    """Turns the patches of one merge unit into one visual token."""

    def __init__(self, size: int, unit: int, out: int, ops: Ops):
        super().__init__()
        self.unit = unit
        self.norm = RMSNorm(size, 1e-6, ops)
        self.fc1 = Linear(size * unit, size * unit)
        self.fc2 = Linear(size * unit, out)

    def forward(self, x: Tensor) -> Tensor:
        """[P, Cv] -> [P / unit, C]"""
        units = self.norm(x).view(len(x) // self.unit, self.unit * x.shape[-1])
        return self.fc2(F.gelu(self.fc1(units)))
