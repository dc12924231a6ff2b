"""The operations of the hot path as one table, chosen once when a model is loaded.

Model code calls operations only through an `Ops`, so that no layer depends on the backend that
runs it; `backends.select` returns the table for the name of a backend.

Each operation has two files of the same name. `reference/<name>.py` holds the implementation in
plain torch and the contract; `triton_ops/<name>.py` holds the Triton kernel and its launcher. They
are separate because Triton must not be imported before a model is loaded for it, and `triton.jit`
needs `triton.language` in the module that defines a kernel.

This folder is the package `nanoglimpse.kernels` and has no `__init__.py` on purpose. transformers
looks for a published package named `kernels`; with an `__init__.py`, a program that is started in
the checkout would import this folder in its place, and fail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nanoglimpse.kernels.reference.rope import Rope
from nanoglimpse.kernels.varlen import Segments

# One integer a sequence, on the host or on the device.
Integers = Sequence[int] | Tensor


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; the references document the contracts.

    Attributes:
        graph_safe: on a GPU, no operation of a decode step makes the host wait, so that a CUDA
            graph can capture the step.
    """

    # These four have optional arguments, which a Callable cannot state.
    attention: Callable[..., Tensor]
    skinny_linear: Callable[..., Tensor]
    gather: Callable[..., tuple[Tensor, Tensor | None]]
    rope_append: Callable[..., tuple[Tensor, Tensor | None]]
    decode_attention: Callable[[Tensor, Tensor, Tensor, Integers, Integers], Tensor]
    row_logits: Callable[[Tensor, Tensor, Segments], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Rope], Tensor]
    attention_colsum: Callable[[Tensor, Tensor, Segments], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    dequantize: Callable[[Tensor, Tensor, int], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    pack: Callable[[Tensor], Tensor]
    graph_safe: bool = False
