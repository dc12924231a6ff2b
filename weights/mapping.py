"""Which tensors of a checkpoint fill each parameter.

The table maps our modules, with `*` for a layer number, to the modules of the checkpoint whose rows
they stack. Names are those of transformers 4.x; `canonical` converts those of 5.x.
"""

import re
from typing import NamedTuple

from torch import nn

from nanoglimpse.model.layers import FusedLinear

MODULES: dict[str, tuple[str, ...]] = {
    "vision.patch_embed": ("visual.patch_embed.proj",),
    "vision.blocks.*.norm1": ("visual.blocks.*.norm1",),
    "vision.blocks.*.norm2": ("visual.blocks.*.norm2",),
    "vision.blocks.*.qkv": ("visual.blocks.*.attn.qkv",),
    "vision.blocks.*.proj": ("visual.blocks.*.attn.proj",),
    "vision.blocks.*.mlp.gate_up": ("visual.blocks.*.mlp.gate_proj", "visual.blocks.*.mlp.up_proj"),
    "vision.blocks.*.mlp.down": ("visual.blocks.*.mlp.down_proj",),
    "vision.merger.norm": ("visual.merger.ln_q",),
    "vision.merger.fc1": ("visual.merger.mlp.0",),
    "vision.merger.fc2": ("visual.merger.mlp.2",),
    "decoder.embed_tokens": ("model.embed_tokens",),
    "decoder.layers.*.input_layernorm": ("model.layers.*.input_layernorm",),
    "decoder.layers.*.qkv": (
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
    ),
    "decoder.layers.*.o": ("model.layers.*.self_attn.o_proj",),
    "decoder.layers.*.post_attention_layernorm": ("model.layers.*.post_attention_layernorm",),
    "decoder.layers.*.mlp.gate_up": ("model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"),
    "decoder.layers.*.mlp.down": ("model.layers.*.mlp.down_proj",),
    "decoder.norm": ("model.norm",),
    "decoder.lm_head": ("lm_head",),
    "predictor.attn_in_proj": ("attn_fuser.attn_in_proj",),
    "predictor.cond_in_projs.*": ("attn_fuser.cond_in_projs.*",),
    "predictor.layers.*.norm1": ("attn_fuser.layers.*.norm1",),
    "predictor.layers.*.norm2": ("attn_fuser.layers.*.norm2",),
    "predictor.layers.*.qk": ("attn_fuser.layers.*.attn.q_proj", "attn_fuser.layers.*.attn.k_proj"),
    "predictor.layers.*.v": ("attn_fuser.layers.*.attn.v_proj",),
    "predictor.layers.*.o": ("attn_fuser.layers.*.attn.o_proj",),
    "predictor.layers.*.mlp.gate_up": (
        "attn_fuser.layers.*.mlp.gate_proj",
        "attn_fuser.layers.*.mlp.up_proj",
    ),
    "predictor.layers.*.mlp.down": ("attn_fuser.layers.*.mlp.down_proj",),
    "predictor.attn_out_proj": ("attn_fuser.attn_out_proj",),
}


class Part(NamedTuple):
    """Rows `start` to `stop` of parameter `name`, which one tensor of the checkpoint fills."""

    name: str
    start: int
    stop: int


def canonical(name: str) -> str:
    """A tensor's name in the 4.x layout."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def parts(module: nn.Module) -> dict[str, Part]:
    """The rows of the parameters of `module`, by the name of the tensor that fills them."""
    table = {}
    for name, parameter in module.named_parameters():
        owner, leaf = name.rsplit(".", 1)
        number = re.search(r"\.(\d+)(\.|$)", owner)
        sources = MODULES[re.sub(r"\.\d+(?=\.|$)", ".*", owner)]
        layer = module.get_submodule(owner)
        sizes = layer.parts if isinstance(layer, FusedLinear) else (len(parameter),)
        start = 0
        for source, size in zip(sources, sizes, strict=True):
            source = source.replace("*", number[1]) if number else source
            table[f"{source}.{leaf}"] = Part(name, start, start + size)
            start += size
    return table
