"""A session's content as one safetensors file, and back.

The file holds what the pictures cost: keys and values, hidden rows, visual tokens, features. Its
metadata name the weights, and hold the conversation so far. The pictures are not in it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.files import write_whole
from nanoglimpse.inference.prefix import HEADROOM, Prefix, SharedLayers
from nanoglimpse.inputs.prompt import PackedBatch, Prompt
from nanoglimpse.kvcache.cache import KVCache
from nanoglimpse.methods import METHODS
from nanoglimpse.methods.base import PruningMethod
from nanoglimpse.methods.context import SelectionRule
from nanoglimpse.methods.options import ResolvedPruning
from nanoglimpse.model.model import Model
from nanoglimpse.model.rope import visual_mask
from nanoglimpse.model.vision import BlockStats, VisionOutput
from nanoglimpse.weights.fingerprint import fingerprint

FORMAT = "nanoglimpse session 1"


@dataclass(frozen=True)
class SessionData:
    """Everything that a session holds, apart from the model.

    Attributes:
        pruning: the same for all questions.
        prompt: what is shared, up to the end of the last picture, without its patches.
        vision: output of the vision encoder for the pictures.
        prefix: the shared rows after the first layers.
        seed: for methods that draw.
        system, min_pixels, max_pixels: options of what is still to come.
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
    """Writes a session, whole or not at all.

    Raises:
        UsageError: its method is not a built-in one, which a file could name.
        NanoglimpseError: the file cannot be written.
    """
    pruning = data.pruning
    if METHODS.get(pruning.method.name) is not pruning.method:
        raise UsageError(
            f"a session with method {pruning.method.name} cannot be saved: a file can name the "
            "built-in methods only"
        )
    settings = {
        "method": pruning.method.name,
        "rule": asdict(pruning.rule),
        "kv_drop": pruning.kv_drop,
        "prune_videos": pruning.prune_videos,
        "seed": data.seed,
        "system": data.system,
        "min_pixels": data.min_pixels,
        "max_pixels": data.max_pixels,
        "turns": data.turns,
        "grids": data.prompt.grids,
    }
    metadata = {
        "format": FORMAT,
        "model": model.name,
        "dtype": str(model.dtype)[6:],
        "weights": fingerprint(model),
        "told": json.dumps(settings),
    }
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(data).items()}
    write_whole(path, save(tensors, metadata))


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
    """A session as it was saved, for the same model.

    Raises:
        UsageError: there is no such file, or its method is unknown here.
        NanoglimpseError: it is not a session, broken, or of another model.
    """
    metadata, tensors = _read(path)
    _check_model(model, path, metadata)
    try:
        settings = json.loads(metadata["told"])
        rule = settings["rule"] | {"anchors": tuple(settings["rule"]["anchors"])}
        pruning = ResolvedPruning.of(
            model,
            _method(settings["method"]),
            SelectionRule(**rule),
            settings["kv_drop"],
            bool(settings["prune_videos"]),
        )
        grids = tuple((int(t), int(h), int(w)) for t, h, w in settings["grids"])
        options = {key: settings[key] for key in ("seed", "system", "min_pixels", "max_pixels")}
        turns = tuple((str(asked), str(answer)) for asked, answer in settings["turns"])
        return SessionData(
            pruning, *_restore(model, pruning, grids, tensors), **options, turns=turns
        )
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, UsageError):
            raise
        raise _broken(path, error) from None


def _method(name: str) -> PruningMethod:
    # Built-in methods only: a file must not name code to import.
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
    reason = str(error).partition("\n")[0]
    return NanoglimpseError(f"{path} is not a session, or a broken one ({reason}); make it anew")


def _check_model(model: Model, path: Path, metadata: dict[str, str]) -> None:
    own = {"dtype": str(model.dtype)[6:], "weights": fingerprint(model)}
    if metadata.get("dtype") != own["dtype"]:
        raise NanoglimpseError(
            f"{path} was made in {metadata.get('dtype')}, {model.name} is loaded in "
            f"{own['dtype']}; load it in the session's (--dtype)"
        )
    if metadata.get("weights") != own["weights"]:
        raise NanoglimpseError(
            f"{path} was made with other weights ({metadata.get('model')}) than those of "
            f"{model.name}; load that model with its glimpse weights, or make the session anew"
        )


def _restore(
    model: Model, pruning: ResolvedPruning, grids: tuple, tensors: dict[str, Tensor]
) -> tuple[Prompt, VisionOutput, Prefix]:
    config = model.config
    ids, positions = tensors["token_ids"], tensors["positions"]
    _check_ids(ids, config.text_config.vocab_size)
    nothing = torch.empty(0, config.vision_config.patch_dim)
    prompt = Prompt(ids, positions, visual_mask(ids, config), nothing, grids)
    shared = SharedLayers.of(pruning, model.depth)
    _check_shapes(tensors, _shapes(model, pruning, shared, prompt, tensors))
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    stats = BlockStats(pruning.needs.vision_blocks)
    for block in stats.blocks:
        stats.received[block] = tensors[f"received.{block}"]
        stats.keys[block] = tensors[f"keys.{block}"]
    vision = VisionOutput(tensors["visual"], tensors["taps"], stats)
    kept, batch = tensors["kept"], PackedBatch.pack([prompt], config, model.device)
    if 0 in pruning.layers:
        batch, _ = batch.keep(kept)
    rows, k, v = len(batch.token_ids), tensors["k"], tensors["v"]
    size = (shared.layers, [rows + HEADROOM])
    cache = KVCache(model.text, *size, batch.next_position, k, model.ops)
    cache.reserve([rows])
    cache.k[:, :rows], cache.v[:, :rows] = k, v
    inputs = {layer: tensors[f"inputs.{layer}"] for layer in shared.captured}
    stage, importance, hidden = (
        int(0 in pruning.layers),
        tensors.get("importance"),
        tensors["hidden"],
    )
    return prompt, vision, Prefix(shared, batch, kept, stage, importance, cache, hidden, inputs)


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids):
        raise ValueError("token_ids are not a row of numbers")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ValueError(f"token_ids are not all in 0 to {vocab - 1}")


def _shapes(
    model: Model,
    pruning: ResolvedPruning,
    shared: SharedLayers,
    prompt: Prompt,
    tensors: dict[str, Tensor],
) -> dict[str, list[int]]:
    """The shapes that a session's tensors must have."""
    text, vision, needs = model.text, model.config.vision_config, pruning.needs
    total, visual = len(prompt), int(prompt.visual.sum())
    rows = total - visual + int(tensors["kept"].sum())
    cached = [len(shared.layers), rows, text.num_key_value_heads, text.head_dim]
    taps = len(needs.taps)
    shapes = {
        "token_ids": [total],
        "positions": [3, total],
        "kept": [visual],
        "k": cached,
        "v": cached,
        "hidden": [rows if shared.stop else 0, text.hidden_size],
        "visual": [visual, text.hidden_size],
        "taps": [taps, visual, vision.hidden_size if taps else 0],
    }
    shapes |= {f"inputs.{layer}": [rows, text.hidden_size] for layer in shared.captured}
    shapes |= {f"received.{block}": [visual] for block in needs.vision_blocks}
    shapes |= {f"keys.{block}": [visual, vision.head_dim] for block in needs.vision_blocks}
    return shapes | ({"importance": [visual]} if "importance" in tensors else {})


def _check_shapes(tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> None:
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in {**found, **shapes} if found.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(f"{name} has shape {found.get(name)}, expected {shapes.get(name)}")
