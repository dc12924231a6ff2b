"""The variants of a comparison: a method, its cap, and the form of the prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from nanoglimpse.engine import Engine
from nanoglimpse.errors import UsageError
from nanoglimpse.methods import METHODS
from nanoglimpse.methods.options import Pruning, find_method


@dataclass(frozen=True)
class Variant:
    """A way to answer questions.

    Attributes:
        method: a pruning method.
        ratio: the largest share of the visual tokens to keep, if there is a cap.
        brief: whether prompts ask for a single word.
        kv_drop: one of KV_DROPS.
    """

    method: str
    ratio: float | None = None
    brief: bool = False
    kv_drop: str = "all"

    @property
    def name(self) -> str:
        """The name in results and tables."""
        return f"{self.label}{' brief' if self.brief else ''}"

    @property
    def label(self) -> str:
        """The name without the form of the prompts."""
        cap = "" if self.ratio is None else f" {self.ratio:g}"
        return f"{self.method}{cap}{'' if self.kv_drop == 'all' else f' {self.kv_drop}'}"

    @property
    def pruning(self) -> Pruning:
        """What it does with visual tokens."""
        return Pruning(self.method, max_ratio=self.ratio, kv_drop=self.kv_drop)


def combine(
    methods: Sequence[str], ratios: Sequence[float | None], forms: Sequence[bool], kv_drop: str
) -> list[Variant]:
    """All combinations of methods, ratios and forms that make sense.

    Args:
        methods: names of methods, or file.py:Class; "all" stands for every method that prunes a
            single picture.
        ratios: caps; None stands for no cap.
        forms: False for free-form prompts, True for brief ones.
        kv_drop: one of KV_DROPS.

    Raises:
        UsageError: a method is unknown, or no combination makes sense.
    """
    variants: list[Variant] = []
    every = [name for name, method in METHODS.items() if not method.for_videos]
    names = [name for given in methods for name in (every if given == "all" else [given])]
    for brief, name, ratio in product(forms, names, ratios):
        method = find_method(name)
        if method.budget == "fixed":
            ratio = None
        elif ratio is None and method.budget == "cap":
            continue
        if (variant := Variant(name, ratio, brief, kv_drop)) not in variants:
            variants.append(variant)
    if not variants:
        raise UsageError("these methods need a cap; give --ratios, for example 0.111")
    return variants


def check_variants(engine: Engine, variants: Sequence[Variant]) -> None:
    """Runs a short prompt in every variant, so that an impossible one fails before hours of work.

    Raises:
        UsageError: as in `Engine.prefill_many`.
    """
    prompt, none = engine.prompt([], "?"), torch.zeros(0, dtype=torch.bool)
    for variant in variants:
        engine.prefill(prompt, variant.pruning, evidence=[none])
