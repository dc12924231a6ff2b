"""tokenizer.json: the added tokens, as far as the engine looks at them."""

from pathlib import Path
from typing import Any

from nanoglimpse.config.schema import Schema, anything, ignore, read_json, text, truth, whole
from nanoglimpse.errors import NanoglimpseError

_ADDED = Schema({"id": whole(0, 2**31 - 1), "special": truth(), "content": text()}, unknown=ignore)
_TOKENIZER = Schema({"added_tokens": anything(())}, unknown=ignore)


def read_tokenizer(path: Path) -> tuple[dict[str, Any], frozenset[int]]:
    """The content of tokenizer.json with all added tokens special, and the ids of those that were.

    Raises:
        NanoglimpseError: the file is broken, or an added token is none.
    """
    data = read_json(path)
    added = _TOKENIZER.read(data, str(path))["added_tokens"]
    if not isinstance(added, list | tuple) or not all(isinstance(token, dict) for token in added):
        raise NanoglimpseError(f"{path}: added_tokens must be a list of objects")
    read = [_ADDED.read(token, f"{path} (added_tokens)") for token in added]
    control = frozenset(token["id"] for token in read if token["special"])
    return data | {"added_tokens": [{**token, "special": True} for token in added]}, control
