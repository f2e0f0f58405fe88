"""The tools that contributors are told to use are those that CI uses."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_ruff_is_the_same_wherever_it_is_pinned() -> None:
    """Two versions of a formatter undo each other's work."""
    files = ("pyproject.toml", ".pre-commit-config.yaml")
    found = [re.findall(r"\bruff==([\d.]+)", (ROOT / file).read_text()) for file in files]
    assert all(found), found
    assert len({version for versions in found for version in versions}) == 1, found
