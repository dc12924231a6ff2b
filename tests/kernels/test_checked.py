"""Operations beside the references: what agrees, what does not, and what is used afterwards."""

import re
from dataclasses import replace

import pytest
import torch

from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.kernels.checked import EPSILONS, MIN_LIMIT, Checks, row_error
from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.reference.table import TORCH

X, WEIGHT = torch.randn(40, 64), torch.rand(64)


def own(name, change=lambda out: out):
    """A table with an operation that is not the reference."""

    def op(*args, **options):
        return change(getattr(TORCH, name)(*args, **options))

    return replace(TORCH, graph_safe=True, **{name: op})


def check(ops, name, *args):
    checks = Checks(ops)
    expected = getattr(TORCH, name)(*[x.clone() for x in args[:-1]], args[-1])
    out = getattr(checks.ops, name)(*args)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    return checks


def test_what_agrees_stays():
    ops = own("rms_norm", lambda out: out * (1 + 1e-6))
    checks = check(ops, "rms_norm", X, WEIGHT, 1e-6)
    found = checks.results["rms_norm"]
    assert found.fault is None
    assert 5e-7 < found.error < 2e-6
    assert checks.passed == ops
    assert Checks(TORCH).ops == TORCH


def one_row(out):
    out[7] *= 1.005
    return out


def not_a_number(out):
    out[0, 0] = torch.nan
    return out


def raising(out):
    raise RuntimeError("no kernel image\nfor this device")


WRONG = {
    "one row": (one_row, "a row differs by .*e-03 of its size, more than 1.0e-04"),
    "not a number": (not_a_number, "a row differs by inf of its size, more than 1.0e-04"),
    "another shape": (lambda out: out[:-1], "a row differs by inf of its size, more than 1.0e-04"),
    "raising": (raising, "it fails: RuntimeError: no kernel image"),
}


@pytest.mark.parametrize(("change", "fault"), WRONG.values(), ids=WRONG)
def test_what_does_not_agree_is_replaced(change, fault):
    ops = own("rms_norm", change)
    checks = check(ops, "rms_norm", X.clone(), WEIGHT, 1e-6)
    assert re.fullmatch(fault, checks.results["rms_norm"].fault)
    assert checks.passed.rms_norm is TORCH.rms_norm
    assert not checks.passed.graph_safe
    # Later calls, too, get the reference's result.
    torch.testing.assert_close(
        checks.ops.rms_norm(X, WEIGHT, 1e-6), TORCH.rms_norm(X, WEIGHT, 1e-6), rtol=0, atol=0
    )
    assert checks.results["rms_norm"].calls == 1


def test_what_an_operation_writes_to_counts():
    """A wrong row in the cache is a fault, and the cache gets the reference's row."""
    rope = Rope.of(torch.rand(5, 8))
    qkv, (k, v) = torch.randn(5, 4, 16), torch.zeros(2, 9, 1, 16)

    def shifted(qkv, rope, k, v, rows, scored=None):
        return TORCH.rope_append(qkv, rope, k, v, slice(rows.start + 1, rows.stop + 1), scored)

    checks = Checks(replace(TORCH, rope_append=shifted))
    checks.ops.rope_append(qkv, rope, k, v, slice(2, 7))
    assert checks.results["rope_append"].fault
    assert k[2:7].abs().sum() > 0
    assert not k[7:].any()


def test_each_size_is_compared_once():
    checks = Checks(own("rms_norm"))
    for rows in (3, 3, 5, 3):
        checks.ops.rms_norm(X[:rows], WEIGHT, 1e-6)
    assert checks.results["rms_norm"].calls == 2


def test_layouts_are_those_of_the_call():
    """Kernels read strides, so a copy of a slice has the gaps of the slice."""
    seen = []

    def op(x, weight, eps):
        seen.append(x.stride())
        return TORCH.rms_norm(x, weight, eps)

    Checks(replace(TORCH, rms_norm=op)).ops.rms_norm(X[:, :32], WEIGHT[:32], 1e-6)
    assert seen == [(64, 1)]


def test_a_gpu_that_stops_is_named():
    def op(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    def reference(*_):
        raise torch.AcceleratorError("an illegal memory access was encountered\nmore")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vars(TORCH), "swiglu", reference)
        checks = Checks(replace(TORCH, swiglu=op))
    with pytest.raises(NanoglimpseError, match=r"swiglu has stopped the GPU .*illegal memory"):
        checks.ops.swiglu(X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_fault_and_a_missing_key_is(dtype):
    """Attention over 200 keys with probabilities rounded to the dtype, as kernels have them."""
    q, k, v = (torch.randn(n, 128, dtype=torch.float64).to(dtype) for n in (1, 200, 200))

    def attend(q, keys, rounded):
        scores = (q.double() @ k[:keys].double().T) * 128**-0.5
        return (scores.softmax(-1).to(rounded).double() @ v[:keys].double()).to(dtype)

    limit = max(EPSILONS * torch.finfo(dtype).eps, MIN_LIMIT)
    assert row_error(attend(q, 200, dtype), attend(q, 200, torch.float64)) < limit / 3
    even = torch.zeros_like(q)
    assert row_error(attend(even, 199, dtype), attend(even, 200, dtype)) > limit


def test_rows_of_zeros_and_no_rows():
    zeros, empty = torch.zeros(3, 4), torch.zeros(0, 4)
    assert row_error(zeros, zeros) == 0
    assert row_error(zeros + 1, zeros) == torch.inf
    assert row_error(empty, empty) == 0
    assert row_error(zeros * torch.nan, zeros * torch.nan) == 0
