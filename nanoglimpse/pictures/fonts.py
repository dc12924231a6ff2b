"""Fonts that have the letters of a text: that of Pillow, one that is named, or an installed one."""

import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from nanoglimpse.errors import UsageError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# A code point that no font has: it is drawn as letters that are missing are.
MISSING = "\U0010ffff"
SIZE = 20


def find_font(text: str, size: int, named: Path | None = None) -> Font | None:
    """A font that has all letters of a text, or None.

    Args:
        text: what is to be drawn.
        size: of the letters in px.
        named: the font to use, if it has them; otherwise Pillow's own or an installed one.

    Raises:
        UsageError: `named` is no font.
    """
    letters = frozenset(letter for letter in text if not letter.isspace())
    if named is not None:
        check_font(named)
        return _opened(str(named), size) if _covers(str(named), letters) else None
    file = _file_for(letters)
    return None if file is None else _opened(file, size)


def check_font(path: Path) -> None:
    """Refuses a file that is no font.

    Raises:
        UsageError: there is no such file, or it cannot be read as a font.
    """
    try:
        ImageFont.truetype(str(path), SIZE)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a font (TTF, OTF, TTC): {error}") from None


@lru_cache(64)
def _file_for(letters: frozenset[str]) -> str | None:
    """The font for letters, "" for Pillow's own, or None."""
    return next((file for file in ("", *_installed()) if _covers(file, letters)), None)


def _opened(file: str, size: int) -> Font:
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def _covers(file: str, letters: frozenset[str]) -> bool:
    """Whether a font draws every letter, and not as what it draws for a letter that it lacks."""
    try:
        font = _opened(file, SIZE)
        lacking = _drawn(font, MISSING)
        return all(_drawn(font, letter) != lacking for letter in letters)
    except (OSError, ValueError):  # as a font of bitmaps in other sizes
        return False


def _drawn(font: Font, letter: str) -> tuple[object, ...]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


@lru_cache(1)
def _installed() -> tuple[str, ...]:
    """Font files of the system and of the user, plain faces without serifs first."""
    found = {file for folder in _folders() for file in _fonts_below(folder)}
    return tuple(sorted(found, key=_preference))


def _preference(file: str) -> tuple[bool, bool, bool, str]:
    name = Path(file).stem.lower()
    styled = any(word in name for word in ("bold", "italic", "oblique", "light", "thin", "black"))
    return styled, "mono" in name, "serif" in name.replace("sansserif", ""), name


def _fonts_below(folder: Path) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith((".ttf", ".otf", ".ttc")):
                yield os.path.join(root, name)


def _folders() -> list[Path]:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", home)) / "Microsoft/Windows/Fonts"
        return [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts", local]
    data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    return [*(Path(part) / "fonts" for part in data.split(":")), own / "fonts", home / ".fonts"]
