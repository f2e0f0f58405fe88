"""A pytest plugin: which features hold for which family on the transformers at hand.

`YOPO_MATRIX=FOLDER pytest tests` writes FOLDER/<version>.json; scripts/families_table.py makes of
these the table in docs/families.md. A cell is what the tests with @pytest.mark.feature(name) and a
parameter `kind` came to: "passed" if one passed and none failed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

_cells: dict[str, dict[str, list[str]]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = (yield).get_result()
    mark = item.get_closest_marker("feature")
    kind = getattr(item, "callspec", None) and item.callspec.params.get("kind")
    if mark is None or not kind or (report.when != "call" and report.passed):
        return
    found = report.outcome
    if report.skipped and isinstance(report.longrepr, tuple):
        found = f"not run: {report.longrepr[2].removeprefix('Skipped: ')}"
    _cells.setdefault(kind.name, {}).setdefault(mark.args[0], []).append(found)


def pytest_sessionfinish() -> None:
    folder = os.environ.get("YOPO_MATRIX")
    if not folder or not _cells:
        return
    path = Path(folder) / f"{transformers.__version__}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for kind, features in _cells.items():
        for feature, outcomes in features.items():
            cells.setdefault(kind, {})[feature] = _cell(outcomes)
    path.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _cell(outcomes: list[str]) -> str:
    if "failed" in outcomes:
        return "failed"
    return "passed" if "passed" in outcomes else outcomes[0]
