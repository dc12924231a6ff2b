"""Annotations are checked: `python -m tests.helpers.check_types`."""

import pytest

from tests.helpers.check_types import errors


@pytest.mark.slow
def test_annotations_hold():
    assert not errors()
