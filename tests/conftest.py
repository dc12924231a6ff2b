"""Shared fixtures. One thread: the tests run beside each other and on loaded machines."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Read where a kernel is defined, so before that: tests then run kernels in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nanoglimpse import load

from .tiny import write_checkpoint, write_glimpse

torch.set_num_threads(1)


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
