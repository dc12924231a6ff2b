"""The device and dtype that a user names, on machines with other GPUs than this one."""

import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from nanoglimpse import UsageError
from nanoglimpse.kernels.backends import select
from nanoglimpse.model.device import find_device, find_dtype
from tests.conftest import hidden_gpu

CUDA = torch.device("cuda:1")


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, an A100 and a T4."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (8, 0)
    )


@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_is_not_there():
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == CUDA
    with pytest.raises(UsageError, match=r"cuda:2 .* finds only cuda:0, cuda:1 here") as error:
        find_device("cuda:2")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("gpus")
def test_tests_see_a_gpu_only_where_they_name_a_device():
    with hidden_gpu(SimpleNamespace(DEVICE=CUDA)):
        assert find_device("auto").type == "cuda"
    with hidden_gpu(SimpleNamespace()):
        assert find_device("auto").type == "cpu"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.usefixtures("gpus")
def test_float16_where_there_is_no_bfloat16(nano):
    assert find_dtype("auto", torch.device("cuda:0"), nano.config) == torch.bfloat16
    assert find_dtype("auto", CUDA, nano.config) == torch.float16
    assert find_dtype("bfloat16", CUDA, nano.config) == torch.bfloat16
    assert find_dtype("auto", torch.device("cpu"), nano.config) == torch.float32


@pytest.mark.usefixtures("gpus")
@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_triton_refuses_old_gpus_by_name():
    assert select("triton", torch.device("cuda:0")).graph_safe
    needed = r"triton needs compute capability 8\.0, but cuda:1 has 7\.5; use backend torch"
    with pytest.raises(UsageError, match=needed):
        select("triton", CUDA)
