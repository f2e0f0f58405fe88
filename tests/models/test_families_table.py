"""The table of families in docs/families.md says what tests recorded, and what tests there are."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import families_table  # noqa: E402


def test_the_page_has_the_table_of_the_records() -> None:
    assert families_table.table() in (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def test_records_have_a_cell_for_each_marked_feature_and_no_other() -> None:
    marked = set()
    for file in ROOT.glob("tests/models/test_families*.py"):
        marked |= set(re.findall(r'mark\.feature\("([^"]+)"\)', file.read_text(encoding="utf-8")))
    assert len(marked) > 10
    for record in sorted(families_table.RECORDS.glob("*.json")):
        for kind, cells in json.loads(record.read_text(encoding="utf-8")).items():
            assert cells.keys() == marked, (record.name, kind)


@pytest.mark.parametrize(
    ("outcomes", "cell"),
    [
        (["passed", "passed"], "✓"),
        (["passed", "not run: no such thing"], "✓ (1)"),
        (["passed", "failed"], "✗ (1)"),
        (["not run: a", "not run: b"], "– (1) (2)"),
    ],
)
def test_a_cell_claims_no_more_than_was_run(outcomes: list[str], cell: str) -> None:
    records = {f"{i}.0": {"kind": {"feature": what}} for i, what in enumerate(outcomes)}
    assert families_table._cell(records, "kind", "feature", {}) == cell
