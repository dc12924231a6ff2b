"""Annotations are checked: `python -m tests.helpers.check_types`."""

import pytest

from tests.helpers.check_types import RATCHET, errors, room


@pytest.mark.slow
def test_no_room_has_more_errors_than_it_had():
    found = errors()
    over = [error for error in found if not RATCHET.get(room(error))]
    assert not over, "\n".join(over)
    for name, limit in RATCHET.items():
        assert sum(room(error) == name for error in found) <= limit, name
