"""The references as `Ops`: plain torch, and torch with matrices packed for a CPU."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.attention import attention
from nanoglimpse.kernels.reference.attention_colsum import attention_colsum
from nanoglimpse.kernels.reference.decode_attention import decode_attention
from nanoglimpse.kernels.reference.dequantize import dequantize
from nanoglimpse.kernels.reference.gather import gather
from nanoglimpse.kernels.reference.linear import linear, pack, skinny_linear, swiglu
from nanoglimpse.kernels.reference.norm import add_rms_norm, rms_norm
from nanoglimpse.kernels.reference.rope import rope_append, rotate, row_logits


def _keep_dense(weight: Tensor) -> Tensor:
    return weight


REFERENCES: tuple[Any, ...] = (
    *(attention, skinny_linear, decode_attention, row_logits, gather, rms_norm, add_rms_norm),
    *(rotate, rope_append, attention_colsum, swiglu, linear, dequantize),
)
TORCH = Ops(pack=_keep_dense, **{reference.__name__: reference for reference in REFERENCES})
CPU = replace(TORCH, pack=pack)
