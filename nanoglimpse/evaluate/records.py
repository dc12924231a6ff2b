"""What the lines of a file of results may hold: the kind of every field that is read later.

A file may be damaged, cut, written by another version or by somebody else. Whatever passes here
can be summed up, drawn and printed; of anything else the first field that is wrong is named.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
# Larger numbers would overflow when they are added up.
LARGEST = 1e30
URI = re.compile(r"data:image/(jpeg|png|gif|webp);base64,[A-Za-z0-9+/]*={0,2}")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST and not math.isnan(value)


def _amount(value: Any) -> bool:
    return _number(value) and value >= 0


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and _amount(value)


def _hex(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]*", value) is not None


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check, count: int | None = None) -> Check:
    def of(value: Any) -> bool:
        known = isinstance(value, list | tuple) and (count is None or len(value) == count)
        return known and all(map(check, value))

    return of


def _table(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


REQUIRED: Mapping[str, Check] = {
    **dict.fromkeys(("question", "arm", "method", "group", "asked", "wanted", "reply"), _text),
    "ratio": _maybe(_share),
    "brief": _flag,
    "contains": _share,
    "visual": _whole,
    "kept": _whole,
    "recall": _maybe(_share),
    "flops": _table(_maybe(_amount)),
    "ms": _table(_maybe(_amount)),
}
OPTIONAL: Mapping[str, Check] = {
    "kind": _text,
    "outside": _flag,
    "stop": _maybe(_whole),
    **dict.fromkeys(("exact", "anls", "f1", "iou"), _maybe(_share)),
    **dict.fromkeys(("input", "prefill", "decode_kv"), _maybe(_amount)),
    **dict.fromkeys(("kv_rows", "kv_bytes", "tokens", "peak_bytes"), _maybe(_amount)),
}
GALLERY: Mapping[str, Check] = {
    "grid": _list(_whole, 2),
    "boxes": _list(_list(_number, 4)),
    "cells": _hex,
    "importance": _maybe(_hex),
}
PICTURE: Mapping[str, Check] = {
    "picture": _text,
    "uri": lambda value: isinstance(value, str) and URI.fullmatch(value) is not None,
}
VERDICT: Mapping[str, Check] = {
    **dict.fromkeys(("verdict", "arm", "question", "said"), _text),
    "score": _share,
    "understood": _flag,
}
MISSING: Mapping[str, Check] = {"missing": _list(_text)}
ERROR: Mapping[str, Check] = {"error": _text, "question": _text}


def wrong(record: Any) -> str:
    """What is wrong with a record, by the name of the field; "" if nothing is."""
    if not isinstance(record, dict):
        return "not an object"
    for known in (PICTURE, VERDICT, MISSING, ERROR):
        if next(iter(known)) in record:
            return _wrong(record, known, {})
    gallery: Mapping[str, Check] = GALLERY if "cells" in record else {}
    first = _wrong(record, {**REQUIRED, **gallery}, OPTIONAL)
    if first or record["kept"] > record["visual"]:
        return first or f"kept is {record['kept']} of visual {record['visual']}"
    return _wrong_size(record) if gallery else ""


def _wrong(record: dict, needed: Mapping[str, Check], allowed: Mapping[str, Check]) -> str:
    for name, check in needed.items():
        if name not in record:
            return f"{name} is missing"
        if not check(record[name]):
            return f"{name} is {_shown(record[name])}"
    for name, check in allowed.items():
        if name in record and not check(record[name]):
            return f"{name} is {_shown(record[name])}"
    return ""


def _wrong_size(record: dict) -> str:
    """Whether cells and importance are as many as the grid has; the first are padded to bytes."""
    rows, columns = record["grid"]
    count, importance = rows * columns, record["importance"]
    if not count or len(record["cells"]) != 2 * -(-count // 8):
        return f"cells are not those of a grid of {rows} × {columns}"
    if importance is not None and len(importance) != 2 * count:
        return f"importance is not that of a grid of {rows} × {columns}"
    return ""


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}…"
