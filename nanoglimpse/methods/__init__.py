"""Pruning methods on one interface: a method looks and says what stays; the engine gathers."""

from .base import AttentionMethod, Choice, Look, Method
from .dense import Dense
from .glimpse import GlimpsePrune
from .oracle import Oracle
from .random import Random

__all__ = ["METHODS", "AttentionMethod", "Choice", "Look", "Method"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Dense(),
        GlimpsePrune(),
        Random(),
        Oracle(),
        AttentionMethod(
            "attention",
            "what the last prompt token attends to after K = ⌈2L/3⌉ layers; training-free row of "
            "the paper's Tab. 5",
        ),
        AttentionMethod(
            "fastv",
            "FastV, arXiv 2403.06764: what the last prompt token attends to in layer 2 of the "
            "decoder; dropped from the cache of all layers",
            layers=2,
        ),
    )
}
