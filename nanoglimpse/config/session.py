"""The JSON in the header of a session file."""

from collections.abc import Collection
from typing import Any

from nanoglimpse.config.model import ANCHORS
from nanoglimpse.config.schema import Schema, anything, choice, many, real, text, truth, whole
from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.jsontext import parse_json

_AREA = whole(1, 2**40, None)
_SESSION = {
    "method": text(longest=100),
    "rule": anything(),
    "prune_videos": truth(),
    "seed": whole(-(2**63), 2**64 - 1),
    "system": text(),
    "min_pixels": _AREA,
    "max_pixels": _AREA,
    "turns": many(many(text(), 2, 2), 0, 2**16),
    "grids": many(many(whole(1, 2**16), 3, 3), 0, 2**16),
}
_RULE = Schema(
    {
        "threshold": real(0, 1),
        "max_ratio": real(0, 1, None),
        "max_frame_ratio": real(0, 1, None),
        "min_tokens": whole(0, 2**31 - 1, None),
        "anchors": many(choice(*ANCHORS), 0, len(ANCHORS)),
    }
)


def read_session_header(told: str, where: str, kv_drops: Collection[str]) -> dict[str, Any]:
    """The settings of a session.

    Args:
        told: the text in the header.
        where: names the file in errors.
        kv_drops: what `kv_drop` may be.

    Raises:
        NanoglimpseError: a key is missing, unknown, of another kind, or outside its range.
    """
    try:
        data = parse_json(told)
    except ValueError as error:
        raise NanoglimpseError(f"{where} is not a session or is corrupt ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("rule"), dict):
        raise NanoglimpseError(f"{where} is not a session or is corrupt")
    found = Schema(_SESSION | {"kv_drop": choice(*kv_drops)}).read(data, where)
    for name in ("turns", "grids"):
        found[name] = tuple(tuple(item) for item in found[name])
    return found | {"rule": _RULE.read(data["rule"], f"{where} (rule)")}
