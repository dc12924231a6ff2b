"""The errors that a user can meet; each message is one line: what, where and what to do."""


class NanoglimpseError(Exception):
    """Something failed that the caller could not have known; the command line exits with 1."""

    exit_code = 1


class UsageError(NanoglimpseError, ValueError):
    """What was asked for cannot be done as asked; the command line exits with 2."""

    exit_code = 2
