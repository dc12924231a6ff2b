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


_numpys = interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.create_dot = _dot


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
