"""Shared fixtures. One thread: the tests run beside each other and on loaded machines."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
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
