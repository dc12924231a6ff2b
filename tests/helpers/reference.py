"""GlimpsePrune written a second time: on transformers' modules, with loops, one prompt at a time.

It shares no code with the engine. Slow and plain on purpose: it is what the engine is held against.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index


@dataclass
class Reference:
    """The stages of one prompt, named as the engine names them."""

    visual: Tensor
    taps: Tensor
    glimpse_logits: Tensor
    importance: Tensor
    kept: Tensor
    positions: Tensor
    hidden: Tensor
    logits: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    tokens: list[int]


def hf_model(folder) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint in transformers, fp32, attention written out; fails if a tensor is missing."""
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()


def vision(model, patches: Tensor, grids, taps) -> tuple[Tensor, Tensor]:
    """Merged tokens and tapped features in raster order."""
    visual = model.model.visual
    seen = {}
    hooks = [
        visual.blocks[index].register_forward_hook(
            lambda module, args, out, index=index: seen.__setitem__(index, out)
        )
        for index in taps
    ]
    thw = torch.tensor([list(grid) for grid in grids])
    merged = visual(patches, grid_thw=thw).pooler_output
    for hook in hooks:
        hook.remove()
    order, _ = get_vision_window_index(thw, spatial_merge_size=2, window_size=112, patch_size=14)
    features = torch.stack([seen[index].view(len(merged), 4, -1).mean(1) for index in taps])
    raster = torch.empty_like(features)
    raster[:, order] = features
    return merged, raster


def positions_of(model, token_ids: Tensor, grids) -> Tensor:
    """M-RoPE ids [3, T] of a prompt with images, from transformers."""
    config = model.config
    kinds = (token_ids == config.image_token_id).int()[None]
    if not grids:
        return torch.arange(len(token_ids)).expand(3, -1)
    thw = torch.tensor([list(grid) for grid in grids])
    positions, _ = model.model.get_rope_index(token_ids[None], kinds, image_grid_thw=thw)
    return positions[:, 0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, None] + turned * sin[:, None]


class Layer:
    """One decoder layer with its attention written as a loop over heads."""

    def __init__(self, layer, config):
        self.layer, self.attn = layer, layer.self_attn
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads

    def qkv(self, hidden: Tensor, tables) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, k and v of rows, [T, heads, D]."""
        x = self.layer.input_layernorm(hidden)
        q = self.attn.q_proj(x).view(len(x), self.heads, -1)
        k = self.attn.k_proj(x).view(len(x), self.kv_heads, -1)
        v = self.attn.v_proj(x).view(len(x), self.kv_heads, -1)
        return _rotate(q, *tables), _rotate(k, *tables), v

    def finish(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows of q are the last of k's; each sees itself and what lies before it."""
        offset, group = len(k) - len(q), self.heads // self.kv_heads
        out = torch.empty_like(q)
        for head in range(self.heads):
            for row in range(len(q)):
                seen = slice(0, offset + row + 1)
                scores = k[seen, head // group] @ q[row, head] / math.sqrt(q.shape[-1])
                out[row, head] = scores.softmax(0) @ v[seen, head // group]
        hidden = hidden + self.attn.o_proj(out.flatten(1))
        return hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))


def _tables(model, positions: Tensor) -> tuple[Tensor, Tensor]:
    text = model.model.language_model
    cos, sin = text.rotary_emb(torch.zeros(1), positions[:, None])
    return cos[0], sin[0]


def glimpse_vector(tensors, config, layer: int, eps: float) -> Tensor | None:
    """RMSNorm(W E + b) of one layer, or None where there is no embedding."""
    if layer not in config["le_layers"]:
        return None
    e = tensors["learnable_embeddings"][config["le_layers"].index(layer), 0]
    x = tensors["le_proj.weight"] @ e + tensors["le_proj.bias"]
    return x / torch.sqrt((x * x).mean() + eps) * tensors["le_norm.weight"]


def predictor(tensors, config, logits: Tensor, taps: Tensor, grids, windows=False) -> Tensor:
    """VIP, token by token and head by head."""

    def w(name):
        return tensors[f"attn_fuser.{name}"]

    def norm(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w(name)

    heads = config["attn_fuse_num_heads"]
    size = config["attn_fuse_size"] + config["visual_cond_size"]
    width = size // heads
    groups, rows, columns, start = [], [], [], 0
    for t, h, w_ in grids:
        h, w_ = h // 2, w_ // 2
        for _ in range(t):
            cells = {}
            for cell in range(h * w_):
                row, column = divmod(cell, w_)
                rows.append(row)
                columns.append(column)
                key = (row // 4, column // 4) if windows else 0
                cells.setdefault(key, []).append(start + cell)
            groups += list(cells.values())
            start += h * w_
    steps = torch.arange(width // 4) / (width // 4)
    freq = 10000.0**-steps
    angle = torch.stack(
        [torch.cat((r * freq, c * freq)) for r, c in zip(rows, columns, strict=True)]
    )
    cos = torch.cat((angle.cos(), angle.cos()), -1)
    sin = torch.cat((angle.sin(), angle.sin()), -1)
    x = logits @ w("attn_in_proj.weight").T + w("attn_in_proj.bias")
    for m in range(len(config["selected_visual_layers"])):
        at = f"layers.{m}."
        condition = taps[m] @ w(f"cond_in_projs.{m}.weight").T + w(f"cond_in_projs.{m}.bias")
        u = norm(x, at + "norm1.weight")
        z = torch.cat((u, condition), -1)
        q = _rotate((z @ w(at + "attn.q_proj.weight").T).view(len(z), heads, -1), cos, sin)
        k = _rotate((z @ w(at + "attn.k_proj.weight").T).view(len(z), heads, -1), cos, sin)
        v = (u @ w(at + "attn.v_proj.weight").T).view(len(z), heads, -1)
        out = torch.empty_like(v)
        for group in groups:
            for i in group:
                for head in range(heads):
                    score = k[group, head] @ q[i, head] / math.sqrt(width)
                    out[i, head] = score.softmax(0) @ v[group, head]
        x = x + out.flatten(1) @ w(at + "attn.o_proj.weight").T
        y = norm(x, at + "norm2.weight")
        gate = y @ w(at + "mlp.gate_proj.weight").T + w(at + "mlp.gate_proj.bias")
        up = y @ w(at + "mlp.up_proj.weight").T + w(at + "mlp.up_proj.bias")
        inner = gate * torch.sigmoid(gate) * up
        x = x + inner @ w(at + "mlp.down_proj.weight").T + w(at + "mlp.down_proj.bias")
    last = len(config["selected_visual_layers"]) - 1
    return (x @ w(f"attn_out_projs.{last}.weight").T + w(f"attn_out_projs.{last}.bias"))[:, 0]


def select(importance: Tensor, threshold, max_ratio, min_tokens) -> Tensor:
    """The selection rule on lists."""
    p = [1 / (1 + math.exp(-value)) for value in importance.tolist()]
    order = sorted(range(len(p)), key=lambda i: -importance[i].item())
    kept = {i for i, value in enumerate(p) if value > threshold}
    if max_ratio is not None and p and len(kept) / len(p) > max_ratio:
        kept = set(order[: int(max_ratio * len(p))])
    if min_tokens and len(kept) < min_tokens:
        kept |= set(order[:min_tokens])
    return torch.tensor([i in kept for i in range(len(p))], dtype=torch.bool)


@torch.no_grad()
def run(
    model,
    tensors,
    config,
    token_ids,
    patches,
    grids,
    new_tokens=0,
    threshold=None,
    max_ratio=None,
    min_tokens=1,
) -> Reference:
    """A prompt through all stages and `new_tokens` greedy tokens; images only; in model.dtype."""
    text, patches = model.config.text_config, patches.to(model.dtype)
    tensors = {name: tensor.to(model.dtype) for name, tensor in tensors.items()}
    token_ids = torch.as_tensor(token_ids)
    is_image = token_ids == model.config.image_token_id
    visual, taps = vision(model, patches, grids, config["selected_visual_layers"])
    hidden = model.model.language_model.embed_tokens(token_ids)
    hidden[is_image] = visual
    positions = positions_of(model, token_ids, grids)
    last = positions[:, -1:] + 1
    eps, layers = text.rms_norm_eps, model.model.language_model.layers
    rows = torch.cat((hidden, glimpse_vector(tensors, config, 0, eps)[None]))
    tables = _tables(model, torch.cat((positions, last), 1))
    keys, values, looks = [], [], {}
    for index in range(config["reduce_layer"] + 1):
        layer = Layer(layers[index], text)
        extra = glimpse_vector(tensors, config, index, eps)
        if index and extra is not None:
            rows[-1] += extra
        q, k, v = layer.qkv(rows, tables)
        if index in config["selected_layers"]:
            group = text.num_attention_heads // text.num_key_value_heads
            looks[index] = torch.stack(
                [
                    k[:-1][is_image, head // group] @ q[-1, head] / math.sqrt(k.shape[-1])
                    for head in range(text.num_attention_heads)
                ],
                -1,
            )
        rows = layer.finish(rows, q, k, v)
        keys.append(k[:-1])
        values.append(v[:-1])
    hidden = rows[:-1]
    logits = torch.cat([looks[index] for index in config["selected_layers"]], -1)
    windows = not config["attn_fuse_global"]
    read = logits if config["use_attention_logits"] else logits - logits.logsumexp(0)
    importance = predictor(tensors, config, read, taps, grids, windows)
    threshold = config["reduce_threshold"] if threshold is None else threshold
    kept = select(importance, threshold, max_ratio, min_tokens)
    stays = torch.ones(len(token_ids), dtype=torch.bool)
    stays[is_image] = kept
    keys, values = [k[stays] for k in keys], [v[stays] for v in values]
    rows, left = hidden[stays], positions[:, stays]
    for index in range(config["reduce_layer"] + 1, text.num_hidden_layers):
        layer = Layer(layers[index], text)
        q, k, v = layer.qkv(rows, _tables(model, left))
        rows = layer.finish(rows, q, k, v)
        keys.append(k)
        values.append(v)
    out = model.lm_head(model.model.language_model.norm(rows[-1]))
    prompt_keys, prompt_values = list(keys), list(values)
    tokens, next_position = [], int(positions.max()) + 1
    step = out
    for number in range(new_tokens):
        tokens.append(int(step.argmax()))
        if number + 1 == new_tokens:
            break
        row = model.model.language_model.embed_tokens(torch.tensor([tokens[-1]]))
        tables = _tables(model, torch.full((3, 1), next_position))
        next_position += 1
        for index in range(text.num_hidden_layers):
            layer = Layer(layers[index], text)
            q, k, v = layer.qkv(row, tables)
            keys[index] = torch.cat((keys[index], k))
            values[index] = torch.cat((values[index], v))
            row = layer.finish(row, q, keys[index], values[index])
        step = model.lm_head(model.model.language_model.norm(row[-1]))
    return Reference(
        visual,
        taps,
        logits,
        importance,
        kept,
        left,
        hidden,
        out,
        prompt_keys,
        prompt_values,
        tokens,
    )
