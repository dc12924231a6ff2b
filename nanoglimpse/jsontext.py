"""Parses JSON from any source: bounded in depth, without doubled keys, valid Unicode only."""

import json
import re
from typing import Any, NoReturn

MAX_DEPTH = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, halves: bool = False) -> Any:
    """The value that a text holds.

    Stricter than `json.loads`, which accepts NaN, keeps the last of two equal keys, and returns
    text that cannot be printed or values so deep that whoever walks through them fails.

    Args:
        text: of one value.
        halves: accept halves of surrogate pairs, by which Python names files that are not UTF-8.

    Raises:
        ValueError: the text is not JSON; the message says why in a few words.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if not halves and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is not Unicode") from None
    return value


def _children(node: Any) -> list[Any]:
    """The containers in a container."""
    if isinstance(node, dict):
        node = node.values()
    elif not isinstance(node, list):
        return []
    return [child for child in node if isinstance(child, dict | list)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"key {double[:60]!r} stands twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
