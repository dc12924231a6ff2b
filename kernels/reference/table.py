"""The references as `Ops`: plain torch, and torch with matrices packed for a CPU."""

from dataclasses import replace

from torch import Tensor

from nanoglimpse.kernels.interface import Ops
from nanoglimpse.kernels.reference.attention import attention
from nanoglimpse.kernels.reference.attention_colsum import attention_colsum
from nanoglimpse.kernels.reference.decode_attention import decode_attention
from nanoglimpse.kernels.reference.dequantize import dequantize
from nanoglimpse.kernels.reference.gather import gather
from nanoglimpse.kernels.reference.linear import linear, pack, skinny_linear
from nanoglimpse.kernels.reference.norm import add_rms_norm, rms_norm
from nanoglimpse.kernels.reference.rope import rope_append, rotate, row_logits
from nanoglimpse.kernels.reference.swiglu import swiglu


def _keep_dense(weight: Tensor) -> Tensor:
    return weight


TORCH = Ops(
    attention=attention,
    skinny_linear=skinny_linear,
    decode_attention=decode_attention,
    row_logits=row_logits,
    gather=gather,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rotate=rotate,
    rope_append=rope_append,
    attention_colsum=attention_colsum,
    swiglu=swiglu,
    dequantize=dequantize,
    linear=linear,
    pack=_keep_dense,
)
CPU = replace(TORCH, pack=pack)
