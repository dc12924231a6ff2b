"""The command `nanoglimpse doctor`."""

from dataclasses import replace

import pytest

from nanoglimpse import loader
from nanoglimpse.doctor.__main__ import main
from nanoglimpse.inference import warm_up
from nanoglimpse.kernels.reference.table import TORCH


def swiglu(x):
    return TORCH.swiglu(x)


def rms_norm(x, weight, eps):
    return TORCH.rms_norm(x, weight, eps + 0.1)


@pytest.fixture
def ops(request, monkeypatch):
    monkeypatch.setattr(warm_up, "SIDES", (112, 56))
    table = replace(TORCH, swiglu=swiglu, **request.param)
    monkeypatch.setattr(loader, "select", lambda backend, device: table)


@pytest.mark.parametrize(("ops", "code"), [({}, 0), ({"rms_norm": rms_norm}, 1)], indirect=["ops"])
def test_a_line_an_operation(ops, code, capsys):
    assert main(["--quiet", "--device", "cpu"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("nanoglimpse ")
    assert "torch 2." in lines[0]
    rows = {line.split()[0]: line for line in lines[2:-1]}
    assert rows["swiglu"].endswith("  agrees")
    assert ("rms_norm" in rows) == bool(code)
    if code:
        assert "more than 1.0e-04" in rows["rms_norm"]
    assert lines[-1] == "Decode steps are not captured."


def test_plain_torch_has_nothing_to_check(capsys):
    assert main(["--quiet", "--device", "cpu"]) == 0
    assert "nothing to check" in capsys.readouterr().out
