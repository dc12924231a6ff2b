"""Figures from results: every measure, by variant and group, with its bootstrap interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoglimpse.errors import UsageError
from nanoglimpse.evaluate.interval import bounds, resampled
from nanoglimpse.evaluate.store import ResultsFile

AVERAGE = "average"
SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
Weighted = tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """A measure: the sum of values over the sum of weights, a mean if every weight is 1.

    Attributes:
        key: the name in the CSV.
        title: the name in tables.
        unit: "%" for shares, "" for scores and counts, "FLOP", "B" or "ms".
        of: maps a result to value and weight; to None if the measure does not apply.
    """

    key: str
    title: str
    unit: str
    of: Callable[[dict], Weighted | None] = field(repr=False)

    def text(self, figure: "Figure | None", interval: bool = False) -> str:
        """A figure with its unit, optionally with its interval; "" if there is none."""
        if figure is None or math.isnan(figure.value):
            return ""
        scale, unit, form = _format(figure.value, self.unit)
        text = f"{figure.value / scale:{form}}{unit}"
        if not interval:
            return text
        return f"{text} [{figure.low / scale:{form}}, {figure.high / scale:{form}}]"


def _format(value: float, unit: str) -> tuple[float, str, str]:
    """The scale of a value, the unit of the scaled value, and its format."""
    if unit == "%":
        return 0.01, "%", ".1f"
    if unit in ("FLOP", "B"):
        scale, letter = next((known for known in SCALES if value >= known[0]), (1.0, ""))
        return scale, f" {letter}{unit}", ".3g"
    if unit == "ms":
        return 1.0, " ms", ".2f"
    return 1.0, "", ".3f" if abs(value) <= 1 else ".1f"


def _key(*path: str) -> Callable[[dict], Weighted | None]:
    """Maps a result to the value at a path of keys, with weight 1; to None if it is absent."""

    def of(row: dict) -> Weighted | None:
        value: Any = row
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return None if value is None else (float(value), 1.0)

    return of


def _measures(unit: str, part: str = "", **titles: str) -> tuple[Measure, ...]:
    """Measures of one unit by the keys of a result, or of the dictionary `part` of a result."""
    path = [part] if part else []
    return tuple(
        Measure("_".join([*path, key]), title, unit, _key(*path, key))
        for key, title in titles.items()
    )


def _retention(row: dict) -> Weighted:
    return row["kept"] / max(row["visual"], 1), 1.0


def _first_token(row: dict) -> Weighted:
    return sum(spent or 0.0 for stage, spent in row["ms"].items() if stage != "decode"), 1.0


SCORES = _measures("", contains="contains", exact="exact", anls="ANLS", f1="F1", judge="judge")
KEPT = (
    Measure("retention", "kept (mean)", "%", _retention),
    Measure("kept", "kept (total)", "%", lambda row: (row["kept"], row["visual"])),
    *_measures("%", recall="box recall", iou="box IoU"),
    *_measures("%", input="input", prefill="prefill", decode_kv="decode KV"),
)
COSTS = (
    *_measures("FLOP", "flops", vision="vision", prefill="prefill", decode="decode"),
    Measure("paper_prefill", "prefill (paper)", "FLOP", _key("flops", "paper prefill")),
    Measure("paper_decode", "decode (paper)", "FLOP", _key("flops", "paper decode")),
    Measure("kv_rows", "KV rows", "", _key("kv_rows")),
    Measure("kv_bytes", "KV cache", "B", _key("kv_bytes")),
    Measure("tokens", "tokens", "", _key("tokens")),
    Measure("peak_bytes", "peak memory", "B", _key("peak_bytes")),
)
TIMES = (
    *_measures("ms", "ms", preprocess="preprocess", vision="vision", before="layers before"),
    *_measures("ms", "ms", score="score", keep="keep", after="layers after"),
    Measure("ms_first", "to first token", "ms", _first_token),
    *_measures("ms", "ms", decode="a token"),
)
FAMILIES = {"score": SCORES, "kept": KEPT, "cost of a question": COSTS, "time": TIMES}
MEASURES = {measure.key: measure for family in FAMILIES.values() for measure in family}


@dataclass(frozen=True)
class Figure:
    """The value of a measure, the ends of its interval, and the number of questions it is from."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class VariantResults:
    """The results of a variant and their figures.

    Attributes:
        label: method and cap, preceded by the name of the file if there are several.
        method, ratio, brief, stop: as in the results; `stop` is the layer of the first pruning.
        rows: the results, each with the score of its verdict if there is one.
        figures: by group (including AVERAGE) and measure.
        file: the name of the file if there are several.
    """

    label: str
    method: str
    ratio: float | None
    brief: bool
    stop: int | None
    rows: list[dict] = field(repr=False)
    figures: dict[str, dict[str, Figure]] = field(repr=False)
    file: str = ""

    @property
    def name(self) -> str:
        """The label with the form of the prompts."""
        return f"{self.label}{' brief' if self.brief else ''}"

    @property
    def uncapped(self) -> str:
        """The label without the cap."""
        if self.ratio is None:
            return self.label
        before, _, after = self.label.rpartition(f" {self.ratio:g}")
        return before + after

    @property
    def groups(self) -> list[str]:
        """The groups of the results, without AVERAGE."""
        return [group for group in self.figures if group != AVERAGE]

    def get(self, key: str, group: str = AVERAGE) -> Figure | None:
        """The figure of a measure; None if it does not apply."""
        return self.figures.get(group, {}).get(key)

    def text(self, key: str, group: str = AVERAGE, *, interval: bool = False) -> str:
        """The figure of a measure for a table; "" if it does not apply."""
        return MEASURES[key].text(self.get(key, group), interval)


Variants = Sequence[VariantResults]


def read_variants(paths: Sequence[Path]) -> tuple[list[VariantResults], list[ResultsFile]]:
    """The variants in files of results, in order, and the files.

    Raises:
        UsageError, NanoglimpseError: as in `ResultsFile.read`; also if no file has a result.
    """
    files = [ResultsFile.read(path) for path in paths]
    variants = [
        variant
        for path, file in zip(paths, files, strict=True)
        for variant in variant_results(file, f"{path.stem}: " if len(paths) > 1 else "")
    ]
    if not variants:
        raise UsageError(f"{', '.join(map(str, paths))}: no results yet")
    return variants, files


def variant_results(file: ResultsFile, prefix: str = "") -> list[VariantResults]:
    """The variants of a file; `prefix` precedes their labels."""
    variants: dict[str, list[dict]] = {}
    for row in file.rows:
        verdict = file.verdicts.get((row["arm"], row["question"]))
        graded = {"judge": verdict["score"]} if verdict else {}
        variants.setdefault(row["arm"], []).append(row | graded)
    return [_summary(rows, prefix) for rows in variants.values()]


def _summary(rows: list[dict], prefix: str) -> VariantResults:
    first = rows[0]
    label = first["arm"].removesuffix(" brief") if first["brief"] else first["arm"]
    same: dict[str, Any] = {key: first.get(key) for key in ("method", "ratio", "brief", "stop")}
    return VariantResults(prefix + label, rows=rows, figures=summarise(rows), file=prefix, **same)


def summarise(rows: Sequence[dict]) -> dict[str, dict[str, Figure]]:
    """Figures by group, and their mean over groups as in the paper.

    The interval of the mean resamples the questions of each group separately.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    values, draws, counts, figures = [], [], [], {}
    for group, members in groups.items():
        sums, weights = _columns(members)
        values.append(sums.sum(0) / weights.sum(0))
        draws.append(resampled(sums, weights))
        counts.append((weights > 0).sum(0))
        figures[group] = _figures(values[-1], draws[-1], counts[-1])
    mean, drawn = (torch.stack(parts).nanmean(0) for parts in (values, draws))
    figures[AVERAGE] = _figures(mean, drawn, torch.stack(counts).sum(0))
    return figures


def _columns(rows: Sequence[dict]) -> tuple[Tensor, Tensor]:
    """Values and weights fp64 [n, measures]; both are 0 where a measure does not apply."""
    pairs = [[m.of(row) or (0.0, 0.0) for m in MEASURES.values()] for row in rows]
    values, weights = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    return values, weights


def _figures(values: Tensor, draws: Tensor, counts: Tensor) -> dict[str, Figure]:
    columns = zip(values.tolist(), *bounds(draws).tolist(), counts.tolist(), strict=True)
    figures = zip(MEASURES, starmap(Figure, columns), strict=True)
    return {key: figure for key, figure in figures if figure.count}


def comparable(variants: Variants, score: str) -> tuple[list[VariantResults], list[str]]:
    """The variants over the questions for which all of them have a score.

    A run that was cut has answered other questions in one variant than in the next, and the
    questions are not equally hard. Files without a common question are data of their own, each
    with its own questions.

    Returns:
        The variants, and lines that say what has been left out, if anything has.

    Raises:
        UsageError: variants of one file, or of files that share questions, have none in common.
    """
    answered = [{row["question"] for row in v.rows if row.get(score) is not None} for v in variants]
    data: list[set[int]] = []
    for number, variant in enumerate(variants):
        near = [
            own
            for own in data
            if any(variants[i].file == variant.file or answered[i] & answered[number] for i in own)
        ]
        data = [own for own in data if own not in near] + [{number}.union(*near)]
    shown, lines = list(variants), []
    for members in map(sorted, data):
        common = set.intersection(*(answered[i] for i in members))
        every = set.union(*(answered[i] for i in members))
        if not common:
            names = ", ".join(variants[i].name for i in members)
            raise UsageError(
                f"no question has the score {score} in all of {names}, so that they cannot be "
                "compared; complete the run, or report files of different questions one by one"
            )
        gaps = [(variants[i].name, len(every) - len(answered[i])) for i in members]
        if len(common) < len(every):
            lines.append(
                f"The figures are those of the {len(common)} questions that all variants have "
                f"answered, of {len(every)}: "
                f"{', '.join(f'{name} lacks {count}' for name, count in gaps if count)}."
            )
            for i in members:
                shown[i] = _restricted(variants[i], common)
    if len(data) > 1:
        lines.append("Some files hold other questions than others; compare variants of one file.")
    return shown, lines


def _restricted(variant: VariantResults, questions: set[str]) -> VariantResults:
    rows = [row for row in variant.rows if row["question"] in questions]
    return replace(variant, rows=rows, figures=summarise(rows))


def caveats(variants: Variants) -> list[str]:
    """Lines about figures that are not what their name says."""
    lines = []
    for variant in variants:
        without = sum(row["recall"] is None for row in variant.rows)
        if variant.method == "oracle" and without:
            lines.append(
                f"{variant.name}: {without} of {len(variant.rows)} questions have no boxes. There "
                "it has nothing to keep, and is no upper bound."
            )
    return lines


def best_score(variants: Variants) -> str:
    """The default score of tables: the judge's if every result has a verdict, else `contains`."""
    judged = all("judge" in row for variant in variants for row in variant.rows)
    return "judge" if judged else "contains"
