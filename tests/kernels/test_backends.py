"""The choice of a backend."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from nanoglimpse import UsageError
from nanoglimpse.kernels.backends import BACKENDS, select
from nanoglimpse.kernels.reference.table import CPU, TORCH


def test_backends_are_chosen_by_name():
    cpu = torch.device("cpu")
    assert select("auto", cpu) is CPU
    assert select("torch", cpu) is TORCH
    assert select("torch", torch.device("cuda")) is TORCH
    own = replace(TORCH, swiglu=print)
    assert select(own, cpu) is own
    with pytest.raises(UsageError, match=f"must be one of {', '.join(BACKENDS)}, got 'fast'"):
        select("fast", cpu)


def test_backends_on_cuda(monkeypatch):
    cuda = torch.device("cuda")
    assert select("auto", cuda) is not TORCH
    if find_spec("triton"):
        assert select("triton", cuda) is not TORCH
    monkeypatch.setattr("nanoglimpse.kernels.backends.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="which is not installed; use backend torch"):
        select("triton", cuda)


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match="does not run on cpu; use backend torch"):
        select("triton", torch.device("cpu"))
