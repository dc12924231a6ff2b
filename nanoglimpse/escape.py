"""Text that others wrote, in what we write: one function for each place where characters act.

Names of files and models, questions, answers and replies of servers may hold anything. A terminal
obeys control characters, a page obeys markup, a spreadsheet evaluates a cell that begins with "=",
and lone surrogates, which stand for bytes that are not UTF-8, cannot be encoded at all.
"""

import re
from html import escape
from typing import Any

# Controls other than the tab and the end of a line, controls of the direction of writing, lone
# surrogates, and the code points that are no characters.
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
_LOGIN = re.compile(r"(?<=://)[^/?#\s]*(?=@)")
_SECRET = re.compile(
    r"([?&;][^=&;\s]*(?:key|token|secret|password|signature)[^=&;\s]*=)[^&;\s#]+", re.IGNORECASE
)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
HIDDEN = "***"


def terminal(text: str) -> str:
    """Text for a terminal: controls and lone surrogates as the escapes of Python."""
    return _ACTIVE.sub(lambda found: ascii(found[0])[1:-1], text)


def html(value: Any) -> str:
    """A value as text of an HTML page, or as an attribute of it in quotes."""
    return escape(_ACTIVE.sub("\ufffd", str(value)))


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula; numbers stay as they are."""
    if not isinstance(value, str):
        return value
    clean = "".join(one if not "\ud800" <= one <= "\udfff" else "\ufffd" for one in value)
    return f"'{clean}" if clean.startswith(FORMULA) else clean


def markdown(value: Any) -> str:
    """A value as one line of Markdown: it ends no cell of a table and begins no HTML."""
    line = terminal(" ".join(str(value).split()))
    return re.sub(r"[\\|<]", r"\\\g<0>", line)


def masked(text: str) -> str:
    """Text without what gives access in the addresses that it holds: logins and keys."""
    return _SECRET.sub(rf"\1{HIDDEN}", _LOGIN.sub(HIDDEN, text))
