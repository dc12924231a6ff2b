"""Figures as a self-contained HTML page with charts, a table and a gallery.

The markup holds all of the content; the script in page.html only sorts, selects and reacts to the
pointer.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from nanoglimpse.escape import html
from nanoglimpse.evaluate.figures import AVERAGE, FAMILIES, MEASURES, VariantResults, Variants
from nanoglimpse.evaluate.store import ResultsFile

TEMPLATE = Path(__file__).with_name("page.html")
COLOURS = (
    *("#b3256b", "#1f6fb4", "#d9822b", "#2a9d5c", "#7a4fbf", "#c0392b"),
    *("#14919b", "#8d6e3f", "#5c6b7a", "#e06aa8", "#7f9c1f", "#3344cc"),
)
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 700, 460, 44, 20, 40, 26
TICKS = (0, 0.02, 0.05, 0.111, 0.222, 0.333, 0.5, 0.75, 1)


def page(variants: Variants, files: Sequence[ResultsFile], score: str, notes: Sequence[str]) -> str:
    """Renders the page.

    Args:
        variants: the variants to show.
        files: their files, which hold the pictures of the gallery.
        score: the key of the score in charts and gallery.
        notes: lines at the top of the page.
    """
    families = {
        family: [m.key for m in members if any(variant.get(m.key) for variant in variants)]
        for family, members in FAMILIES.items()
    }
    # By measure: the attribute of its cells, a border at the left of every family.
    border = ' class="first"'
    columns = {key: border * (key == keys[0]) for keys in families.values() for key in keys}
    groups = [AVERAGE, *dict.fromkeys(group for variant in variants for group in variant.groups)]
    parts = {
        "notes": "\n".join(f'<p class="faint">{html(note)}</p>' for note in notes),
        "groups": "".join(f"<option>{html(group)}</option>" for group in groups),
        "caps": _caps(variants, every=True),
        "head": _head({family: len(keys) for family, keys in families.items() if keys}, columns),
        "bodies": "\n".join(_body(variants, group, columns) for group in groups),
        "score": html(MEASURES[score].title),
        "charts": _charts(variants, score, groups),
        "gallery": _gallery(variants, files, score),
    }
    # In one pass, since an answer may contain the marker of another part.
    return re.sub(r"{{(\w+)}}", lambda name: parts[name[1]], TEMPLATE.read_text(encoding="utf-8"))


def _head(widths: dict[str, int], columns: dict[str, str]) -> str:
    families = "".join(
        f'<th class="first" colspan="{width}">{html(family)}</th>'
        for family, width in widths.items()
    )
    titles = "".join(f"<th{at}>{html(MEASURES[key].title)}</th>" for key, at in columns.items())
    return (
        f'<tr class="head"><th></th><th colspan="2"></th>{families}</tr>\n'
        f'<tr class="titles"><th>method</th><th>prompt</th><th>n</th>{titles}</tr>'
    )


def _body(variants: Variants, group: str, columns: dict[str, str]) -> str:
    lines = []
    for variant in variants:
        if group not in variant.figures:
            continue
        count = sum(row["group"] == group for row in variant.rows) or len(variant.rows)
        cells = [_cell(variant, key, group, at) for key, at in columns.items()]
        form = "brief" if variant.brief else "free"
        lines.append(
            f"<tr{_marks(variant)}><td>{html(variant.label)}</td><td>{form}</td>"
            f'<td data-v="{count}">{count}</td>{"".join(cells)}</tr>'
        )
    hidden = "" if group == AVERAGE else " hidden"
    return f'<tbody data-group="{html(group)}"{hidden}>' + "\n".join(lines) + "</tbody>"


def _marks(variant: VariantResults) -> str:
    """Attributes for the selectors; a variant without a cap has no cap to select it by."""
    cap = "" if variant.ratio is None else f' data-cap="{variant.ratio:g}"'
    return f'{cap} data-form="{"brief" if variant.brief else "free"}"'


def _caps(variants: Variants, every: bool) -> str:
    """The options of a selector of caps, in ascending order."""
    caps = sorted({variant.ratio for variant in variants if variant.ratio is not None})
    options = ['<option value="">every cap</option>'] if every or not caps else []
    options += [f'<option value="{cap:g}">{cap:.1%}</option>' for cap in caps]
    return "".join(options)


def _cell(variant: VariantResults, key: str, group: str, attribute: str) -> str:
    figure = variant.get(key, group)
    if figure is None:
        return f'<td{attribute} data-v="NaN"></td>'
    title = html(variant.text(key, group, interval=True))
    value = f'data-v="{figure.value:.6g}" title="{title}"'
    return f"<td{attribute} {value}>{variant.text(key, group)}</td>"


def _charts(variants: Variants, score: str, groups: Sequence[str]) -> str:
    """The legend, and a chart for every group and form of the prompts."""
    methods = list(dict.fromkeys(variant.uncapped for variant in variants))
    # One group is its own average.
    shown = groups[:1] if len(groups) == 2 else groups
    charts = []
    for group in shown:
        for brief in (False, True):
            members = [v for v in variants if v.brief == brief and _has_place(v, score, group)]
            if members:
                title = f"{group}, {'brief' if brief else 'free-form'} prompts"
                charts.append(chart(members, score, group, title, methods))
    items = [
        f'<li data-series="{i}"><svg viewBox="-6 -6 12 12">{_mark(i, 0, 0)}</svg>{html(m)}</li>'
        for i, m in enumerate(methods)
    ]
    return "\n".join([f'<ul class="legend">{"".join(items)}</ul>', *charts])


def _has_place(variant: VariantResults, score: str, group: str) -> bool:
    """Whether a chart can show a variant; a file of another version may lack the retention."""
    return all(variant.get(key, group) for key in (score, "decode_kv"))


def _mark(number: int, x: float, y: float, title: str = "") -> str:
    """The mark of a series: a dot, or another shape when the colours repeat."""
    shape, place = divmod(number, len(COLOURS))
    colour = COLOURS[place]
    label = f"<title>{html(title)}</title>" if title else ""
    if not shape:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{label}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' * (shape % 2)
    return (
        f'<rect x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4" fill="#fff" '
        f'stroke="{colour}" stroke-width="2"{turn}>{label}</rect>'
    )


def chart(variants: Variants, score: str, group: str, title: str, methods: Sequence[str]) -> str:
    """Score against retention as SVG, with a root scale that spreads small retentions."""
    # The axis starts below the lowest score, but not below all intervals.
    lowest = min(variant.figures[group][score].value for variant in variants)
    base = math.floor(10 * max(lowest - 0.02, 0.0)) / 10
    parts = [f'<text x="{LEFT}" y="14" font-weight="600">{html(title)}</text>', _axes(base)]
    lines: dict[int, list[tuple[float, float, str]]] = {}
    for variant in variants:
        number = methods.index(variant.uncapped)
        figure, kept = (variant.figures[group][key] for key in (score, "decode_kv"))
        x, y = _x(kept.value), _y(figure.value, base)
        label = f"{variant.label}: {figure.value:.3f} at {kept.value:.1%}"
        low, high = (_y(max(value, base), base) for value in (figure.low, figure.high))
        bar = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" '
            f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-opacity="0.3"/>'
        )
        lines.setdefault(number, []).append((x, y, bar + _mark(number, x, y, label)))
    for number, points in lines.items():
        points.sort()
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        dash = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        parts.append(
            f'<g data-series="{number}"><polyline points="{path}" fill="none" '
            f'stroke="{COLOURS[number % len(COLOURS)]}"{dash}/>'
            f"{''.join(mark for _, _, mark in points)}</g>"
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">' + "\n".join(parts) + "</svg>"


def _x(share: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * math.sqrt(min(share, 1.0))


def _y(value: float, base: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - base) / (1 - base)


def _axes(base: float) -> str:
    parts, foot = [], _y(base, base)
    for tick in TICKS:
        x, label = _x(tick), f"{100 * tick:.3g}%"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{foot}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{foot + 15}" text-anchor="middle">{label}</text>')
    for tenth in range(round(10 * base), 11):
        y = _y(tenth / 10, base)
        parts.append(f'<line x1="{LEFT}" x2="{_x(1)}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tenth / 10:g}</text>'
        )
    middle = (LEFT + WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">retention</text>')
    return "\n".join(parts)


def _gallery(variants: Variants, files: Sequence[ResultsFile], score: str) -> str:
    """The questions whose results have a gallery entry, with a card per variant."""
    pictures = {name: uri for file in files for name, uri in file.pictures.items()}
    shown: dict[tuple[str, str], list[tuple[VariantResults, dict]]] = {}
    for variant in variants:
        for row in variant.rows:
            if "cells" in row and row["question"] in pictures:
                shown.setdefault((row["question"], row["asked"]), []).append((variant, row))
    if not shown:
        return ""
    numbers = {name: f"picture{i}" for i, name in enumerate(pictures)}
    parts = [
        "<h2>What each method kept</h2>",
        '<p class="faint">Dropped cells are dimmed; dashed boxes are the evidence. Hover over a '
        "cell to see its importance, if the method computes it.</p>",
        f'<p><label>Cap <select data-shows=".cards figure" data-by="cap">'
        f"{_caps(variants, every=False)}</select></label>"
        '<label><input type="checkbox" id="importance"> importance instead of kept cells</label>'
        "</p>",
        '<svg width="0" height="0" style="position:absolute"><defs>',
        *(
            f'<symbol id="{numbers[name]}" viewBox="0 0 1 1" preserveAspectRatio="none"><image '
            f'href="{html(uri)}" width="1" height="1" preserveAspectRatio="none"/></symbol>'
            for name, uri in pictures.items()
        ),
        "</defs></svg>",
    ]
    for (name, asked), members in shown.items():
        wanted = members[0][1]["wanted"]
        parts.append(
            f"<section><h3>{html(asked)}</h3>"
            f'<p>Right: <b>{html(wanted)}</b> <span class="faint">({html(name)})</span></p>'
            f'<div class="cards">'
        )
        parts += [_card(variant, row, numbers[name], score) for variant, row in members]
        parts.append("</div></section>")
    return "\n".join(parts)


def _card(variant: VariantResults, row: dict, picture: str, score: str) -> str:
    (height, width), importance = row["grid"], row["importance"]
    known = f' data-importance="{html(importance)}"' if importance else ""
    boxes = "".join(
        f'<rect class="box" x="{x0 * width:.3f}" y="{y0 * height:.3f}" '
        f'width="{(x1 - x0) * width:.3f}" height="{(y1 - y0) * height:.3f}"/>'
        for x0, y0, x1, y1 in row["boxes"]
    )
    value = float(row.get(score, row["contains"]))
    kind, sign = ("right", "✓") if value >= 0.5 else ("wrong", "✗")
    share = row["kept"] / max(row["visual"], 1)
    return (
        f"<figure{_marks(variant)}>"
        f'<svg viewBox="0 0 {width} {height}" data-cells="{html(row["cells"])}"{known}>'
        f'<use href="#{picture}" width="{width}" height="{height}"/>'
        f'<path class="dropped" d="{dropped(row["cells"], width, height)}"/>{boxes}</svg>'
        f"<figcaption><b>{html(variant.label)}</b> "
        f'<span class="faint">{row["kept"]} of {row["visual"]} ({share:.1%})</span><br>'
        f'<span class="{kind}">{sign} {html(row["reply"])}</span></figcaption></figure>'
    )


def dropped(cells: str, width: int, height: int) -> str:
    """An SVG path around the cells that were not kept: a rectangle for every run of a row."""
    kept = f"{int(cells, 16):0{4 * len(cells)}b}"
    path = []
    for y in range(height):
        runs = re.finditer("0+", kept[y * width : (y + 1) * width])
        path += [f"M{run.start()} {y}h{len(run[0])}v1h-{len(run[0])}z" for run in runs]
    return "".join(path)
