"""The parts of bench.py, which stands at the top of a checkout and needs one."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
