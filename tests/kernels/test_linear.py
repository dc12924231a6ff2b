"""Linear layers, dense and packed for a CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanoglimpse.kernels.reference.linear import linear, pack
from nanoglimpse.kernels.reference.table import CPU, TORCH
from nanoglimpse.model.layers import Linear

# A sum in fp32 may be wrong by this share of the magnitudes of its terms, whatever the BLAS.
UNIT = torch.finfo(torch.float32).eps / 2


def test_modules_use_their_current_parameters():
    """Parameters are plain attributes too; converting, loading and copying must update these."""
    layer = Linear(3, 2)
    with torch.no_grad():
        layer.weight.fill_(1), layer.bias.fill_(0)
    x = torch.ones(1, 3)
    assert layer(x).tolist() == [[3, 3]]
    layer.load_state_dict({"weight": torch.full((2, 3), 2.0), "bias": torch.ones(2)}, assign=True)
    assert layer(x).tolist() == [[7, 7]]
    twin = copy.deepcopy(layer)
    assert layer.double()(x.double()).dtype == torch.float64
    layer.weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    assert layer(x.double()).tolist() == [[1, 1]]
    assert twin(x).tolist() == [[7, 7]]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert Linear(3, 2, bias=False).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
@torch.inference_mode()
def test_a_packed_matrix(dtype, biased):
    x, layer = torch.randn(13, 37).to(dtype), Linear(37, 11, bias=biased).to(dtype)
    for parameter in layer.parameters():
        parameter.data.normal_()
    dense = layer(x)
    exact = x.double() @ layer.weight.data.double().T + (layer.bias.data.double() if biased else 0)
    layer.pack(CPU)
    packed = layer(x)
    assert packed.dtype == dtype
    assert packed.shape == (13, 11)
    error, budget = ((out.double() - exact).norm() for out in (packed, dense))
    assert float(error) <= max(2 * float(budget), 1e-12)
    assert torch.equal(layer(x[::2]), layer(x)[::2])
    before = layer.weight
    layer.pack(TORCH)
    assert layer.weight is before


def test_packing_is_optional(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    layer = Linear(3, 2).requires_grad_(False)
    layer.load_state_dict({"weight": torch.full((2, 3), 2.0), "bias": torch.ones(2)})
    layer.pack(CPU)
    assert not layer.weight.is_mkldnn
    assert layer(torch.ones(1, 3)).tolist() == [[7, 7]]


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_and_few_rows(rows, dtype):
    weight, bias = torch.randn(300, 200).to(dtype), torch.randn(300).to(dtype)
    x = torch.randn(rows, 200).to(dtype)
    ours = linear(x, pack(nn.Parameter(weight, requires_grad=False)), bias)
    theirs = F.linear(x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert ours.shape == exact.shape
    errors = [(out.double() - exact).norm() for out in (ours, theirs)]
    rounding = (UNIT * x.abs().double() @ weight.abs().double().T).norm()
    assert errors[0] <= max(2 * errors[1], rounding)
