"""A session as one safetensors file, and back.

The file holds what the pictures cost: keys and values, hidden rows, visual tokens, features. Its
metadata say of which weights they are, and the conversation so far. Pictures are not in it.
"""

import hashlib
import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .batch import Batch
from .cache import Cache
from .engine import Engine, Plan, Sight, find_method
from .errors import NanoglimpseError, UsageError
from .files import write_whole
from .glimpse import Selection
from .methods import Choice
from .prefix import ROOM, Prefix, Stretch
from .processor import Prompt
from .rope import visual_mask
from .session import Session, stretch_of
from .vision import Watch

FORMAT = "nanoglimpse session 1"
SAMPLES = 64


def save_session(session: Session, path: str | Path) -> None:
    """Writes a session, whole or not at all.

    Raises:
        NanoglimpseError: the file cannot be written.
    """
    plan, engine = session.plan, session.engine
    told = {
        "method": plan.method.name,
        "rule": asdict(plan.rule),
        "kv_drop": plan.kv_drop,
        "prune_videos": plan.prune_videos,
        "seed": session.seed,
        "system": session.system,
        "min_pixels": session.min_pixels,
        "max_pixels": session.max_pixels,
        "turns": session.turns,
        "grids": session.prompt.grids,
    }
    metadata = {
        "format": FORMAT,
        "model": engine.name,
        "dtype": str(engine.dtype)[6:],
        "weights": fingerprint(engine),
        "told": json.dumps(told),
    }
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(session).items()}
    write_whole(Path(path), save(tensors, metadata))


def _tensors(session: Session) -> dict[str, Tensor]:
    prompt, prefix, sight = session.prompt, session.prefix, session.sight
    tensors = {
        "token_ids": prompt.token_ids,
        "positions": prompt.positions,
        "kept": prefix.kept,
        "k": prefix.cache.k[:, : prefix.rows],
        "v": prefix.cache.v[:, : prefix.rows],
        "hidden": prefix.hidden,
        "visual": sight.visual,
        "taps": sight.taps,
    }
    tensors |= {f"inputs.{layer}": x for layer, x in prefix.inputs.items()}
    tensors |= {f"received.{block}": x for block, x in sight.watch.received.items()}
    tensors |= {f"keys.{block}": x for block, x in sight.watch.keys.items()}
    if prefix.choice and prefix.choice.importance is not None:
        tensors["importance"] = prefix.choice.importance
    return tensors


@torch.inference_mode()
def load_session(engine: Engine, path: str | Path) -> Session:
    """A session as it was saved, on this engine.

    Raises:
        UsageError: there is no such file, or its method is unknown here.
        NanoglimpseError: it is no session, broken, or of another model.
    """
    metadata, tensors = _read(Path(path))
    _check_model(engine, path, metadata)
    try:
        told = json.loads(metadata["told"])
        rule = told["rule"] | {"anchors": tuple(told["rule"]["anchors"])}
        rest = {key: told[key] for key in ("seed", "system", "min_pixels", "max_pixels")}
        turns = [(str(asked), str(answer)) for asked, answer in told["turns"]]
        grids = tuple((int(t), int(h), int(w)) for t, h, w in told["grids"])
        method = find_method(told["method"], 1.0)
        plan = Plan(method, Selection(**rule), told["kv_drop"], bool(told["prune_videos"]))
        parts = _restore(engine, plan, grids, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, UsageError):
            raise
        raise _broken(path, error) from None
    return Session(engine, plan, *parts, **rest, turns=turns)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise UsageError(f"there is no session {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise NanoglimpseError(f"{path} is no session of this version of nanoglimpse")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from None


def _broken(path: str | Path, error: Exception) -> NanoglimpseError:
    reason = str(error).partition("\n")[0]
    return NanoglimpseError(f"{path} is no session, or a broken one ({reason}); make it anew")


def _check_model(engine: Engine, path: str | Path, metadata: dict[str, str]) -> None:
    own = {"dtype": str(engine.dtype)[6:], "weights": fingerprint(engine)}
    if metadata.get("dtype") != own["dtype"]:
        raise NanoglimpseError(
            f"{path} was made in {metadata.get('dtype')}, {engine.name} is loaded in "
            f"{own['dtype']}; load it in the session's (--dtype)"
        )
    if metadata.get("weights") != own["weights"]:
        raise NanoglimpseError(
            f"{path} was made with other weights ({metadata.get('model')}) than those of "
            f"{engine.name}; load that model with its glimpse weights, or make the session anew"
        )


def _restore(
    engine: Engine, plan: Plan, grids: tuple, tensors: dict[str, Tensor]
) -> tuple[Prompt, Sight, Prefix]:
    config = engine.config
    ids, positions = tensors["token_ids"], tensors["positions"]
    _check_ids(ids, config.text_config.vocab_size)
    nothing = torch.empty(0, config.vision_config.patch_dim)
    prompt = Prompt(ids, positions, visual_mask(ids, config), nothing, grids)
    stretch, method = stretch_of(plan.method, engine), plan.method
    _check_shapes(tensors, _shapes(engine, plan, stretch, prompt, tensors))
    tensors = {name: tensor.to(engine.device) for name, tensor in tensors.items()}
    watch = Watch(method.watches(engine))
    for block in watch.blocks:
        watch.received[block], watch.keys[block] = (
            tensors[f"received.{block}"],
            tensors[f"keys.{block}"],
        )
    sight = Sight(tensors["visual"], tensors["taps"], watch)
    kept, batch, choice = tensors["kept"], Batch.of([prompt], config, engine.device), None
    if 0 in method.stops(engine):
        rows, counts = batch.survivors(kept)
        batch, choice = batch.keep(rows, kept, counts), Choice(kept, tensors.get("importance"))
    cache = _cache(engine, batch, tensors["k"], tensors["v"])
    inputs = {layer: tensors[f"inputs.{layer}"] for layer in stretch.reads}
    return prompt, sight, Prefix(stretch, batch, kept, choice, cache, tensors["hidden"], inputs)


def _cache(engine: Engine, batch: Batch, k: Tensor, v: Tensor) -> Cache:
    rows, text = k.shape[1], engine.config.text_config
    cache = Cache(text, len(k), [rows + ROOM], batch.next_position, k, engine.ops)
    used = cache.extend([rows])
    cache.k[:, used], cache.v[:, used] = k, v
    return cache


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.dtype != torch.int64 or ids.ndim != 1 or not len(ids):
        raise ValueError("token_ids are no row of numbers")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ValueError(f"token_ids are not all in 0 to {vocab - 1}")


def _shapes(
    engine: Engine, plan: Plan, stretch: Stretch, prompt: Prompt, tensors: dict[str, Tensor]
) -> dict[str, list[int]]:
    """What the shapes of a session's tensors have to be."""
    text, vision, method = engine.config.text_config, engine.config.vision_config, plan.method
    total, visual = len(prompt), int(prompt.visual.sum())
    rows = total - visual + int(tensors["kept"].sum())
    cached = [stretch.cached, rows, text.num_key_value_heads, text.head_dim]
    taps = len(engine.taps(method))
    shapes = {
        "token_ids": [total],
        "positions": [3, total],
        "kept": [visual],
        "k": cached,
        "v": cached,
        "hidden": [rows if stretch.stop else 0, text.hidden_size],
        "visual": [visual, text.hidden_size],
        "taps": [taps, visual, vision.hidden_size if taps else 0],
    }
    shapes |= {f"inputs.{layer}": [rows, text.hidden_size] for layer in stretch.reads}
    shapes |= {f"received.{block}": [visual] for block in method.watches(engine)}
    shapes |= {f"keys.{block}": [visual, vision.head_dim] for block in method.watches(engine)}
    return shapes | ({"importance": [visual]} if "importance" in tensors else {})


def _check_shapes(tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> None:
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in {**found, **shapes} if found.get(name) != shapes.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(f"{name} has shape {found.get(name)}, expected {shapes.get(name)}")


def fingerprint(engine: Engine) -> str:
    """A digest of configuration and weights: of every parameter some values, evenly spread."""
    digest = hashlib.sha256(repr(engine.config).encode())
    parts: dict[str, Any] = {"vision": engine.vision, "decoder": engine.decoder}
    if engine.glimpse:
        digest.update(repr(engine.glimpse.config).encode())
        parts["glimpse"] = engine.glimpse
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            if engine.config.tie_word_embeddings and name.startswith("lm_head"):
                continue  # the table once more, as this device multiplies it
            # What a CPU has packed for its products has another layout, but the same values.
            weight = parameter.to_dense() if parameter.is_mkldnn else parameter.detach()
            values = weight.flatten()[:: max(weight.numel() // SAMPLES, 1)].float().tolist()
            digest.update(f"{part}.{name}{tuple(weight.shape)}".encode())
            digest.update(struct.pack(f"{len(values)}f", *values))
    return digest.hexdigest()
