"""Figures as Markdown tables, some in the form of the paper's tables, and as CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from itertools import groupby

from nanoglimpse.escape import csv_cell
from nanoglimpse.escape import markdown as in_markdown
from nanoglimpse.evaluate.figures import AVERAGE, FAMILIES, MEASURES, VariantResults, Variants
from nanoglimpse.evaluate.interval import LEVEL

# The categories of the paper's Table 2; any other data set is a category of its own.
CATEGORIES = {
    "general VQA": ("flickr30k", "v7w", "visual7w"),
    "relation reasoning": ("gqa", "openimages", "vsr"),
    "fine grained": ("cub",),
    "doc/text": ("docvqa", "textcap", "textcaps", "textvqa", "dude", "sroie"),
    "chart": ("infographicsvqa", "infovqa"),
}
CATEGORY_OF = {name: category for category, names in CATEGORIES.items() for name in names}
# A table with more columns is transposed.
MAX_COLUMNS = 9


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table; the first line is the head, the first column is left-aligned."""
    head, *rest = lines
    cells = [head, ["---", *["--:"] * (len(head) - 1)], *rest]
    return "\n".join("| " + " | ".join(map(in_markdown, line)) + " |" for line in cells)


def _upright(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table, which is transposed if it would be too wide."""
    return markdown(list(zip(*lines, strict=True)) if len(lines[0]) > MAX_COLUMNS else lines)


def progress_table(variants: Variants, groups: Sequence[str]) -> str:
    """A line per variant: accuracy, retention and recall of the evidence in per cent, by group."""
    columns = {"right": "contains", "kept": "retention", "found": "recall"}
    lines = [["method", *(f"{group} {column}" for group in groups for column in columns)]]
    for variant in variants:
        cells = [variant.get(key, group) for group in groups for key in columns.values()]
        shown = [f"{100 * cell.value:.1f}" if cell else "" for cell in cells]
        lines.append([variant.name, *shown])
    return markdown(lines)


def overview(variants: Variants, family: str) -> str:
    """A line per variant: means over groups of the measures that apply to any variant."""
    measures = [m for m in FAMILIES[family] if any(variant.get(m.key) for variant in variants)]
    lines = [["method", "n", *(m.title for m in measures)]]
    for variant in variants:
        shown = [variant.text(m.key, interval=True) for m in measures]
        lines.append([variant.name, str(len(variant.rows)), *shown])
    return markdown(lines)


def by_form(variants: Variants, score: str) -> str:
    """Table 1: free-form against brief prompts; empty if there is only one form."""
    labels = list(dict.fromkeys(variant.label for variant in variants))
    both = {(variant.label, variant.brief): variant for variant in variants}
    labels = [label for label in labels if (label, True) in both and (label, False) in both]
    if not labels:
        return ""
    lines = [["prompt", *labels]]
    for title, brief in (("brief", True), ("free-form", False)):
        lines.append([title, *(both[label, brief].text(score) for label in labels)])
    return _upright(lines)


def by_cap(variants: Variants, score: str) -> str:
    """Methods against caps, with free-form and brief prompts side by side; empty for one cap."""
    caps = list({variant.ratio for variant in variants})
    caps.sort(key=lambda cap: (cap is not None, -(cap or 0.0)))
    if len(caps) < 2:
        return ""
    forms = sorted({variant.brief for variant in variants})
    found = {(v.ratio, v.brief, v.uncapped): v.text(score) for v in variants}
    titles = ["no cap" if cap is None else f"{cap:.1%}" for cap in caps]
    if len(forms) > 1:
        titles = [f"{title} {form}" for title in titles for form in ("free-form", "brief")]
    lines = [["method", *titles]]
    for name in dict.fromkeys(variant.uncapped for variant in variants):
        cells = [found.get((cap, brief, name), "") for cap in caps for brief in forms]
        lines.append([name, *cells])
    return markdown(lines)


def by_kind(variants: Variants, score: str) -> str:
    """A line per variant, by kind of question; empty if there is only one kind."""
    kinds = list(dict.fromkeys(row.get("kind", "") for variant in variants for row in variant.rows))
    if len(kinds) < 2:
        return ""
    measure, lines = MEASURES[score], [["method", *kinds]]
    for variant in variants:
        pairs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for row in variant.rows:
            pairs[row.get("kind", "")].append(measure.of(row) or (0.0, 0.0))
        sums = [list(map(sum, zip(*members, strict=True))) for members in pairs.values()]
        shown = [f"{total[0] / total[1]:.3f}" if total and total[1] else "" for total in sums]
        lines.append([variant.name, *shown])
    return markdown(lines)


def by_group(variants: Variants, score: str) -> str:
    """Table 2: groups and their average in a block per cap; retention is below each score.

    The dense model comes first, then ascending caps, then variants without a cap.
    """
    groups = list(dict.fromkeys(group for variant in variants for group in variant.groups))
    lines = [["method", *groups, AVERAGE]]
    order = sorted(variants, key=lambda v: (v.method != "dense", v.ratio is None, v.ratio or 0.0))
    for title, block in groupby(order, _block):
        lines.append([f"*{title}*", *[""] * (len(groups) + 1)])
        for variant in block:
            for title, key in ((variant.name, score), ("kept", "retention")):
                cells = [variant.text(key, g) for g in (*groups, AVERAGE)]
                lines.append([title, *cells])
    return markdown(lines)


def _block(variant: VariantResults) -> str:
    """The title of a variant's block in `by_group`."""
    if variant.method == "dense":
        return "all visual tokens"
    return "no cap" if variant.ratio is None else f"at most {variant.ratio:.1%}"


def by_category(variants: Variants, score: str) -> str:
    """Table 5: a line per variant, by category; ablations are variants from files of their own.

    Empty if every group is a category of its own.
    """
    groups = list(dict.fromkeys(group for variant in variants for group in variant.groups))
    categories: dict[str, list[str]] = {}
    for group in groups:
        categories.setdefault(CATEGORY_OF.get(group.lower(), group), []).append(group)
    if list(categories) == groups:
        return ""
    lines = [["method", *categories, AVERAGE]]
    for variant in variants:
        means = []
        for members in categories.values():
            figures = [variant.get(score, group) for group in members]
            values = [figure.value for figure in figures if figure]
            means.append(f"{sum(values) / len(values):.3f}" if values else "")
        lines.append([variant.name, *means, variant.text(score)])
    return markdown(lines)


def by_layer(variants: Variants, score: str) -> str:
    """Table 6: score and prefill FLOPs by the layer after which tokens are dropped."""
    if all(variant.stop is None for variant in variants):
        return ""
    keys = ("flops_prefill", "paper_prefill")
    lines = [["pruned after", "method", "score", "prefill", "prefill (paper)"]]
    for variant in sorted(variants, key=lambda v: (v.stop is not None, v.stop or 0)):
        layer = "–" if variant.stop is None else str(variant.stop)
        costs = [variant.text(key) for key in keys]
        lines.append([layer, variant.name, variant.text(score), *costs])
    return markdown(lines)


def by_cost(variants: Variants, score: str) -> str:
    """Table 7: a column per variant, a line per cost."""
    keys = ["flops_prefill", "paper_prefill", "ms_preprocess", "ms_vision", "ms_before"]
    keys += ["ms_score", "ms_keep", "ms_after", "ms_first", "kv_rows", "kv_bytes"]
    keys += ["flops_decode", "paper_decode", "ms_decode", "tokens", "peak_bytes", score]
    titles = {measure.key: measure.title for measure in MEASURES.values()}
    titles |= {measure.key: f"prefill: {measure.title}" for measure in FAMILIES["time"]}
    titles |= {"flops_prefill": "prefill FLOPs", "paper_prefill": "prefill FLOPs (paper)"}
    titles |= {"flops_decode": "decode FLOPs", "paper_decode": "decode FLOPs (paper)"}
    titles |= {"ms_first": "time to first token", "ms_decode": "time per token", score: "score"}
    lines = [["", *(variant.name for variant in variants)]]
    for key in keys:
        cells = [variant.text(key) for variant in variants]
        if any(cells):
            lines.append([titles[key], *cells])
    return _upright(lines)


SECTIONS: dict[str, Callable[[Variants, str], str]] = {
    "Caps": by_cap,
    "Free-form and brief prompts (the shape of Table 1)": by_form,
    "Groups (Table 2)": by_group,
    "Kinds of questions": by_kind,
    "Categories (Table 5)": by_category,
    "Pruning layer (Table 6)": by_layer,
    "Efficiency (Table 7)": by_cost,
}


def document(variants: Variants, score: str, notes: Sequence[str]) -> str:
    """All tables as one Markdown document."""
    level = f"{LEVEL:.0%} bootstrap intervals in brackets"
    parts = [
        "# Comparison",
        *map(in_markdown, notes),
        f"## Scores\n\nMeans over groups; {level}.",
        overview(variants, "score"),
        f"## Kept visual tokens\n\nShares of all visual tokens; {level}.",
        overview(variants, "kept"),
        f"## Cost\n\nMeans per question; {level}.",
        overview(variants, "cost of a question"),
        f"## Time\n\nTime of a batch divided by its questions; {level}.",
        overview(variants, "time"),
    ]
    for title, table in SECTIONS.items():
        if text := table(variants, score):
            parts += [f"## {title}\n\nScore: {score}.", text]
    return "\n\n".join(parts) + "\n"


def as_csv(variants: Variants) -> str:
    """A line for every variant, group and measure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["run", "method", "ratio", "brief", "group", "measure", "unit", "n"]
    writer.writerow([*head, "value", "low", "high"])
    for variant in variants:
        for group, figures in variant.figures.items():
            for key, f in figures.items():
                start = [variant.label, variant.method, variant.ratio, variant.brief]
                unit = MEASURES[key].unit
                line = [*start, group, key, unit, f.count, f.value, f.low, f.high]
                writer.writerow(map(csv_cell, line))
    return out.getvalue()
