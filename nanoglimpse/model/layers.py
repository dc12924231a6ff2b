"""Layers that the vision encoder, the decoder and the predictor are built from."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.quantize import quantize


class Module(nn.Module):
    """nn.Module whose parameters and sub-modules are also ordinary attributes.

    nn.Module finds them in `__getattr__`, after every ordinary look-up has failed. In a small
    decoder each such look-up takes as long as a product of small matrices.
    """

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


B = TypeVar("B", bound=nn.Module)


class Blocks(nn.ModuleList, Generic[B]):
    """nn.ModuleList of modules of one type, which a type checker knows."""

    def __getitem__(self, index: int) -> B:  # type: ignore[override]
        return super().__getitem__(index)  # type: ignore[return-value]

    def __iter__(self) -> Iterator[B]:
        return super().__iter__()  # type: ignore[return-value]


class Linear(Module):
    """W x + b. Weights are not initialised: they come from a file or from a trainer.

    Attributes:
        matmul: multiplies by `weight`, whatever its layout.
        scales: of a quantised matrix.
        is_packed: whether `weight` is in a layout that only `matmul` can read.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scales: nn.Parameter
    matmul: Callable[..., Tensor] = staticmethod(F.linear)
    is_packed: bool = False

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return self.matmul(x, self.weight, self.bias)

    def fused(
        self,
        x: Tensor,
        ops: Ops,
        norm: "RMSNorm | None" = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `forward` for few rows, with the operations around it; see the op `skinny_linear`."""
        before = norm and (norm.weight, norm.eps)
        return ops.skinny_linear(x, self.weight, self.bias, before, gated, residual, self.matmul)

    def slice(self, x: Tensor, first: int, stop: int) -> Tensor:
        """Outputs `first` to `stop` only, [T, in] -> [T, stop - first]."""
        if self.is_packed:
            return self.forward(x)[:, first:stop]
        bias = None if self.bias is None else self.bias[first:stop]
        return F.linear(x, self.weight[first:stop], bias)

    def pack(self, ops: Ops) -> None:
        """Lays the matrix out as `ops` multiplies it fastest."""
        packed = ops.pack(self.weight)
        # A dense matrix keeps its product: kernels fuse no other one.
        if packed is not self.weight:
            self.set_packed(packed, ops)

    def set_packed(self, packed: Tensor, ops: Ops) -> None:
        """Takes a matrix that `ops` has laid out."""
        weight = packed if isinstance(packed, nn.Parameter) else nn.Parameter(packed, False)
        self.weight, self.matmul = weight, ops.linear
        self.is_packed = packed.is_mkldnn

    def quantize(self, weight: Tensor, mode: str, ops: Ops) -> dict[str, Tensor]:
        """Takes the matrix in 8 or 4 bits; returns the layer's new parameters by name."""
        packed, matmul = quantize(weight, mode, ops)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(matmul.scales, requires_grad=False)
        self.matmul = matmul
        self.is_packed = True
        return {"weight": self.weight, "scales": self.scales}


class Embedding(Module):
    """A row of the table for each id; not initialised, as `Linear`."""

    weight: nn.Parameter

    def __init__(self, rows: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, ids: Tensor) -> Tensor:
        """[T] -> [T, C]"""
        return F.embedding(ids, self.weight)


class FusedLinear(Linear):
    """Linear layers with the same input as one matrix.

    Attributes:
        parts: output rows of each layer, in order; the loader fills them one by one.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool):
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = tuple(parts)


class RMSNorm(Module):
    """RMSNorm over the last axis."""

    weight: nn.Parameter

    def __init__(self, size: int, eps: float, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]"""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normed sum of both and the sum, [..., C] each; x is overwritten."""
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
