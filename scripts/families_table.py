"""Prints the table of families in docs/families.md from what tests/support/matrix.py recorded.

For each version:
YOPO_MATRIX=tests/feature_records python -m pytest -q tests/models/test_families*.py
Then: python scripts/families_table.py
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from packaging.version import Version

RECORDS = Path(__file__).resolve().parents[1] / "tests" / "feature_records"

Records = dict[str, dict[str, dict[str, str]]]  # version → kind → feature → what came of it


def main() -> None:
    print(table(), end="")


def table() -> str:
    """The table and its notes, as they stand in docs/families.md."""
    found: Records = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RECORDS.glob("*.json")
    }
    records = {version: found[version] for version in sorted(found, key=Version)}
    kinds = sorted({kind for cells in records.values() for kind in cells})
    features = {f for cells in records.values() for marks in cells.values() for f in marks}
    notes: dict[str, int] = {}
    first = [next(version for version in records if kind in records[version]) for kind in kinds]
    lines = [
        "| | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
        "| first version run | " + " | ".join(first) + " |",
    ]
    for feature in sorted(features, key=str.lower):
        cells = [_cell(records, kind, feature, notes) for kind in kinds]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    versions = f"Run with transformers {', '.join(records)}. ✓: passes on all of these that have "
    lines += ["", *textwrap.wrap(f"{versions}the family, but for those in the notes.", 100), ""]
    lines += [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join(lines) + "\n"


def _cell(records: Records, kind: str, feature: str, notes: dict[str, int]) -> str:
    outcomes = {
        v: cells[kind].get(feature, "no test") for v, cells in records.items() if kind in cells
    }
    others = [f"{version}: {what}" for version, what in outcomes.items() if what != "passed"]
    marks = [f"({notes.setdefault(text, len(notes) + 1)})" for text in others]
    broken = "failed" in outcomes.values()
    passed = "✓" if len(others) < len(outcomes) else "–"
    return " ".join(["✗" if broken else passed, *marks])


if __name__ == "__main__":
    main()
