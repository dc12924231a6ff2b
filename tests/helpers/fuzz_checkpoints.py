"""Mutated files of checkpoints: JSON of every kind, safetensors, .pt archives, sessions.

Every target writes one input into an empty folder and returns the call that is to be tried. It must
end in a value or in an error of the family, soon, and within the memory of a small model.
"""

import copy
import json
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from nanoglimpse import Prompt, load
from nanoglimpse.config import read_config
from nanoglimpse.inputs.processor import Processor
from nanoglimpse.weights.hub import EMBEDDED
from tests.helpers.tiny import chat_ids, config_dict, patches_of, write_checkpoint, write_glimpse

Call = Callable[[], object]
GRID = (1, 4, 8)
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.5, 1e-30, 1e300, 1e-6)
OTHERS = (None, True, False, "", "1", "silu", "\0", "ü" * 3000, [], {}, [[]], [0] * 1000, {"a": 1})
RAW = ("NaN", "Infinity", "1e999", '"\\ud800"', "[" * 5000 + "]" * 5000, "9" * 5000, "", "1,", "{")
MODEL, GLIMPSE_CONFIG = "config.json", "glimpse/config.json"
PIXELS = {
    "min_pixels": 3136,
    "max_pixels": 100352,
    "size": {"shortest_edge": 3136, "longest_edge": 100352},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
GENERATION = {
    "eos_token_id": [124, 5],
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "num_beams": 1,
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 6,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {"layers.2.self_attn.v_proj": 3},
    "alpha_pattern": {r"layers.\d+.self_attn.v_proj": 5},
    "modules_to_save": ["lm_head"],
    "init_lora_weights": True,
    "bias": "none",
    "target_modules": ["v_proj"],
}


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one to three changes anywhere in it."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _changed(rng, value)
    return value


def _changed(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.08:
            del value[key]
        elif kind < 0.14:
            value[rng.choice(("new_key", "use_dora", "type", "\n", "size"))] = _hostile(rng)
        else:
            value[key] = _changed(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.2:
            del value[place]
        elif kind < 0.4:
            value.insert(place, copy.deepcopy(value[place]))
        else:
            value[place] = _changed(rng, value[place])
        return value
    if type(value) is int and abs(value) < 2**70 and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, 2 * value, value // 2, -value, float(value)))
    return _hostile(rng)


def _hostile(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice((rng.choice(NUMBERS), rng.choice(OTHERS))))


def mutated_text(rng: random.Random, value: Any) -> bytes:
    """JSON of a changed value, or text that is nearly JSON."""
    kind = rng.random()
    if kind < 0.75:
        return json.dumps(mutated(rng, value)).encode()
    text = json.dumps(value)
    if kind < 0.85:
        marks = [i for i, c in enumerate(text) if c == ":"] or [0]
        place = rng.choice(marks) + 1
        return (text[:place] + rng.choice(RAW) + text[place:].partition(",")[1]).encode() + b"1}"
    if kind < 0.9:
        return b"\xef\xbb\xbf" * rng.randint(1, 2) + text.encode()
    if kind < 0.95:
        return text.replace("{", '{"peft_type": 1, "peft_type": 2, ', 1).encode()
    return mutated_bytes(rng, text.encode())


def mutated_bytes(rng: random.Random, data: bytes, first: int | None = None) -> bytes:
    """Changed, cut, doubled or missing bytes, mostly among the first ones."""
    changed, kind = bytearray(data), rng.random()
    end = min(first or len(data), len(data))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(end)
        if kind < 0.6:
            changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind < 0.75:
            part = bytes(changed[place : place + rng.randint(1, 16)])
            changed[place:place] = part * rng.randint(1, 3)
        else:
            del changed[place : place + rng.randint(1, 16)]
        end = min(end, len(changed))
        if not end:
            break
    return bytes(changed[: rng.randrange(len(changed) + 1)] if kind > 0.93 else changed)


@cache
def base() -> dict[str, bytes]:
    """The files of a whole checkpoint, by their names in its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, config_dict(tie_word_embeddings=False))
        write_glimpse(folder / "glimpse", folder)
        found = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
    generator = torch.Generator().manual_seed(0)
    stem = "base_model.model.model.layers.2.self_attn.v_proj"
    found["adapter_model.safetensors"] = save(
        {
            f"{stem}.lora_A.weight": torch.randn(3, 48, generator=generator),
            f"{stem}.lora_B.weight": torch.randn(16, 3, generator=generator),
            "base_model.model.lm_head.weight": torch.randn(130, 48, generator=generator),
        }
    )
    return found


def written(folder: Path, *left_out: str, **changes: bytes) -> Path:
    """Writes a checkpoint; `changes` are by name, with `/` and `.` as they are."""
    for name, data in {**base(), **changes}.items():
        if name not in left_out and not name.startswith("adapter"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def used(folder: Path, **options: Any) -> object:
    """Loads a checkpoint and answers, so that what loads must run."""
    engine = load(folder, dtype="float32", device="cpu", backend="torch", **options)
    prompt = Prompt.from_tokens(
        chat_ids(3, GRID, 4), patches_of([GRID]), [GRID], config=engine.config
    )
    prefill = engine.prefill(prompt, max_new_tokens=3)
    return list(engine.decode(prefill, 3, sampling=engine.model.sampling))


def json_file(name: str, content: Any = None) -> Callable[[random.Random, Path], Call]:
    """A target that changes one JSON file of a checkpoint."""

    def target(rng: random.Random, folder: Path) -> Call:
        value = json.loads(base()[name]) if content is None else content
        written(folder, **{name: mutated_text(rng, value)})
        return partial(used, folder)

    return target


def adapter_config(rng: random.Random, folder: Path) -> Call:
    """adapter_config.json."""
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes(mutated_text(rng, ADAPTER))
    (adapter / "adapter_model.safetensors").write_bytes(base()["adapter_model.safetensors"])
    return partial(used, written(folder), adapter=adapter)


def index(rng: random.Random, folder: Path) -> Call:
    """The index of a checkpoint in two files."""
    written(folder, "model.safetensors")
    tensors = load_file_bytes(base()["model.safetensors"])
    names = sorted(tensors)
    weight_map = {}
    for number in (0, 1):
        own = names[number::2]
        (folder / f"{number}.safetensors").write_bytes(save({n: tensors[n] for n in own}))
        weight_map |= dict.fromkeys(own, f"{number}.safetensors")
    content = {"metadata": {"total_size": 1}, "weight_map": dict(list(weight_map.items())[::7])}
    content["weight_map"] |= {"x": rng.choice(("0.safetensors", "../0.safetensors", "/dev/zero"))}
    (folder / "model.safetensors.index.json").write_bytes(mutated_text(rng, content))
    return partial(used, folder)


def load_file_bytes(data: bytes) -> dict[str, torch.Tensor]:
    """Tensors of safetensors in memory."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(data)
        file.flush()
        return {name: tensor.clone() for name, tensor in load_file(file.name).items()}


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A changed header, with its length, or changed bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data, 400)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.random()
    if kind < 0.25:
        header[name]["dtype"] = rng.choice(("I64", "F16", "BF16", "F8_E4M3", "BOOL", "U8", "x", 3))
    elif kind < 0.5:
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice(
            (shape[::-1], [*shape, 1], [], [0], [2**40, 2**40], [-1], ["3"], [1, *shape], [2**31])
        )
    elif kind < 0.65:
        header[rng.choice(("new", "lm_head.weight", name + ".weight", "\n", name.upper()))] = (
            header.pop(name)
        )
    elif kind < 0.75:
        del header[name]
    else:
        header = mutated(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def safetensors(name: str) -> Callable[[random.Random, Path], Call]:
    """A target that changes one safetensors file of a checkpoint or adapter."""

    def target(rng: random.Random, folder: Path) -> Call:
        data = mutated_safetensors(rng, base()[name])
        if not name.startswith("adapter"):
            return partial(used, written(folder, **{name: data}))
        adapter = folder / "adapter"
        adapter.mkdir()
        content = ADAPTER | rng.choice(({}, {"use_dora": True}, {"rank_pattern": {}}))
        (adapter / "adapter_config.json").write_text(json.dumps(content))
        (adapter / name).write_bytes(data)
        return partial(used, written(folder), adapter=adapter)

    return target


def archive(rng: random.Random, folder: Path) -> Call:
    """new_modules_gp.pt."""
    written(folder, "glimpse/glimpse.safetensors")
    file, kind = folder / "glimpse/new_modules_gp.pt", rng.random()
    data = file.read_bytes()
    with zipfile.ZipFile(file) as opened:
        records = {info.filename: opened.read(info) for info in opened.infolist()}
    if kind < 0.3:
        file.write_bytes(mutated_bytes(rng, data, rng.choice((400, len(data)))))
    elif kind < 0.75:
        how = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
        (pickled,) = [name for name in records if name.endswith("data.pkl")]
        name = pickled if rng.random() < 0.8 else rng.choice(list(records))
        records[name] = mutated_bytes(rng, records[name]) if records[name] else b"x"
        with zipfile.ZipFile(file, "w", how) as opened:
            for record, content in records.items():
                opened.writestr(record, content)
    else:
        content = torch.load(file, weights_only=True)
        section = rng.choice(list(content))
        one = torch.zeros(1)
        content[section] = rng.choice(
            (
                one.expand(2**30),
                one.expand(2**20, 1, 2**20),
                {"weight": one.as_strided((48, 48), (0, 0))},
                {1: one},
                {"weight": one.to_sparse()},
                {"weight": torch.zeros(48, dtype=torch.complex64)},
                {"weight": {"weight": one}},
                [one],
                None,
                torch.nn.Parameter(one),
                torch.empty(2**20, device="meta"),
            )
        )
        torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.9)
    return partial(used, folder)


@cache
def session_file() -> bytes:
    """A saved session of the checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        engine = _engine(written(Path(name)))
        prompt = Prompt.from_tokens(
            chat_ids(3, GRID), patches_of([GRID]), [GRID], config=engine.config
        )
        engine.session(prompt, "glimpse", max_ratio=0.5).save(Path(name) / "s.safetensors")
        return (Path(name) / "s.safetensors").read_bytes()


def _engine(folder: Path):
    return load(folder, dtype="float32", device="cpu", backend="torch")


def session(rng: random.Random, folder: Path) -> Call:
    """A session: its settings, its tensors, its bytes."""
    data, kind = session_file(), rng.random()
    size = int.from_bytes(data[:8], "little")
    if kind < 0.5:
        header = json.loads(data[8 : 8 + size])
        told = mutated_text(rng, json.loads(header["__metadata__"]["told"]))
        header["__metadata__"]["told"] = told.decode("utf-8", "replace")
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + size :]
    elif kind < 0.8:
        data = mutated_safetensors(rng, data)
    else:
        data = data[: 8 + size] + mutated_bytes(rng, data[8 + size :])
    path = folder / "s.safetensors"
    path.write_bytes(data)
    engine = _engine(written(folder))

    def call() -> object:
        found = engine.load_session(path)
        tail = chat_ids(5)
        return list(engine.decode(found.prefill(tail, max_new_tokens=3), 3)), found.turns

    return call


def tokenizer(rng: random.Random, folder: Path) -> Call:
    """tokenizer.json."""
    shutil.copy(EMBEDDED["nano"] / "config.json", folder)
    value = json.loads((EMBEDDED["nano"] / "tokenizer.json").read_text("utf-8"))
    if rng.random() < 0.5:
        value["added_tokens"] = mutated(rng, value["added_tokens"])
        (folder / "tokenizer.json").write_text(json.dumps(value))
    else:
        (folder / "tokenizer.json").write_bytes(mutated_text(rng, value))

    def call() -> object:
        processor = Processor(folder, read_config(folder / "config.json"))
        prompt = processor.prompt([], "What is <|im_end|> this?")
        return processor.decode(prompt.token_ids.tolist()), processor.end_ids

    return call


TARGETS: dict[str, Callable[[random.Random, Path], Call]] = {
    "config.json": json_file(MODEL),
    "glimpse config.json": json_file(GLIMPSE_CONFIG),
    "preprocessor_config.json": json_file("preprocessor_config.json", PIXELS),
    "processor_config.json": json_file("processor_config.json", {"image_processor": PIXELS}),
    "generation_config.json": json_file("generation_config.json", GENERATION),
    "adapter_config.json": adapter_config,
    "model.safetensors.index.json": index,
    "tokenizer.json": tokenizer,
    "model.safetensors": safetensors("model.safetensors"),
    "glimpse.safetensors": safetensors("glimpse/glimpse.safetensors"),
    "adapter_model.safetensors": safetensors("adapter_model.safetensors"),
    "new_modules_gp.pt": archive,
    "session": session,
}
