"""What a JSON file may hold: for every key its kind, its range, its default.

A file is checked against a table before anything is built from it. Tables are made of the functions
below, one call for each key; `Schema` says what an unknown key means.
"""

import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanoglimpse.errors import NanoglimpseError
from nanoglimpse.jsontext import parse_json

# A tokenizer.json has 11 MB.
MAX_BYTES = 64 * 2**20
REQUIRED: Any = object()
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 160


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with or without a byte order mark.

    Raises:
        NanoglimpseError: the file does not exist, is too large, is not JSON, or is not an object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MB")
        data = parse_json(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise NanoglimpseError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise NanoglimpseError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise NanoglimpseError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def shown(value: Any) -> str:
    """A value from a file for a message: in one line, shortened."""
    return _REPR.repr(value)


@dataclass(frozen=True)
class Key:
    """What the value of one key must be.

    Attributes:
        wanted: in words, for messages.
        fits: whether a value is that.
        default: without the key; `REQUIRED` if there must be one.
        null: for null, which stands for the default unless this says otherwise.
        problem: says what is wrong with a value, where `wanted` is not enough.
    """

    wanted: str
    fits: Callable[[Any], bool]
    default: Any = REQUIRED
    null: Any = REQUIRED
    problem: Callable[[str, Any], str] | None = None

    def read(self, name: str, value: Any) -> Any:
        """The value, a list as a tuple.

        Raises:
            ValueError: the value is of another kind, or outside its range.
        """
        if value is None and self.default is not REQUIRED:
            return self.default if self.null is REQUIRED else self.null
        if not self.fits(value):
            if self.problem:
                raise ValueError(self.problem(name, value))
            raise ValueError(f"{name} must be {self.wanted}, got {shown(value)}")
        return tuple(value) if isinstance(value, list) else value


def whole(low: int, high: int, default: Any = REQUIRED, null: Any = REQUIRED) -> Key:
    """A whole number of `low` to `high`; True and 2.0 are none."""
    fits = lambda value: type(value) is int and low <= value <= high  # noqa: E731
    return Key(f"a whole number from {low} to {high}", fits, default, null)


def real(low: float, high: float, default: Any = REQUIRED, null: Any = REQUIRED) -> Key:
    """A number of `low` to `high`; neither NaN nor infinite, since no comparison with NaN holds."""
    fits = lambda value: type(value) in (int, float) and low <= value <= high  # noqa: E731
    return Key(f"a number from {low:g} to {high:g}", fits, default, null)


def truth(default: Any = REQUIRED) -> Key:
    """True or false."""
    return Key("true or false", lambda value: type(value) is bool, default)


def text(default: Any = REQUIRED, longest: int = 2**20) -> Key:
    """A text."""
    fits = lambda value: type(value) is str and len(value) <= longest  # noqa: E731
    return Key(f"text of at most {longest} characters", fits, default)


def choice(*values: Any, default: Any = REQUIRED) -> Key:
    """One of some values."""
    wanted = f"one of {', '.join(map(repr, values))}"
    return Key(wanted, lambda value: any(same(value, one) for one in values), default)


def only(value: Any) -> Key:
    """The one value that is supported, which is also the default."""
    return Key(
        "",
        lambda found: same(found, value),
        value,
        problem=lambda name, found: f"{name} is {shown(found)}; only {value!r} is supported",
    )


def many(item: Key, low: int, high: int, default: Any = REQUIRED) -> Key:
    """A list of `low` to `high` values of one kind."""
    length = str(low) if low == high else f"{low} to {high}"
    fits = lambda value: (  # noqa: E731
        isinstance(value, list | tuple) and low <= len(value) <= high and all(map(item.fits, value))
    )
    return Key(f"a list of {length}, each {item.wanted}", fits, default)


def either(one: Key, other: Key) -> Key:
    """One kind or another, with the default of the first."""
    fits = lambda value: one.fits(value) or other.fits(value)  # noqa: E731
    return replace(one, wanted=f"{one.wanted}, or {other.wanted}", fits=fits)


def mapping(item: Key, high: int, default: Any = REQUIRED) -> Key:
    """An object of at most `high` keys, all with values of one kind."""
    fits = lambda value: (  # noqa: E731
        isinstance(value, dict) and len(value) <= high and all(map(item.fits, value.values()))
    )
    return Key(f"an object of at most {high} keys, each {item.wanted}", fits, default)


def anything(default: Any = REQUIRED) -> Key:
    """Any value; another table reads it."""
    return Key("", lambda value: True, default)


def same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are equal; 1 and true are not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


@dataclass(frozen=True)
class Schema:
    """The keys of one kind of JSON object.

    Attributes:
        keys: what each must be.
        ignored: keys that cannot change what is computed, whatever their value.
        unknown: says what is wrong with a key that is in neither, "" if nothing.
    """

    keys: Mapping[str, Key]
    ignored: Collection[str] = ()
    unknown: Callable[[str, Any], str] = lambda name, value: (
        f"unknown key {shown(name)} (neither used nor ignored)"
    )

    def read(self, data: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The value of every key, defaults included.

        Args:
            data: the content of a file.
            where: names the file in errors.

        Raises:
            NanoglimpseError: a key is missing, unknown, of another kind, or outside its range.
        """
        found = {name: key.default for name, key in self.keys.items()}
        for name, value in data.items():
            if name in self.keys:
                try:
                    found[name] = self.keys[name].read(name, value)
                except ValueError as error:
                    raise NanoglimpseError(f"{where}: {error}") from None
        for name, value in data.items():
            known = name in self.keys or name in self.ignored
            if not known and (problem := self.unknown(name, value)):
                raise NanoglimpseError(f"{where}: {problem}")
        for name, value in found.items():
            if value is REQUIRED:
                raise NanoglimpseError(f"{where}: key '{name}' is missing")
        return found


def words(names: str) -> frozenset[str]:
    """Names of keys, separated by white space."""
    return frozenset(names.split())


def ignore(name: str, value: Any) -> str:
    """For `Schema.unknown`: keys that are not in the table do not count."""
    return ""
