"""Pruning methods on one interface: a method looks and says what stays; the engine gathers."""

from .base import AttentionMethod, Choice, Look, Method
from .cdpruner import CDPruner
from .dense import Dense
from .divprune import DivPrune
from .evs import EVS
from .glimpse import GlimpsePrune
from .nothing import Nothing
from .oracle import Oracle
from .pdrop import PyramidDrop
from .polymorphic import Polymorphic
from .prumerge import PruMerge
from .random import Random
from .sparsevlm import SparseVLM
from .sparsevlm_plus import SparseVLMPlus
from .tome import ToMe
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vscan import VScan
from .vtw import VTW

__all__ = ["METHODS", "AttentionMethod", "Choice", "Look", "Method"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
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
            layers=2,
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
            "prumerge+",
            "LLaVA-PruMerge+: the same, and evenly spaced tokens beside them",
            spaced=True,
        ),
    )
}
