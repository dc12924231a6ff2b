"""The parts of bench.py, which runs in a checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
