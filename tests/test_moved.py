"""Imports of version 0.1 fail with one line that names the new place."""

import importlib
import re
from pathlib import Path

import pytest

from nanoglimpse.moved import MOVED

CHANGES = (Path(__file__).parents[1] / ".github" / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_names_the_new_one(old):
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(f"nanoglimpse.{old}")
    message = str(caught.value)
    places = re.findall(r"nanoglimpse(?:\.\w+)+", message)
    assert places[0] == f"nanoglimpse.{old}"
    assert "\n" not in message
    for place in places[1:]:
        importlib.import_module(place)


@pytest.mark.parametrize("old", MOVED)
def test_the_changelog_has_the_same_table(old):
    new = MOVED[old].replace(" and nanoglimpse.", "`, `")
    assert f"| `{old}` | `{new}` |" in CHANGES


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("from nanoglimpse.processor import Prompt", "from nanoglimpse import Prompt"),
        ("from nanoglimpse.sampling import Sampling", "nanoglimpse.inference.sampling"),
        ("from nanoglimpse.methods import Choice", "Decision"),
        ("from nanoglimpse.methods import METHODS, Look", "PruningContext"),
        ("import nanoglimpse.methods as m; m.Method", "PruningMethod"),
    ],
)
def test_what_users_wrote(statement, named):
    with pytest.raises(ImportError, match=re.escape(named)):
        exec(statement)


def test_other_names_fail_as_always():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'nanoglimpse\.nonsense'"):
        importlib.import_module("nanoglimpse.nonsense")
    assert not hasattr(importlib.import_module("nanoglimpse.methods"), "nonsense")
