"""adapter_config.json of PEFT: which adapters are arithmetic on weights.

Supported is what changes a matrix to W + s · B A, or to that with rows of other lengths (DoRA), and
tensors that replace others. All other kinds are refused by the key that asks for them, and so is a
key that PEFT 0.21 does not know.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanoglimpse.config.schema import (
    Schema,
    choice,
    many,
    mapping,
    only,
    read_json,
    real,
    shown,
    text,
    truth,
    whole,
    words,
)
from nanoglimpse.config.tensors import Stored
from nanoglimpse.errors import NanoglimpseError

_RANK, _ALPHA = whole(1, 2**16, 8), real(1e-9, 1e9, 8)
# Patterns are regular expressions from a file: so few quantifiers cannot take long.
_QUANTIFIERS, _GROUPS = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]")
_MOST_QUANTIFIERS, _MOST_PATTERNS = 2, 32
_STEM = "base_model.model."
# Older files name the adapter, too: lora_A.default.weight.
_MATRIX = re.compile(r"(.+)\.lora_(?:([AB])(?:\.\w+)?\.weight|(magnitude_vector)(?:\.\w+)*)")
_SAVED = re.compile(r"(.*\.)modules_to_save\.\w+\.(.*)")
# With an adapter of the head, the head itself is in the file, too.
_BASE = re.compile(r"(.+)\.base_layer(\.weight)")

ADAPTER = Schema(
    {
        "peft_type": only("LORA"),
        "r": _RANK,
        "lora_alpha": _ALPHA,
        "use_rslora": truth(False),
        "use_dora": truth(False),
        "rank_pattern": mapping(_RANK, 2**12, {}),
        "alpha_pattern": mapping(_ALPHA, 2**12, {}),
        "modules_to_save": many(text(), 0, 2**14, ()),
        # Others change the base weights before training, or the forward pass.
        "init_lora_weights": choice(True, False, "gaussian", "eva", "orthogonal", default=True),
        "bias": only("none"),
        "fan_in_fan_out": only(False),
        "lora_bias": only(False),
        "ensure_weight_tying": only(False),
        "use_qalora": only(False),
        **dict.fromkeys(
            words(
                """
            alora_invocation_tokens arrow_config kasa_config layer_replication megatron_config
            monteclora_config target_parameters trainable_token_indices use_bdlora velora_config
            """
            ),
            only(None),
        ),
    },
    words(
        """
        auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode
        layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core
        peft_version qalora_group_size revision runtime_config target_modules task_type
        """
    ),
    lambda name, value: f"unknown key {shown(name)}; adapters of this kind are not supported",
)


class Layer(NamedTuple):
    """The tensors of one adapted layer.

    Attributes:
        file: their file.
        name: the layer's name there.
        tensors: "A", "B", and with DoRA "magnitude_vector".
    """

    file: Path
    name: str
    tensors: dict[str, Stored]


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says about every matrix.

    Attributes:
        path: of the file, for errors.
        values: the keys of the table.
        patterns: those of `rank_pattern` and `alpha_pattern` with their values, in their order.
    """

    path: Path
    values: dict[str, Any]
    patterns: dict[str, list[tuple[re.Pattern[str], Any]]]

    def rank_and_scale(self, names: list[str]) -> tuple[int, float]:
        """The rank of a layer, and alpha / rank, or alpha / sqrt(rank) if rank-stabilised.

        Args:
            names: all the names that the layer has.
        """
        rank, alpha = (
            self._of("rank_pattern", "r", names),
            self._of("alpha_pattern", "lora_alpha", names),
        )
        return rank, alpha / (math.sqrt(rank) if self.values["use_rslora"] else rank)

    def sort(
        self, tensors: Iterable[Stored], canonical: Callable[[str], str]
    ) -> tuple[dict[str, Layer], dict[str, Stored]]:
        """The tensors of an adapter: those of every layer, and those that replace others.

        Args:
            tensors: of its file.
            canonical: gives the canonical name of a layer or tensor.

        Raises:
            NanoglimpseError: there are none, one is not of these kinds, is there under two names,
                or lacks its other half.
        """
        layers: dict[str, Layer] = {}
        replaced: dict[str, Stored] = {}
        for stored in tensors:
            where, raw = (
                f"{stored.file}: tensor {shown(stored.name)}",
                stored.name.removeprefix(_STEM),
            )
            match = _MATRIX.fullmatch(raw)
            base = _BASE.fullmatch(raw)
            raw = match[1] if match else base[1] + base[2] if base else _SAVED.sub(r"\1\2", raw)
            if not (match or base or self._replaces(raw)):
                raise NanoglimpseError(f"{where} is not a LoRA matrix")
            name = canonical(raw)
            same = replaced
            if match:
                same = layers.setdefault(name, Layer(stored.file, raw, {})).tensors
                name = match[2] or match[3]
            if same.setdefault(name, stored) is not stored:
                raise NanoglimpseError(f"{where} is there under two names")
        if not layers and not replaced:
            raise NanoglimpseError(
                f"{self.path.parent} holds no LoRA matrices; with ZeRO-3, gather them before saving"
            )
        needed = {"A", "B", "magnitude_vector"} if self.values["use_dora"] else {"A", "B"}
        for name, layer in layers.items():
            if layer.tensors.keys() != needed:
                kinds = " and lora_".join(sorted(layer.tensors))
                raise NanoglimpseError(
                    f"{layer.file}: {shown(name)} has lora_{kinds}, but needs "
                    f"lora_{' and lora_'.join(sorted(needed))}"
                )
        return layers, replaced

    def _replaces(self, name: str) -> bool:
        """Whether a tensor of this name is one of `modules_to_save`."""
        owner = name.rpartition(".")[0]
        return any(
            re.search(rf"(^|\.){re.escape(module)}(\.|$)", owner)
            for module in self.values["modules_to_save"]
        )

    def _of(self, patterns: str, default: str, names: list[str]) -> Any:
        """The value of the first pattern that matches a name's end, as in PEFT."""
        for pattern, value in self.patterns[patterns]:
            if any(pattern.match(name) for name in names):
                return value
        return self.values[default]


def read_adapter_config(path: Path) -> AdapterConfig:
    """The adapter configuration in `path`.

    Raises:
        NanoglimpseError: the file is broken, or describes an adapter that cannot be merged; the
            message names the key.
    """
    data = read_json(path)
    if "peft_type" not in data:
        raise NanoglimpseError(f"{path}: key 'peft_type' is missing")
    values = ADAPTER.read(data, str(path))
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        where, given = f"{path}: {key}", values[key]
        patterns[key] = [(_compiled(name, where), value) for name, value in given.items()]
        if sum(bool(_QUANTIFIERS.search(name)) for name in given) > _MOST_PATTERNS:
            raise NanoglimpseError(f"{where} has more than {_MOST_PATTERNS} quantified patterns")
    return AdapterConfig(path, values, patterns)


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    count = len(_QUANTIFIERS.findall(pattern))
    if len(pattern) > 1024 or count > _MOST_QUANTIFIERS or _GROUPS.search(pattern):
        raise NanoglimpseError(
            f"{where} has {shown(pattern)}; patterns have at most {_MOST_QUANTIFIERS} quantifiers, "
            "none of them on a group"
        )
    try:
        re.compile(pattern)  # by itself, so that its parentheses are its own
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise NanoglimpseError(f"{where} has {shown(pattern)}: {error}") from None
