"""From results to figures: every measure of an arm in a group, with its bootstrap interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError
from .interval import bounds, resampled
from .store import Results

AVERAGE = "average"
Share = tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """A measure of results: sum over sum, which is a mean where every weight is 1.

    Attributes:
        key: as it stands in CSV.
        title: as it stands in tables.
        unit: "%" for shares, "" for scores and counts, "FLOP", "B" or "ms".
        better: 1 if more is better, -1 if less, 0 if neither.
        of: from a result to (value, weight); None where it does not apply.
    """

    key: str
    title: str
    unit: str
    better: int
    of: Callable[[dict], Share | None] = field(repr=False)


def _key(*path: str) -> Callable[[dict], Share | None]:
    """The value under keys of a result; none where it is not there."""

    def of(row: dict) -> Share | None:
        value = row
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return None if value is None else (float(value), 1.0)

    return of


def _first_token(row: dict) -> Share:
    return sum(spent or 0.0 for stage, spent in row["ms"].items() if stage != "decode"), 1.0


SCORES = (
    Measure("contains", "contains", "", 1, _key("contains")),
    Measure("exact", "exact", "", 1, _key("exact")),
    Measure("anls", "ANLS", "", 1, _key("anls")),
    Measure("f1", "F1", "", 1, _key("f1")),
    Measure("judge", "judge", "", 1, _key("judge")),
)
KEPT = (
    Measure(
        "retention", "kept (mean)", "%", -1, lambda row: (row["kept"] / max(row["visual"], 1), 1.0)
    ),
    Measure("kept", "kept (total)", "%", -1, lambda row: (row["kept"], row["visual"])),
    Measure("recall", "box recall", "%", 1, _key("recall")),
    Measure("iou", "box IoU", "%", 1, _key("iou")),
    Measure("input", "input", "%", -1, _key("input")),
    Measure("prefill", "prefill", "%", -1, _key("prefill")),
    Measure("decode_kv", "decode KV", "%", -1, _key("decode_kv")),
)
COSTS = (
    Measure("flops_vision", "vision", "FLOP", -1, _key("flops", "vision")),
    Measure("flops_prefill", "prefill", "FLOP", -1, _key("flops", "prefill")),
    Measure("flops_decode", "decode", "FLOP", -1, _key("flops", "decode")),
    Measure("paper_prefill", "prefill (paper)", "FLOP", -1, _key("flops", "paper prefill")),
    Measure("paper_decode", "decode (paper)", "FLOP", -1, _key("flops", "paper decode")),
    Measure("kv_rows", "KV rows", "", -1, _key("kv_rows")),
    Measure("kv_bytes", "KV cache", "B", -1, _key("kv_bytes")),
    Measure("tokens", "tokens", "", 0, _key("tokens")),
    Measure("peak_bytes", "peak memory", "B", -1, _key("peak_bytes")),
)
TIMES = (
    Measure("ms_preprocess", "preprocess", "ms", -1, _key("ms", "preprocess")),
    Measure("ms_vision", "vision", "ms", -1, _key("ms", "vision")),
    Measure("ms_before", "layers before", "ms", -1, _key("ms", "before")),
    Measure("ms_score", "score", "ms", -1, _key("ms", "score")),
    Measure("ms_keep", "keep", "ms", -1, _key("ms", "keep")),
    Measure("ms_after", "layers after", "ms", -1, _key("ms", "after")),
    Measure("ms_first", "to first token", "ms", -1, _first_token),
    Measure("ms_decode", "a token", "ms", -1, _key("ms", "decode")),
)
MEASURES = {measure.key: measure for measure in (*SCORES, *KEPT, *COSTS, *TIMES)}


@dataclass(frozen=True)
class Figure:
    """A measure's value and the ends of its interval; `count` questions stand behind it."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Run:
    """An arm's results and figures.

    Attributes:
        label: method and cap, before it the file's name where there are several.
        method, ratio, brief, stop: as in the results; stop is where it looked first.
        rows: the results, a verdict among them where there is one.
        figures: by group, AVERAGE among them, and measure.
    """

    label: str
    method: str
    ratio: float | None
    brief: bool
    stop: int | None
    rows: list[dict] = field(repr=False)
    figures: dict[str, dict[str, Figure]] = field(repr=False)

    @property
    def name(self) -> str:
        """Label and form of the prompts."""
        return f"{self.label}{' brief' if self.brief else ''}"

    @property
    def groups(self) -> list[str]:
        """Those that it has results in, AVERAGE left out."""
        return [group for group in self.figures if group != AVERAGE]

    def get(self, key: str, group: str = AVERAGE) -> Figure | None:
        """The figure of a measure; None where there is none."""
        return self.figures.get(group, {}).get(key)


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[Results]]:
    """All arms in files of results, in order, and the files.

    Raises:
        UsageError, NanoglimpseError: as `Results.read`; also where no result is in any.
    """
    files = [Results.read(path) for path in paths]
    runs = [
        run
        for path, file in zip(paths, files, strict=True)
        for run in runs_of(file, f"{path.stem}: " if len(paths) > 1 else "")
    ]
    if not runs:
        raise UsageError(f"{', '.join(map(str, paths))}: there are no results yet")
    return runs, files


def runs_of(results: Results, prefix: str = "") -> list[Run]:
    """The arms of a file."""
    arms: dict[str, list[dict]] = {}
    for row in results.rows:
        verdict = results.verdicts.get((row["arm"], row["question"]))
        arms.setdefault(row["arm"], []).append(
            row | ({"judge": verdict["score"]} if verdict else {})
        )
    return [_run(rows, prefix) for rows in arms.values()]


def _run(rows: list[dict], prefix: str) -> Run:
    first = rows[0]
    label = first["arm"].removesuffix(" brief") if first["brief"] else first["arm"]
    return Run(
        label=prefix + label,
        method=first["method"],
        ratio=first["ratio"],
        brief=first["brief"],
        stop=first.get("stop"),
        rows=rows,
        figures=summarise(rows),
    )


def summarise(rows: Sequence[dict]) -> dict[str, dict[str, Figure]]:
    """Figures by group; the average is the mean over groups, as in the paper.

    Its interval resamples inside each group.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    values, draws, counts, figures = [], [], [], {}
    for group, own in groups.items():
        sums, weights = _columns(own)
        values.append(sums.sum(0) / weights.sum(0))
        draws.append(resampled(sums, weights))
        counts.append((weights > 0).sum(0))
        figures[group] = _figures(values[-1], draws[-1], counts[-1])
    mean, drawn = (torch.stack(parts).nanmean(0) for parts in (values, draws))
    figures[AVERAGE] = _figures(mean, drawn, torch.stack(counts).sum(0))
    return figures


def _columns(rows: Sequence[dict]) -> tuple[Tensor, Tensor]:
    """Values and weights fp64 [n, measures], 0 and 0 where a measure does not apply."""
    pairs = [[m.of(row) or (0.0, 0.0) for m in MEASURES.values()] for row in rows]
    return torch.tensor(pairs, dtype=torch.float64).unbind(-1)


def _figures(values: Tensor, draws: Tensor, counts: Tensor) -> dict[str, Figure]:
    low, high = bounds(draws)
    columns = zip(values.tolist(), low.tolist(), high.tolist(), counts.tolist(), strict=True)
    return {
        key: Figure(*column) for key, column in zip(MEASURES, columns, strict=True) if column[3]
    }


def best_score(runs: Sequence[Run]) -> str:
    """What tables show as the score: the judge's where all have been judged, else `contains`."""
    judged = all("judge" in row for run in runs for row in run.rows)
    return "judge" if judged else "contains"
