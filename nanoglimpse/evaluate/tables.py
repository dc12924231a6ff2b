"""Figures as Markdown, in the shape of the paper's tables, and as CSV."""

import csv
import io
import math
from collections.abc import Callable, Sequence

from .figures import AVERAGE, COSTS, KEPT, MEASURES, SCORES, TIMES, Figure, Measure, Run
from .interval import LEVEL

# The paper's Table 2 sorts VisCoT's data sets into these; others are categories of their own.
CATEGORIES = {
    "flickr30k": "general VQA",
    "v7w": "general VQA",
    "visual7w": "general VQA",
    "gqa": "relation reasoning",
    "openimages": "relation reasoning",
    "vsr": "relation reasoning",
    "cub": "fine grained",
    "docvqa": "doc/text",
    "textcap": "doc/text",
    "textcaps": "doc/text",
    "textvqa": "doc/text",
    "dude": "doc/text",
    "sroie": "doc/text",
    "infographicsvqa": "chart",
    "infovqa": "chart",
}
# A table of more columns is turned on its side.
WIDEST = 9
SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def show(figure: Figure | None, measure: Measure, interval: bool = False) -> str:
    """A figure for a reader, nothing where there is none; its interval in the same unit."""
    if figure is None or math.isnan(figure.value):
        return ""
    scale, unit, form = _unit(figure.value, measure.unit)
    text = f"{figure.value / scale:{form}}{unit}"
    if not interval:
        return text
    return f"{text} [{figure.low / scale:{form}}, {figure.high / scale:{form}}]"


def _unit(value: float, unit: str) -> tuple[float, str, str]:
    """What a value is divided by, the unit that it then has, and how it is written."""
    if unit == "%":
        return 0.01, "%", ".1f"
    if unit in ("FLOP", "B"):
        for scale, letter in SCALES:
            if value >= scale:
                return scale, f" {letter}{unit}", ".3g"
        return 1.0, f" {unit}", ".3g"
    if unit == "ms":
        return 1.0, " ms", ".2f"
    return 1.0, "", ".3f" if abs(value) <= 1 else ".1f"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table; the first line is its head, the first column stands left."""
    head, *rest = lines
    cells = [head, ["---", *["--:"] * (len(head) - 1)], *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _upright(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table, lines and columns exchanged where it would be too wide."""
    return markdown(list(zip(*lines, strict=True)) if len(lines[0]) > WIDEST else lines)


def progress_table(runs: Sequence[Run], groups: Sequence[str]) -> str:
    """A line an arm: accuracy, share kept and evidence found, in per cent, by group."""
    whats = {"right": "contains", "kept": "retention", "found": "recall"}
    lines = [["method", *(f"{group} {what}" for group in groups for what in whats)]]
    for run in runs:
        cells = [run.get(key, group) for group in groups for key in whats.values()]
        shown = [f"{100 * cell.value:.1f}" if cell else "" for cell in cells]
        lines.append([run.name, *shown])
    return markdown(lines)


def overview(runs: Sequence[Run], measures: Sequence[Measure], interval: bool) -> str:
    """A line an arm: measures in the mean over groups; those that nobody has are left out."""
    there = [m for m in measures if any(run.get(m.key) for run in runs)]
    lines = [["method", "n", *(m.title for m in there)]]
    for run in runs:
        shown = [show(run.get(m.key), m, interval) for m in there]
        lines.append([run.name, str(len(run.rows)), *shown])
    return markdown(lines)


def by_form(runs: Sequence[Run], score: str) -> str:
    """Table 1: free-form against brief prompts; empty without both."""
    labels = list(dict.fromkeys(run.label for run in runs))
    both = {(run.label, run.brief): run for run in runs}
    labels = [label for label in labels if (label, True) in both and (label, False) in both]
    if not labels:
        return ""
    measure = MEASURES[score]
    lines = [["prompt", *labels]]
    for title, brief in (("brief", True), ("free-form", False)):
        lines.append([title, *(show(both[label, brief].get(score), measure) for label in labels)])
    return _upright(lines)


def by_cap(runs: Sequence[Run], score: str) -> str:
    """Methods against caps, free-form and brief prompts side by side; empty with a single cap."""
    caps = sorted({run.ratio for run in runs}, key=lambda cap: (cap is not None, -(cap or 0.0)))
    if len(caps) < 2:
        return ""
    forms = sorted({run.brief for run in runs})
    places = {(run.ratio, run.brief, _whose(run)): run.get(score) for run in runs}
    titles = ["no cap" if cap is None else f"{cap:.1%}" for cap in caps]
    if len(forms) > 1:
        titles = [f"{title} {form}" for title in titles for form in ("free-form", "brief")]
    lines = [["method", *titles]]
    for name in dict.fromkeys(map(_whose, runs)):
        figures = [places.get((cap, brief, name)) for cap in caps for brief in forms]
        lines.append([name, *(show(figure, MEASURES[score]) for figure in figures)])
    return markdown(lines)


def _whose(run: Run) -> str:
    """The label of a run without its cap."""
    return run.label if run.ratio is None else run.label.replace(f" {run.ratio:g}", "", 1)


def by_kind(runs: Sequence[Run], score: str) -> str:
    """A line for every run, by kind of question; empty where all are of one."""
    kinds = list(dict.fromkeys(row.get("kind", "") for run in runs for row in run.rows))
    if len(kinds) < 2:
        return ""
    measure, lines = MEASURES[score], [["run", *kinds]]
    for run in runs:
        pairs = {kind: [] for kind in kinds}
        for row in run.rows:
            pairs[row.get("kind", "")].append(measure.of(row) or (0.0, 0.0))
        sums = [[sum(column) for column in zip(*own, strict=True)] for own in pairs.values()]
        shown = [f"{total[0] / total[1]:.3f}" if total and total[1] else "" for total in sums]
        lines.append([run.name, *shown])
    return markdown(lines)


def by_group(runs: Sequence[Run], score: str) -> str:
    """Table 2: groups and their average, a block for every cap, what was kept below the score."""
    groups = list(dict.fromkeys(group for run in runs for group in run.groups))
    lines = [["method", *groups, AVERAGE]]
    for title, block in _blocks(runs).items():
        lines.append([f"*{title}*", *[""] * (len(groups) + 1)])
        for run in block:
            for title, key in ((run.name, score), ("kept", "retention")):
                cells = [show(run.get(key, g), MEASURES[key]) for g in (*groups, AVERAGE)]
                lines.append([title, *cells])
    return markdown(lines)


def _blocks(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by cap: the whole model first, then the caps, then what has none."""
    order = sorted(
        runs, key=lambda run: (run.method != "dense", run.ratio is None, run.ratio or 0.0)
    )
    blocks: dict[str, list[Run]] = {}
    for run in order:
        if run.method == "dense":
            title = "all visual tokens"
        else:
            title = "no cap" if run.ratio is None else f"at most {run.ratio:.1%}"
        blocks.setdefault(title, []).append(run)
    return blocks


def by_category(runs: Sequence[Run], score: str) -> str:
    """Table 5: a line for every run, as of ablations in files of their own, by category.

    Empty where every group is a category of its own.
    """
    groups = list(dict.fromkeys(group for run in runs for group in run.groups))
    categories: dict[str, list[str]] = {}
    for group in groups:
        categories.setdefault(CATEGORIES.get(group.lower(), group), []).append(group)
    if list(categories) == groups:
        return ""
    lines = [["run", *categories, AVERAGE]]
    for run in runs:
        means = []
        for members in categories.values():
            figures = [run.get(score, group) for group in members]
            values = [figure.value for figure in figures if figure]
            means.append(f"{sum(values) / len(values):.3f}" if values else "")
        lines.append([run.name, *means, show(run.get(score), MEASURES[score])])
    return markdown(lines)


def by_layer(runs: Sequence[Run], score: str) -> str:
    """Table 6: performance and FLOPs of the prefill by the layer after which tokens leave."""
    if all(run.stop is None for run in runs):
        return ""
    keys = ("flops_prefill", "paper_prefill")
    lines = [["pruned after", "run", "score", "prefill", "prefill (paper)"]]
    for run in sorted(runs, key=lambda run: (run.stop is not None, run.stop or 0)):
        place = "–" if run.stop is None else str(run.stop)
        costs = [show(run.get(key), MEASURES[key]) for key in keys]
        lines.append([place, run.name, show(run.get(score), MEASURES[score]), *costs])
    return markdown(lines)


def by_cost(runs: Sequence[Run], score: str) -> str:
    """Table 7: a column for every arm, a line for every cost."""
    keys = ("ms_preprocess", "ms_vision", "ms_before", "ms_score", "ms_keep", "ms_after")
    keys = ("flops_prefill", "paper_prefill", *keys, "ms_first", "kv_rows", "kv_bytes")
    keys = (*keys, "flops_decode", "paper_decode", "ms_decode", "tokens", "peak_bytes", score)
    titles = {m.key: f"prefill: {m.title}" if m in TIMES else m.title for m in MEASURES.values()}
    titles |= {"flops_prefill": "prefill FLOPs", "paper_prefill": "prefill FLOPs (paper)"}
    titles |= {"flops_decode": "decode FLOPs", "paper_decode": "decode FLOPs (paper)"}
    titles |= {"ms_first": "time to first token", "ms_decode": "time a token", score: "score"}
    lines = [["", *(run.name for run in runs)]]
    for key in keys:
        cells = [show(run.get(key), MEASURES[key]) for run in runs]
        if any(cells):
            lines.append([titles[key], *cells])
    return _upright(lines)


SECTIONS: dict[str, Callable[[Sequence[Run], str], str]] = {
    "Caps": by_cap,
    "Free-form and brief prompts (the shape of Table 1)": by_form,
    "Groups (Table 2)": by_group,
    "Kinds of questions": by_kind,
    "Categories (Table 5)": by_category,
    "Pruning layer (Table 6)": by_layer,
    "Efficiency (Table 7)": by_cost,
}


def document(runs: Sequence[Run], score: str, notes: Sequence[str]) -> str:
    """All tables, Markdown."""
    level = f"{LEVEL:.0%} bootstrap intervals in brackets"
    parts = [
        "# Comparison",
        *notes,
        f"## Scores\n\nMeans over groups; {level}.",
        overview(runs, SCORES, True),
        f"## What was kept\n\nShares of the visual tokens; {level}.",
        overview(runs, KEPT, True),
        f"## What it costs\n\nA question in the mean; {level}.",
        overview(runs, COSTS, True),
        f"## Time\n\nA question's share of its batch; {level}.",
        overview(runs, TIMES, True),
    ]
    for title, table in SECTIONS.items():
        if text := table(runs, score):
            parts += [f"## {title}\n\nScore: {score}.", text]
    return "\n\n".join(parts) + "\n"


def as_csv(runs: Sequence[Run]) -> str:
    """A line for every arm, group and measure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["run", "method", "ratio", "brief", "group", "measure", "unit", "n"]
    writer.writerow([*head, "value", "low", "high"])
    for run in runs:
        for group, figures in run.figures.items():
            for key, f in figures.items():
                arm = [run.label, run.method, run.ratio, run.brief]
                unit = MEASURES[key].unit
                writer.writerow([*arm, group, key, unit, f.count, f.value, f.low, f.high])
    return out.getvalue()
