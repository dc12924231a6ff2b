"""Figures as one HTML page that needs nothing beside itself: charts, table, gallery.

Everything to be read stands in the markup; the script in page.html only sorts, chooses what is
shown and answers the pointer.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .figures import AVERAGE, COSTS, KEPT, MEASURES, SCORES, TIMES, Figure, Measure, Run
from .store import Results
from .tables import show

TEMPLATE = Path(__file__).with_name("page.html")
FAMILIES = {"score": SCORES, "kept": KEPT, "cost of a question": COSTS, "time": TIMES}
COLOURS = (
    *("#b3256b", "#1f6fb4", "#d9822b", "#2a9d5c", "#7a4fbf", "#c0392b"),
    *("#14919b", "#8d6e3f", "#5c6b7a", "#e06aa8", "#7f9c1f", "#3344cc"),
)
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 700, 460, 44, 20, 40, 26
TICKS = (0, 0.02, 0.05, 0.111, 0.222, 0.333, 0.5, 0.75, 1)


def page(runs: Sequence[Run], files: Sequence[Results], score: str, notes: Sequence[str]) -> str:
    """The page.

    Args:
        runs: what is shown.
        files: of which they come; the gallery's pictures are there.
        score: key of the measure that charts show.
        notes: lines above all.
    """
    measures = {
        family: [m for m in members if any(run.get(m.key) for run in runs)]
        for family, members in FAMILIES.items()
    }
    groups = [AVERAGE, *dict.fromkeys(group for run in runs for group in run.groups)]
    parts = {
        "notes": "\n".join(f'<p class="faint">{escape(note)}</p>' for note in notes),
        "groups": "".join(f"<option>{escape(group)}</option>" for group in groups),
        "caps": _caps(runs, every=True),
        "head": _head({family: own for family, own in measures.items() if own}),
        "bodies": "\n".join(_body(runs, group, measures) for group in groups),
        "score": escape(MEASURES[score].title),
        "charts": _charts(runs, score, groups),
        "gallery": _gallery(runs, files, score),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    head, *rest = text.split("{{")
    # Piece by piece: an answer may hold the mark of a part that is still to come.
    pieces = [piece.partition("}}") for piece in rest]
    return head + "".join(parts[name] + behind for name, _, behind in pieces)


def _head(measures: dict[str, list[Measure]]) -> str:
    families = "".join(
        f'<th class="first" colspan="{len(own)}">{escape(family)}</th>'
        for family, own in measures.items()
    )
    titles = "".join(
        f"<th{_first(m, own)}>{escape(m.title)}</th>" for own in measures.values() for m in own
    )
    return (
        f'<tr class="head"><th></th><th colspan="2"></th>{families}</tr>\n'
        f'<tr class="titles"><th>method</th><th>prompt</th><th>n</th>{titles}</tr>'
    )


def _first(measure: Measure, family: list[Measure]) -> str:
    return ' class="first"' if measure is family[0] else ""


def _body(runs: Sequence[Run], group: str, measures: dict[str, list[Measure]]) -> str:
    lines = []
    for run in runs:
        if group not in run.figures:
            continue
        count = sum(row["group"] == group for row in run.rows) or len(run.rows)
        cells = [
            _cell(run.get(m.key, group), m, _first(m, own))
            for own in measures.values()
            for m in own
        ]
        form = "brief" if run.brief else "free"
        lines.append(
            f"<tr{_marks(run)}><td>{escape(run.label)}</td><td>{form}</td>"
            f'<td data-v="{count}">{count}</td>{"".join(cells)}</tr>'
        )
    hidden = "" if group == AVERAGE else " hidden"
    return f'<tbody data-group="{escape(group)}"{hidden}>' + "\n".join(lines) + "</tbody>"


def _marks(run: Run) -> str:
    """What the selectors go by; a run without a cap stands beside every one."""
    cap = "" if run.ratio is None else f' data-cap="{run.ratio:g}"'
    return f'{cap} data-form="{"brief" if run.brief else "free"}"'


def _caps(runs: Sequence[Run], every: bool) -> str:
    """Options of a selector of caps, the lowest first."""
    caps = sorted({run.ratio for run in runs if run.ratio is not None})
    options = ['<option value="">every cap</option>'] if every or not caps else []
    options += [f'<option value="{cap:g}">{cap:.1%}</option>' for cap in caps]
    return "".join(options)


def _cell(figure: Figure | None, measure: Measure, first: str) -> str:
    if figure is None or math.isnan(figure.value):
        return f'<td{first} data-v="NaN"></td>'
    title = escape(show(figure, measure, interval=True))
    value = f'data-v="{figure.value:.6g}" title="{title}"'
    return f"<td{first} {value}>{show(figure, measure)}</td>"


def _charts(runs: Sequence[Run], score: str, groups: Sequence[str]) -> str:
    """A chart for every form of the prompts and group, and what its marks mean."""
    methods = list(dict.fromkeys(_series(run) for run in runs))
    # One group is its own average.
    shown = groups[:1] if len(groups) == 2 else groups
    charts = []
    for group in shown:
        for brief in (False, True):
            own = [run for run in runs if run.brief == brief and run.get(score, group)]
            if own:
                title = f"{group}, {'brief' if brief else 'free-form'} prompts"
                charts.append(chart(own, score, group, title, methods))
    items = [
        f'<li data-series="{i}"><svg viewBox="-6 -6 12 12">{_mark(i, 0, 0)}</svg>{escape(m)}</li>'
        for i, m in enumerate(methods)
    ]
    return "\n".join([f'<ul class="legend">{"".join(items)}</ul>', *charts])


def _mark(number: int, x: float, y: float, title: str = "") -> str:
    """The point of a series: a dot, or another shape where the colours have been used up."""
    colour, round_ = COLOURS[number % len(COLOURS)], number // len(COLOURS)
    says = f"<title>{escape(title)}</title>" if title else ""
    if not round_:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{says}</circle>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' * (round_ % 2)
    return (
        f'<rect x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4" fill="#fff" '
        f'stroke="{colour}" stroke-width="2"{turn}>{says}</rect>'
    )


def _series(run: Run) -> str:
    """What points of a chart have in common: all but the cap."""
    if run.ratio is None:
        return run.label
    return " ".join(word for word in run.label.split() if word != f"{run.ratio:g}")


def chart(runs: Sequence[Run], score: str, group: str, title: str, methods: Sequence[str]) -> str:
    """Score against retention as SVG; retention on a root scale, so that small shares part."""
    figures = [run.get(score, group) for run in runs]
    # The scale begins below the lowest score; intervals may leave the chart.
    base = math.floor(10 * max(min(figure.value for figure in figures) - 0.02, 0.0)) / 10
    parts = [f'<text x="{LEFT}" y="14" font-weight="600">{escape(title)}</text>', _axes(base)]
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for run, figure in zip(runs, figures, strict=True):
        kept, number = run.get("decode_kv", group), methods.index(_series(run))
        x, y = _x(kept.value), _y(figure.value, base)
        says = f"{run.label}: {figure.value:.3f} at {kept.value:.1%}"
        ends = [_y(max(value, base), base) for value in (figure.low, figure.high)]
        bar = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" '
            f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-opacity="0.3"/>'
        )
        lines.setdefault(_series(run), []).append((x, y, bar + _mark(number, x, y, says)))
    for method, points in lines.items():
        points.sort()
        number = methods.index(method)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        stroke = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        marks = "".join(mark for _, _, mark in points)
        parts.append(
            f'<g data-series="{number}"><polyline points="{path}" fill="none" stroke="{stroke}"'
            f"{dash}/>{marks}</g>"
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


def _gallery(runs: Sequence[Run], files: Sequence[Results], score: str) -> str:
    """Questions of which a run kept what methods saw: a card an arm."""
    pictures = {name: uri for file in files for name, uri in file.pictures.items()}
    shown: dict[tuple[str, str], list[tuple[Run, dict]]] = {}
    for run in runs:
        for row in run.rows:
            if "cells" in row and row["question"] in pictures:
                shown.setdefault((row["question"], row["asked"]), []).append((run, row))
    if not shown:
        return ""
    numbers = {name: f"picture{i}" for i, name in enumerate(pictures)}
    parts = [
        "<h2>What each method kept</h2>",
        '<p class="faint">Dropped cells are dimmed; dashed boxes are the evidence. Hovering shows '
        "a cell's importance where a method states one.</p>",
        f'<p><label>Cap <select data-shows=".cards figure" data-by="cap">'
        f"{_caps(runs, every=False)}</select></label>"
        '<label><input type="checkbox" id="importance"> importance instead of kept cells</label>'
        "</p>",
        '<svg width="0" height="0" style="position:absolute"><defs>',
        *(
            f'<symbol id="{numbers[name]}" viewBox="0 0 1 1" preserveAspectRatio="none"><image '
            f'href="{escape(uri)}" width="1" height="1" preserveAspectRatio="none"/></symbol>'
            for name, uri in pictures.items()
        ),
        "</defs></svg>",
    ]
    for (name, asked), members in shown.items():
        wanted = members[0][1]["wanted"]
        parts.append(
            f"<section><h3>{escape(asked)}</h3>"
            f'<p>Right: <b>{escape(wanted)}</b> <span class="faint">({escape(name)})</span></p>'
            f'<div class="cards">'
        )
        parts += [_card(run, row, numbers[name], score) for run, row in members]
        parts.append("</div></section>")
    return "\n".join(parts)


def _card(run: Run, row: dict, picture: str, score: str) -> str:
    (height, width), importance = row["grid"], row["importance"]
    known = f' data-importance="{importance}"' if importance else ""
    boxes = "".join(
        f'<rect class="box" x="{x0 * width:.3f}" y="{y0 * height:.3f}" '
        f'width="{(x1 - x0) * width:.3f}" height="{(y1 - y0) * height:.3f}"/>'
        for x0, y0, x1, y1 in row["boxes"]
    )
    value = float(row.get(score, row["contains"]))
    kind, sign = ("right", "✓") if value >= 0.5 else ("wrong", "✗")
    share = row["kept"] / max(row["visual"], 1)
    return (
        f"<figure{_marks(run)}>"
        f'<svg viewBox="0 0 {width} {height}" data-cells="{row["cells"]}"{known}>'
        f'<use href="#{picture}" width="{width}" height="{height}"/>'
        f'<path class="dropped" d="{dropped(row["cells"], width, height)}"/>{boxes}</svg>'
        f"<figcaption><b>{escape(run.label)}</b> "
        f'<span class="faint">{row["kept"]} of {row["visual"]} ({share:.1%})</span><br>'
        f'<span class="{kind}">{sign} {escape(row["reply"])}</span></figcaption></figure>'
    )


def dropped(cells: str, width: int, height: int) -> str:
    """An SVG path around the cells that were not kept: a rectangle for every run of a row."""
    kept = f"{int(cells, 16):0{4 * len(cells)}b}"
    path = []
    for y in range(height):
        row, x = kept[y * width : (y + 1) * width], 0
        while x < width:
            run = len(row[x:]) - len(row[x:].lstrip(row[x]))
            if row[x] == "0":
                path.append(f"M{x} {y}h{run}v1h-{run}z")
            x += run
    return "".join(path)
