"""What README.md shows in Python runs as it stands."""

import re
from pathlib import Path

import pytest

from nanoglimpse.methods import METHODS

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights").symlink_to(ROOT / "weights")  # what they write does not stay
    monkeypatch.chdir(tmp_path)
    before = set(METHODS)
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {"__name__": "readme"})
    for name in METHODS.keys() - before:
        METHODS.pop(name)
    assert "The " in capsys.readouterr().out


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
