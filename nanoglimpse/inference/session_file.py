"""Saves a session as one safetensors file, and loads it again.

The file holds what has been computed for the pictures: keys and values, hidden rows, visual tokens,
features. Its metadata identify the weights and hold the conversation. It contains no pictures.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoglimpse.config import as_safetensors, read_session_header, shown
from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.files import write_whole
from nanoglimpse.inference.prefix import HEADROOM, Prefix, SharedLayers
from nanoglimpse.inputs.prompt import PackedBatch, Prompt
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.methods import METHODS
from nanoglimpse.methods.base import PruningMethod
from nanoglimpse.methods.context import SelectionRule
from nanoglimpse.methods.options import KV_DROPS, ResolvedPruning
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import visual_mask, visual_tokens
from nanoglimpse.model.vision import BlockStats, VisionOutput
from nanoglimpse.weights.fingerprint import fingerprint

FORMAT = "nanoglimpse session 1"
# Fields of `SessionData` that the metadata hold as they are.
OPTIONS = ("seed", "system", "min_pixels", "max_pixels")


@dataclass(frozen=True)
class SessionData:
    """The state of a session, without the model.

    Attributes:
        pruning: method and rule for all questions.
        prompt: the shared part of all prompts, up to the last picture, without patches.
        vision: output of the vision encoder for the pictures.
        prefix: the shared rows after the first layers.
        seed: seed of methods that sample.
        system, min_pixels, max_pixels: options of the prompt, also for pictures that are added.
        turns: questions and answers of the conversation.
    """

    pruning: ResolvedPruning
    prompt: Prompt
    vision: VisionOutput
    prefix: Prefix
    seed: int
    system: str
    min_pixels: int | None
    max_pixels: int | None
    turns: tuple[tuple[str, str], ...] = ()


def save_session(model: Model, data: SessionData, path: Path) -> None:
    """Writes a session, completely or not at all.

    Raises:
        UsageError: its method is not built in.
        NanoglimpseError: the file cannot be written.
    """
    pruning = data.pruning
    if METHODS.get(pruning.method.name) is not pruning.method:
        raise UsageError(
            f"a session with method {pruning.method.name} cannot be saved, only sessions with "
            "built-in methods"
        )
    settings = {
        "method": pruning.method.name,
        "rule": asdict(pruning.rule),
        "kv_drop": pruning.kv_drop,
        "prune_videos": pruning.prune_videos,
        **{name: getattr(data, name) for name in OPTIONS},
        "turns": data.turns,
        "grids": data.prompt.grids,
    }
    metadata = {"format": FORMAT, **_identity(model), "told": json.dumps(settings)}
    write_whole(path, as_safetensors(_tensors(data), metadata))


def _identity(model: Model) -> dict[str, str]:
    return {"model": model.name, "dtype": str(model.dtype)[6:], "weights": fingerprint(model)}


def _tensors(data: SessionData) -> dict[str, Tensor]:
    prompt, prefix, vision = data.prompt, data.prefix, data.vision
    tensors = {
        "token_ids": prompt.token_ids,
        "positions": prompt.positions,
        "kept": prefix.kept,
        "k": prefix.cache.k[:, : prefix.num_rows],
        "v": prefix.cache.v[:, : prefix.num_rows],
        "hidden": prefix.hidden,
        "visual": vision.visual,
        "taps": vision.taps,
    }
    tensors |= {f"inputs.{layer}": x for layer, x in prefix.inputs.items()}
    tensors |= {f"received.{block}": x for block, x in vision.block_stats.received.items()}
    tensors |= {f"keys.{block}": x for block, x in vision.block_stats.keys.items()}
    if prefix.importance is not None:
        tensors["importance"] = prefix.importance
    return tensors


@torch.inference_mode()
def load_session(model: Model, path: Path) -> SessionData:
    """Loads a session, for the same model.

    Raises:
        UsageError: the file does not exist, or its method is unknown.
        NanoglimpseError: the file is not a session, corrupt, or of another model.
    """
    metadata, tensors = _read(path)
    _check_model(model, path, metadata)
    settings = read_session_header(metadata.get("told", ""), str(path), KV_DROPS)
    rule, drop = SelectionRule(**settings["rule"]), (settings["kv_drop"], settings["prune_videos"])
    pruning = ResolvedPruning.of(model, _method(settings["method"]), rule, *drop)
    try:
        state = _restore(model, pruning, settings["grids"], tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise _broken(path, error) from None
    options = {name: settings[name] for name in OPTIONS}
    return SessionData(pruning, *state, **options, turns=settings["turns"])


def _method(name: str) -> PruningMethod:
    # Not `find_method`: a file must not name code to import.
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}'; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise UsageError(f"there is no session {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise NanoglimpseError(f"{path} is not a session of this version of nanoglimpse")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> NanoglimpseError:
    reason = shown(str(error))
    return NanoglimpseError(
        f"{path} is not a session or is corrupt ({reason}); create the session again"
    )


def _check_model(model: Model, path: Path, metadata: dict[str, str]) -> None:
    own = _identity(model)
    if metadata.get("dtype") != own["dtype"]:
        raise NanoglimpseError(
            f"{path} was made in {metadata.get('dtype')}, but {model.name} is loaded in "
            f"{own['dtype']}; load it with the dtype of the session (--dtype)"
        )
    if metadata.get("weights") != own["weights"]:
        raise NanoglimpseError(
            f"{path} was made with other weights ({metadata.get('model')}) than those of "
            f"{model.name}; load the same model and glimpse weights, or create the session again"
        )


def _restore(
    model: Model, pruning: ResolvedPruning, grids: tuple, tensors: dict[str, Tensor]
) -> tuple[Prompt, VisionOutput, Prefix]:
    config = model.config
    ids, positions = tensors["token_ids"], tensors["positions"]
    _check_dtypes(model, tensors)
    for name, end in {"token_ids": model.text.vocab_size, "positions": 2**31}.items():
        values = tensors[name]
        if not values.numel() or int(values.min()) < 0 or int(values.max()) >= end:
            raise ValueError(f"{name} must be in 0 to {end - 1}")
    merge = config.vision_config.spatial_merge_size
    if any(h % merge or w % merge for _, h, w in grids):
        raise ValueError(f"sides of grids must be multiples of {merge}")
    if sum(visual_tokens(grid, config) for grid in grids) != int(visual_mask(ids, config).sum()):
        raise ValueError("grids do not fit the visual tokens")
    nothing = torch.empty(0, config.vision_config.patch_dim)
    prompt = Prompt(ids, positions, visual_mask(ids, config), nothing, grids)
    shared = SharedLayers.of(pruning, model.depth)
    _check_shapes(model, pruning, prompt, tensors)
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    stats = BlockStats(pruning.needs.vision_blocks)
    for block in stats.blocks:
        stats.received[block] = tensors[f"received.{block}"]
        stats.keys[block] = tensors[f"keys.{block}"]
    vision = VisionOutput(tensors["visual"], tensors["taps"], stats)
    # A byte of a file may be neither 0 nor 1.
    kept = tensors["kept"].view(torch.uint8).bool()
    batch = PackedBatch.pack([prompt], config, model.device)
    if 0 in pruning.layers:
        batch, _ = batch.keep(kept)
    rows, k, v = len(batch.token_ids), tensors["k"], tensors["v"]
    size = (shared.layers, [rows + HEADROOM])
    cache = KVCache(model.text, *size, batch.next_position, k, model.ops)
    cache.reserve([rows])
    cache.k[:, :rows], cache.v[:, :rows] = k, v
    inputs = {layer: tensors[f"inputs.{layer}"] for layer in shared.captured}
    decided = (kept, int(0 in pruning.layers), tensors.get("importance"))
    prefix = Prefix(shared, batch, *decided, cache, tensors["hidden"], inputs)
    return prompt, vision, prefix


def _check_dtypes(model: Model, tensors: dict[str, Tensor]) -> None:
    known = {"token_ids": torch.int64, "positions": torch.int64, "kept": torch.bool}
    for name, tensor in tensors.items():
        wanted = known.get(name, model.dtype)
        scored = name == "importance" or name.startswith("received.")
        if tensor.dtype != wanted and not (scored and tensor.is_floating_point()):
            raise ValueError(f"{name} is {tensor.dtype}, expected {wanted}")


def _check_shapes(
    model: Model, pruning: ResolvedPruning, prompt: Prompt, tensors: dict[str, Tensor]
) -> None:
    text, vision, needs = model.text, model.config.vision_config, pruning.needs
    shared, taps = SharedLayers.of(pruning, model.depth), len(needs.taps)
    total, visual = len(prompt), int(prompt.visual.sum())
    rows = total - visual + int(tensors["kept"].sum())
    cached = [len(shared.layers), rows, text.num_key_value_heads, text.head_dim]
    expected = {
        "token_ids": [total],
        "positions": [3, total],
        "kept": [visual],
        "k": cached,
        "v": cached,
        "hidden": [rows if shared.stop else 0, text.hidden_size],
        "visual": [visual, text.hidden_size],
        "taps": [taps, visual, vision.hidden_size if taps else 0],
    }
    expected |= {f"inputs.{layer}": [rows, text.hidden_size] for layer in shared.captured}
    expected |= {f"received.{block}": [visual] for block in needs.vision_blocks}
    expected |= {f"keys.{block}": [visual, vision.head_dim] for block in needs.vision_blocks}
    if "importance" in tensors:
        expected["importance"] = [visual]
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(found | expected):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{name} has shape {found.get(name)}, expected {expected.get(name)}")
