"""No pruning."""

from .base import Method


class Dense(Method):
    """Keeps every visual token."""

    name = "dense"
    about = "keeps every visual token"
    capped = False
    fixed = True
