"""What is compared: a method, its cap, and the form of the prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from ..engine import Engine, find_method
from ..errors import UsageError
from ..methods import METHODS


@dataclass(frozen=True)
class Arm:
    """One of the compared."""

    method: str
    ratio: float | None = None
    brief: bool = False
    kv_drop: str = "all"

    @property
    def name(self) -> str:
        """As it stands in results and tables."""
        return f"{self.label}{' brief' if self.brief else ''}"

    @property
    def label(self) -> str:
        """Without the form of the prompts."""
        cap = "" if self.ratio is None else f" {self.ratio:g}"
        return f"{self.method}{cap}{'' if self.kv_drop == 'all' else f' {self.kv_drop}'}"

    @property
    def options(self) -> dict:
        """Arguments of `Engine.prefill_many`."""
        return {"method": self.method, "max_ratio": self.ratio, "kv_drop": self.kv_drop}


def combine(
    methods: Sequence[str], ratios: Sequence[str], forms: Sequence[bool], kv_drop: str
) -> list[Arm]:
    """All combinations that make sense.

    Args:
        methods: names; "all" for every method that prunes a single picture.
        ratios: caps as typed; "none" for no cap.
        forms: False for free-form prompts, True for brief ones.
        kv_drop: of KV_DROPS.

    Raises:
        UsageError: a method or ratio makes no sense, or nothing is left.
    """
    caps, arms = [_ratio(text) for text in ratios], []
    every = [name for name, method in METHODS.items() if not method.for_videos]
    names = [name for given in methods for name in (every if given == "all" else [given])]
    for brief, name, ratio in product(forms, names, caps):
        method = find_method(name, 1.0)
        if method.fixed:
            ratio = None
        elif ratio is None and method.capped:
            continue
        if (arm := Arm(name, ratio, brief, kv_drop)) not in arms:
            arms.append(arm)
    if not arms:
        raise UsageError("these methods need a cap; give --ratios, for example 0.111")
    return arms


def _ratio(text: str) -> float | None:
    if text == "none":
        return None
    try:
        ratio = float(text)
    except ValueError:
        raise UsageError(f"ratio {text} is neither a number nor none") from None
    if not 0 < ratio <= 1:
        raise UsageError(f"ratio {text} is no share; give 0 to 1")
    return ratio


def check(engine: Engine, arms: Sequence[Arm]) -> None:
    """Lets every arm read a line of text, so that what it lacks shows before hours of work.

    Raises:
        UsageError: as `Engine.prefill_many`.
    """
    prompt, none = engine.prompt([], "?"), torch.zeros(0, dtype=torch.bool)
    for arm in arms:
        engine.prefill(prompt, evidence=[none], **arm.options)
