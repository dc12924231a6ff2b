"""What goes to stdout: tables and lines in one of three forms, and one JSON object at the end."""

import csv
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

FORMS = ("md", "csv", "json")
# A number, a word, or nothing.
Cell = str | float | int | None


class Output:
    """Writes tables and lines as they come.

    Args:
        form: "md" for Markdown; "csv", whose other lines begin with #; or "json", where every line
            is an object: {"table", "columns", "rows"} or {"note"}.
    """

    def __init__(self, form: str):
        self.form = form

    def note(self, line: str) -> None:
        """A line of text."""
        if self.form == "json":
            _line(json.dumps({"note": line}))
        else:
            _line(f"\n{line}" if self.form == "md" else f"# {line}")

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table; md rounds its numbers, csv and json have six digits of them."""
        if self.form == "md":
            self.note(title)
            _line("\n" + "\n".join(_markdown(head, rows)))
            return
        digits = [[_six(cell) for cell in row] for row in rows]
        if self.form == "json":
            _line(json.dumps({"table": title, "columns": list(head), "rows": digits}))
            return
        self.note(title)
        csv.writer(sys.stdout, lineterminator="\n").writerows([head, *digits])
        sys.stdout.flush()

    def end(self, summary: dict[str, Any]) -> None:
        """The last line: one JSON object, in every form."""
        if self.form == "md":
            _line("")
        _line(json.dumps(summary))


def _line(text: str) -> None:
    print(text, flush=True)


def _six(cell: Cell) -> Cell:
    return float(f"{cell:.6g}") if isinstance(cell, float) else cell


def shown(value: float, digits: int = 3) -> str:
    """A number with so many digits, or more if they stand before the point."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Lines of a table whose columns are as wide as they need to be; the first is left-aligned."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(head, *cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (list(head), rule, *cells):
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return shown(cell) if isinstance(cell, float) else str(cell)
