"""Tiny random checkpoints that reach every branch of the model, every size another number."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from nanoglimpse.config import GlimpseConfig, parse_config
from nanoglimpse.kernels.reference.table import TORCH
from nanoglimpse.model.decoder import Decoder
from nanoglimpse.model.glimpse import Glimpse
from nanoglimpse.model.vision import VisionEncoder
from nanoglimpse.weights.glimpse import save_glimpse
from nanoglimpse.weights.mapping import parts

VISION = {
    "depth": 5,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 3,
    "in_chans": 3,
    "out_hidden_size": 48,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1, 4],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
TEXT = {
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 130,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "max_position_embeddings": 2000,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
}
TOP = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
    "eos_token_id": 124,
}
GLIMPSE = {
    "selected_layers": [3],
    "reduce_layer": 3,
    "le_layers": [0, 1, 2, 3, 4, 5],
    "le_length": 1,
    "le_dropout_prob": 0.1,
    "le_norm_type": "rmsnorm",
    "use_attention_logits": True,
    "attn_fuse_type": "AttnFuserV1",
    "attn_fuse_size": 12,
    "visual_cond_size": 20,
    "attn_fuse_num_heads": 2,
    "attn_fuse_hidden_act": "silu",
    "attn_fuse_global": True,
    "selected_visual_layers": [4, 2, 1],
    "ori_attn_supervision": False,
    "deep_supervision": False,
    "reduce_threshold": 0.5,
    "use_ref_masks": False,
    "use_zero_masks": False,
    "anchor_positions": [],
    "min_remain_num": 1,
    "max_remain_ratio": None,
}
IMAGE, VIDEO, START, END, EOS = 120, 121, 122, 123, 124


def config_dict(**changes) -> dict:
    """A flat config.json as of transformers 4.x; keys of the vision part go to it."""
    vision = VISION | {k: v for k, v in changes.items() if k in VISION and k not in TEXT}
    rest = {k: v for k, v in changes.items() if k not in VISION or k in TEXT}
    return {**TOP, **TEXT, **rest, "vision_config": vision}


def random_tensors(module: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random fp32 tensors for every checkpoint tensor that `module` is made of."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    tensors = {}
    for name, part in parts(module).items():
        shape = (part.stop - part.start, *shapes[part.name][1:])
        scale = 0.02 if "bias" in name else shape[-1] ** -0.5
        values = torch.randn(shape, generator=generator) * scale
        tensors[name] = 1 + 0.1 * values if "norm" in name or "ln_q" in name else values
    return tensors


def model_tensors(config: dict, seed: int = 1) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint of this configuration, names and shapes as in 4.x."""
    parsed = parse_config(config, "tiny")
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "vision": VisionEncoder(parsed.vision_config, TORCH),
                "decoder": Decoder(parsed, TORCH),
            }
        )
    tensors = random_tensors(model, seed)
    patch = "visual.patch_embed.proj.weight"
    vision = parsed.vision_config
    tensors[patch] = tensors[patch].view(
        -1, vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size
    )
    tensors["model.embed_tokens.weight"] *= TEXT["hidden_size"] ** 0.5
    return tensors


def write_checkpoint(folder: Path, config: dict | None = None, seed: int = 1) -> dict:
    """Writes config.json and model.safetensors; returns the configuration."""
    config = config or config_dict()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model_tensors(config, seed), folder / "model.safetensors", {"format": "pt"})
    return config


def glimpse_tensors(config: dict, glimpse: dict, seed: int = 2) -> dict[str, torch.Tensor]:
    """Tensors of glimpse weights by dotted name, shapes as in methods 3.5 of the paper's code."""
    base = parse_config(config, "tiny")
    layers, size = len(glimpse["le_layers"]), base.text_config.hidden_size
    fields = {k: v for k, v in glimpse.items() if k in GlimpseConfig.__dataclass_fields__}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    with torch.device("meta"):
        module = Glimpse(base, GlimpseConfig(**fields), TORCH)
    tensors = random_tensors(nn.ModuleDict({"predictor": module.predictor}), seed)
    last = len(glimpse["selected_visual_layers"]) - 1
    for leaf in ("weight", "bias"):
        head = tensors.pop(f"attn_fuser.attn_out_proj.{leaf}")
        tensors[f"attn_fuser.attn_out_projs.{last}.{leaf}"] = head * 3
    generator = torch.Generator().manual_seed(seed + 1)
    tensors["learnable_embeddings"] = torch.randn(layers, 1, size, generator=generator)
    tensors["le_proj.weight"] = torch.randn(size, size, generator=generator) * size**-0.5
    tensors["le_proj.bias"] = torch.randn(size, generator=generator) * 0.02
    tensors["le_norm.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
    return tensors


def write_glimpse(folder: Path, base: Path, seed: int = 2, **changes) -> dict:
    """Writes glimpse weights for the checkpoint in `base`, both layouts; returns their config."""
    config = json.loads((base / "config.json").read_text())
    glimpse = GLIMPSE | changes
    tensors = glimpse_tensors(config, glimpse, seed)
    both = {**config, **glimpse, "model_type": "qwen2_5_vl_gp"}
    save_glimpse(folder, tensors, both)
    return both


def patches_of(grids, seed: int = 0) -> torch.Tensor:
    """Random patches for these grids of the tiny model."""
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(seed))


def chat_ids(*parts, seed: int = 0) -> list[int]:
    """Token ids: an int is so many random text tokens, a grid its placeholders with brackets."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 120, (part,), generator=generator).tolist()
        else:
            kind = VIDEO if len(part) == 4 else IMAGE
            ids += [START, *[kind] * (part[0] * part[1] * part[2] // 4), END]
    return ids
