"""Operations that are run beside the references, to see whether their results agree.

Kernels are compiled for the GPU at hand by the compiler at hand, and a fault of either shows as
wrong answers only. `Checks.ops` runs both for each new set of sizes, so that an ordinary prompt
checks each operation with the values, sizes and layouts that the model has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.table import REFERENCES, TORCH

# Largest relative error of a row. In half precision two results that are both rounded correctly
# differ by some 0.5 of the dtype's epsilon; in fp32 the order of sums matters more than that.
EPSILONS, MIN_LIMIT = 2, 1e-4


@dataclass
class OpCheck:
    """How an operation compares with the reference.

    Attributes:
        name: a field of `Ops`.
        calls: calls that were compared, one for each set of sizes.
        error: the largest error of a row so far, relative to the row.
        fault: what is wrong with the operation; None if nothing is.
    """

    name: str
    calls: int = 0
    error: float = 0.0
    fault: str | None = None


class Checks:
    """Runs the operations of a table that are not references beside these.

    Attributes:
        ops: a table whose operations run both, and then return what the reference does.
        results: by name, without operations that have not been called.
    """

    def __init__(self, ops: Ops):
        self.results: dict[str, OpCheck] = {}
        self.original = ops
        names = [reference.__name__ for reference in REFERENCES]
        own = [name for name in names if getattr(ops, name) is not getattr(TORCH, name)]
        both: dict[str, Any] = {name: self._both(name) for name in own}
        self.ops = replace(ops, **both)

    @property
    def passed(self) -> Ops:
        """The table with references in place of operations at fault; no graph can capture those."""
        faulty = [name for name, check in self.results.items() if check.fault]
        references: dict[str, Any] = {name: getattr(TORCH, name) for name in faulty}
        safe = self.original.graph_safe and not faulty
        return replace(self.original, **references, graph_safe=safe)

    def _both(self, name: str) -> Callable[..., Any]:
        op, reference = getattr(self.original, name), getattr(TORCH, name)
        known: set[tuple[Any, ...]] = set()

        def run(*args: Any, **options: Any) -> Any:
            check = self.results.setdefault(name, OpCheck(name))
            call = tuple(map(_kind, (*args, *options.values())))
            if call in known:
                return (reference if check.fault else op)(*args, **options)
            known.add(call)
            check.calls += 1
            # Operations write to arguments as well, which each therefore gets for itself.
            copies = [_copy(x) if isinstance(x, Tensor) else x for x in args]
            found = error = None
            try:
                found = op(*copies, **options)
            except Exception as raised:
                error = raised
            try:
                expected = reference(*args, **options)
                if error is None:
                    _compare(check, (found, *copies), (expected, *args))
            except torch.AcceleratorError as raised:
                raise NanoglimpseError(
                    f"operation {name} has stopped the GPU ({_line(raised)}); use backend torch"
                ) from raised
            if error is not None:
                check.fault = f"it fails: {_line(error)}"
            return expected

        return run


def _kind(argument: Any) -> Any:
    """What of an argument decides which code runs."""
    if isinstance(argument, Tensor):
        return argument.shape
    return argument if isinstance(argument, bool | None) else type(argument)


def _copy(x: Tensor) -> Tensor:
    """A copy in the same layout, which `clone` changes where rows have gaps between them."""
    if 0 in x.stride():
        return x.clone()
    return x.new_empty_strided(x.shape, x.stride()).copy_(x)


def _compare(check: OpCheck, found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, tuple):
            _compare(check, ours, theirs)
        elif isinstance(theirs, Tensor) and theirs.is_floating_point():
            error = row_error(ours, theirs)
            limit = max(EPSILONS * torch.finfo(theirs.dtype).eps, MIN_LIMIT)
            check.error = max(check.error, error)
            if not error <= limit:
                check.fault = f"a row differs by {error:.1e} of its size, more than {limit:.1e}"


def row_error(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row of the last axis, relative to it or, if larger, to the median row.

    What is not finite is an error, unless both have it in the same place.
    """
    if found.shape != expected.shape:
        return torch.inf
    if not expected.numel():
        return 0.0
    a, b = (x.float().reshape(-1, x.shape[-1]) for x in (found, expected))
    error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).norm(dim=-1)
    size = torch.where(b.isfinite(), b, 0.0).norm(dim=-1)
    share = torch.where(error == 0, 0.0, error / size.clamp_min(size.median()))
    return float(share.nan_to_num(torch.inf, torch.inf).max())


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
