"""The errors that a user can meet; each message is one line: what, where and what to do."""


class NanoglimpseError(Exception):
    """Something failed that the caller could not have known; the command line exits with 1."""

    exit_code = 1


class UsageError(NanoglimpseError, ValueError):
    """What was asked for cannot be done as asked; the command line exits with 2."""

    exit_code = 2


def one_line(text: object, limit: int = 400) -> str:
    """Text as one line that can be printed: no control characters, cut in the middle if too long.

    The end is kept as well as the beginning, since advice stands there.
    """
    words = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "\ufffd" for c in words)
    if len(line) <= limit:
        return line
    end = limit // 3
    return f"{line[: limit - end - 3]} … {line[-end:]}"
