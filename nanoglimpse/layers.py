"""Parts that the vision encoder, the decoder and the predictor are built from."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.ops import Ops
from .kernels.quantized import PRODUCTS, quantize


class Module(nn.Module):
    """nn.Module for small, often called parts, without two of its costs.

    Each weighs as much as a product of small matrices does. A call is `forward`, without a search
    for hooks. Parameters and sub-modules are also ordinary attributes: nn.Module alone finds them
    in `__getattr__`, when every ordinary look-up has failed.
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


class Linear(Module):
    """W x + b. Weights are not initialised: they come from a file, or from who trains them."""

    product = staticmethod(F.linear)
    opaque = False  # whether `weight` is in a layout that only `product` can read

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return self.product(x, self.weight, self.bias)

    def few(
        self,
        x: Tensor,
        ops: Ops,
        norm: "RMSNorm | None" = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, with what stands around it; see the op `few_rows`."""
        before = norm and (norm.weight, norm.eps)
        return ops.few_rows(x, self.weight, self.bias, before, gated, residual, self.product)

    def rows(self, x: Tensor, first: int, stop: int) -> Tensor:
        """Outputs `first` to `stop` alone, [T, in] -> [T, stop - first]; of a layer with bias."""
        if self.opaque:
            return self.forward(x)[:, first:stop]
        return F.linear(x, self.weight[first:stop], self.bias[first:stop])

    def pack(self, ops: Ops) -> None:
        """Lays the matrix out as `ops` likes it best."""
        self.take(ops.pack(self.weight), ops)

    def take(self, packed: nn.Parameter, ops: Ops) -> None:
        """Takes a matrix that `ops` has laid out."""
        self.weight, self.product = packed, ops.linear
        self.opaque = packed.is_mkldnn

    def quantize(self, weight: Tensor, kind: str) -> dict[str, Tensor]:
        """Takes the matrix in 8 or 4 bits; what the layer then holds in its place, by name."""
        packed, scales = quantize(weight, kind)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.product = partial(PRODUCTS[kind], scales=self.scales)
        self.opaque = True
        return {"weight": self.weight, "scales": self.scales}


class Embedding(Module):
    """A row of the table for each id; not initialised, as `Linear`."""

    def __init__(self, rows: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        """[T] -> [T, C]"""
        return F.embedding(ids, self.weight)


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

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normed sum of both and the sum, [..., C] each; x is used up."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


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
