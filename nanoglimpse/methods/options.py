"""How a prompt is pruned, as a user says it and as a model runs it."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from typing_extensions import TypedDict

from nanoglimpse.errors import NanoglimpseError, UsageError
from nanoglimpse.methods import METHODS
from nanoglimpse.methods.base import Needs, PruningMethod
from nanoglimpse.methods.context import SelectionRule
from nanoglimpse.model.model import Model

KV_DROPS = ("all", "later")


class PruningOptions(TypedDict, total=False):
    """The fields of `Pruning` as keywords."""

    method: str | PruningMethod | None
    threshold: float | None
    max_ratio: float | None
    max_frame_ratio: float | None
    min_tokens: int | None
    anchors: Sequence[str] | None
    kv_drop: str
    prune_videos: bool


@dataclass(frozen=True)
class Pruning:
    """Which visual tokens of a prompt are dropped, and where.

    Attributes:
        method: a name (`METHODS`), a `PruningMethod`, or "file.py:Class"; GlimpsePrune if None, or
            no pruning where the model has no glimpse weights.
        threshold: keep the visual tokens whose probability is above this, in [0, 1].
        max_ratio: keep at most this share of a prompt's visual tokens, in [0, 1]; 1 lifts the cap
            that glimpse weights may state.
        max_frame_ratio: keep at most this share of each pair of a video's frames, in [0, 1].
        min_tokens: keep at least this many.
        anchors: corners of every image that are kept in addition: "tl", "tr", "bl", "br".
        kv_drop: "all": dropped tokens leave the cache of every layer, as in GlimpsePrune; "later":
            only of the layers that follow, as in the public code of other methods.
        prune_videos: prune each video by the rule for itself; if not, all its tokens stay, as in
            the official code.

    The rule of the glimpse weights' config.json stands in for a threshold, cap, minimum or anchors
    that are None.

    Raises:
        UsageError: a value is out of its range, the method is unknown, needs a cap or has none, or
            has no use for a part of the rule.
    """

    method: str | PruningMethod | None = None
    threshold: float | None = None
    max_ratio: float | None = None
    max_frame_ratio: float | None = None
    min_tokens: int | None = None
    anchors: Sequence[str] | None = None
    kv_drop: str = "all"
    prune_videos: bool = True

    def __post_init__(self):
        if self.kv_drop not in KV_DROPS:
            raise UsageError(f"kv_drop must be one of {', '.join(KV_DROPS)}, got '{self.kv_drop}'")
        self.rule(SelectionRule())
        if self.method is not None:
            self._check(find_method(self.method))

    def rule(self, default: SelectionRule) -> SelectionRule:
        """The rule, with what is None from `default`."""
        names = ("threshold", "max_ratio", "max_frame_ratio", "min_tokens")
        given = {name: getattr(self, name) for name in names}
        given["anchors"] = None if self.anchors is None else tuple(self.anchors)
        return replace(default, **{k: v for k, v in given.items() if v is not None})

    def _check(self, method: PruningMethod) -> None:
        if method.budget == "cap" and self.max_ratio is None:
            raise UsageError(
                f"method {method.name} keeps a share of the visual tokens that it has to be told; "
                "give max_ratio (--max-ratio), for example 0.111"
            )
        if method.budget == "fixed" and self.max_ratio is not None:
            raise UsageError(f"no max_ratio (--max-ratio) caps method {method.name}; leave it out")
        frames = ["max_frame_ratio (--max-frame-ratio)"] * (self.max_frame_ratio is not None)
        given = [*frames, *["anchors"] * bool(self.anchors)]
        if given and not method.pooled:
            pooled = ", ".join(name for name, one in METHODS.items() if one.pooled)
            raise UsageError(
                f"method {method.name} does not choose once over whole pictures and clips, so that "
                f"{' and '.join(given)} would have no meaning; leave that out, or choose one of "
                f"{pooled}"
            )

    def resolve(self, model: Model) -> "ResolvedPruning":
        """What these options mean for a model.

        Raises:
            UsageError: the method cannot run on it, or the budget cannot be reached.
        """
        method = find_method(self.method or ("glimpse" if model.glimpse else "dense"))
        self._check(method)
        default = SelectionRule()
        if model.glimpse is not None:
            own = model.glimpse.config
            default = SelectionRule(
                threshold=own.reduce_threshold,
                max_ratio=own.max_remain_ratio,
                min_tokens=own.min_remain_num,
                # Corners are for methods that choose once over whole pictures.
                anchors=own.anchor_positions if method.pooled else (),
            )
        rule = self.rule(default)
        if method.layers(model):
            share = partial(method.stage_ratio, model, kv_drop=self.kv_drop)
            if self.max_ratio is not None:
                rule = replace(rule, max_ratio=share(self.max_ratio))
            if self.max_frame_ratio is not None:
                rule = replace(rule, max_frame_ratio=share(self.max_frame_ratio))
        return ResolvedPruning.of(model, method, rule, self.kv_drop, self.prune_videos)


@dataclass(frozen=True)
class ResolvedPruning:
    """`Pruning` for one model.

    Attributes:
        method: the method.
        rule: with the caps of its last stage.
        kv_drop, prune_videos: as `Pruning`.
        layers: numbers of decoder layers after which it prunes.
        needs: what it reads; the taps of the predictor in place of none, so that they can be read.
        probe: [L, C], as `PruningMethod.probe`.
    """

    method: PruningMethod
    rule: SelectionRule
    kv_drop: str
    prune_videos: bool
    layers: tuple[int, ...]
    needs: Needs
    probe: Tensor | None = field(compare=False)

    @classmethod
    def of(
        cls,
        model: Model,
        method: PruningMethod,
        rule: SelectionRule,
        kv_drop: str,
        prune_videos: bool,
    ) -> "ResolvedPruning":
        """With what the method says about a model."""
        layers, needs = tuple(method.layers(model)), method.needs(model)
        if not needs.taps and model.glimpse is not None:
            needs = replace(needs, taps=tuple(model.glimpse.config.selected_visual_layers))
        return cls(method, rule, kv_drop, prune_videos, layers, needs, method.probe(model))


PruningLike = Pruning | PruningMethod | str | None


def resolve(
    model: Model, pruning: PruningLike | ResolvedPruning, options: PruningOptions
) -> ResolvedPruning:
    """Options in any of the forms in which a caller may give them.

    Raises:
        UsageError: as `Pruning` and `Pruning.resolve`.
        TypeError: an option is unknown, or given twice.
    """
    if isinstance(pruning, ResolvedPruning):
        return pruning
    if isinstance(pruning, Pruning):
        return replace(pruning, **options).resolve(model)
    if pruning is not None and "method" in options:
        raise TypeError("the method is given twice, by itself and as method=")
    given = Pruning(**options)
    return (given if pruning is None else replace(given, method=pruning)).resolve(model)


def find_method(method: str | PruningMethod) -> PruningMethod:
    """A method by name, by "file.py:Class", or as it is.

    Raises:
        UsageError: there is no such method.
        NanoglimpseError: the file cannot be imported.
    """
    if isinstance(method, PruningMethod):
        return method
    if method in METHODS:
        return METHODS[method]
    file, separator, name = method.rpartition(":")
    if separator and file.endswith(".py"):
        return _imported(Path(file), name)
    raise UsageError(
        f"unknown method '{method}'; choose one of {', '.join(METHODS)}, or file.py:Class"
    )


def _imported(file: Path, name: str) -> PruningMethod:
    if not file.is_file():
        raise UsageError(f"method {file}:{name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"method {file}:{name}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise NanoglimpseError(
            f"{file} cannot be imported: {type(error).__name__}: {error}"
        ) from None
    found = vars(module).get(name)
    if not isinstance(found, type) or not issubclass(found, PruningMethod):
        raise UsageError(f"{file} defines no class {name} that is a PruningMethod")
    return found()
