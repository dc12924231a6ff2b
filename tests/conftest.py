"""Shared fixtures. One thread: the tests run beside each other and on loaded machines."""

import os
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# cuBLAS reads it when it starts; without it, it refuses deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    torch.cuda.init()  # before `hidden_gpu` hides the GPU, which would be for good
else:
    # Read where a kernel is defined, so before that: tests then run kernels in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from triton.runtime import interpreter

from nanoglimpse import load
from tests.helpers.tiny import write_checkpoint, write_glimpse

torch.set_num_threads(1)


def _dot(self, a, b, d, *_):
    """`tl.dot` in the interpreter, rounded once.

    Its own is numpy's, whose error is that of the BLAS and processor at hand, up to twice torch's.
    """
    if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
        return _numpys(self, a, b, d, *_)
    product = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
    return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)


def _patch_tensor(tensor, *scope):
    """The interpreter of Triton 3.6 calls `int` on an array, which numpy refuses from 2.4 on."""
    _patch(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


_numpys = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = _dot
_patch = interpreter._patch_lang_tensor
interpreter._patch_lang_tensor = _patch_tensor


@contextmanager
def hidden_gpu(module):
    """Hides a GPU from the tests of a module, and from programs that they start.

    Only modules with a `DEVICE` run there: all others expect the numbers and dtypes of a CPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(module, "DEVICE"):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module", autouse=True)
def cpu_by_default(request):
    with hidden_gpu(request.module):
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nano():
    return load("nano", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random checkpoint with glimpse weights in the published layout."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    write_glimpse(folder / "glimpse", folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return load(tiny_folder, dtype="float32", device="cpu")
