from __future__ import annotations

from pathlib import Path

import pytest
from small_plans import KEEP

from yopo.plan import head_mask


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOPO_MASS", raising=False)


@pytest.fixture
def mask_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mask that small_plans.RELEASED names, in a folder that is searched."""
    monkeypatch.setenv("YOPO_HEADMASK_DIR", str(tmp_path / "masks"))
    return head_mask.save(tmp_path / "masks" / "headmask_test_3.npy", KEEP)
