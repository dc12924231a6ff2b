"""Pruning methods on one interface: a method decides what stays, and the engine gathers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NoReturn

from nanoglimpse.methods.attention import AttentionMethod
from nanoglimpse.methods.base import Decision, Needs, PruningContext, PruningMethod
from nanoglimpse.methods.baselines import Dense, Nothing, Oracle, Random
from nanoglimpse.methods.cdpruner import CDPruner
from nanoglimpse.methods.divprune import DivPrune
from nanoglimpse.methods.evs import EVS
from nanoglimpse.methods.glimpse import GlimpsePrune
from nanoglimpse.methods.pdrop import PyramidDrop
from nanoglimpse.methods.polymorphic import Polymorphic
from nanoglimpse.methods.prumerge import PruMerge
from nanoglimpse.methods.sparsevlm import SparseVLM, SparseVLMPlus
from nanoglimpse.methods.tome import ToMe
from nanoglimpse.methods.visionzip import VisionZip
from nanoglimpse.methods.vispruner import VisPruner
from nanoglimpse.methods.vscan import VScan
from nanoglimpse.methods.vtw import VTW

__all__ = ["METHODS", "AttentionMethod", "Decision", "Needs", "PruningContext", "PruningMethod"]

_ALL: tuple[PruningMethod, ...] = (
    Dense(),
    GlimpsePrune(),
    Random(),
    Oracle(),
    Nothing(),
    AttentionMethod(
        "attention",
        "what the last prompt token attends to after K = ⌈2L/3⌉ layers; training-free row of "
        "the paper's Tab. 5",
    ),
    AttentionMethod(
        "fastv",
        "FastV, arXiv 2403.06764: what the last prompt token attends to in layer 2 of the "
        "decoder; dropped from the cache of all layers",
        after=2,
    ),
    PyramidDrop(),
    SparseVLM(),
    SparseVLMPlus(),
    VScan(),
    VTW(),
    VisionZip(),
    VisPruner(),
    DivPrune(),
    CDPruner(),
    ToMe(),
    Polymorphic(),
    EVS(),
    PruMerge(
        "prumerge",
        "LLaVA-PruMerge, arXiv 2403.15388: before the decoder, tokens whose attention stands "
        "out, with those like them",
        spaced=False,
    ),
    PruMerge(
        "prumerge+", "LLaVA-PruMerge+: the same, and evenly spaced tokens beside them", spaced=True
    ),
)

METHODS: Mapping[str, PruningMethod] = MappingProxyType({method.name: method for method in _ALL})
"""The built-in methods by name; read-only. A method of one's own is given as an object or file."""

_RENAMED = {"Choice": "Decision", "Look": "PruningContext", "Method": "PruningMethod"}


def __getattr__(name: str) -> NoReturn:
    """Says what the classes of version 0.1 are called now."""
    if name in _RENAMED:
        raise ImportError(f"nanoglimpse.methods.{name} has been renamed to {_RENAMED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
