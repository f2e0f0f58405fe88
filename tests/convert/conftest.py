"""What every test of convert has: the repository as the working directory, a source to convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_llava
from conversions import ROOT, TINY, convert


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded checkpoints name their vision tower relative to it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dense") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return convert(TINY / "tiny-llava-v1-dense", target)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return random_llava.make(tmp_path)
