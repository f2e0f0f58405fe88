"""What comes out of a run: rows, each written as a JSON line the moment it is known, and the table
made of them. What a row holds is its step's business; how it looks is tables.py's."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_steps.tables import FAILED, OK, markdown
from yopo.bench.memory import is_out_of_memory

TIME_IS_UP = "time is up"

Row = dict[str, Any]


class Journal:
    """`folder`/results.jsonl and `folder`/table.md; `head` is the first line: which machine."""

    def __init__(self, folder: Path, **head: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._head = head
        self._rows: list[Row] = []
        self._lines = folder / "results.jsonl"
        self._lines.write_text(json.dumps({"step": "machine", **head}) + "\n", encoding="utf-8")
        self.write_table()

    @property
    def failed(self) -> bool:
        return any(row["status"] == FAILED for row in self._rows)

    def add(self, step: str, what: str, status: str = OK, **figures: Any) -> None:
        row = {"step": step, "what": what, "status": status, **figures}
        self._rows.append(row)
        with self._lines.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        told = filter(None, (status, figures.get("error"), figures.get("note")))
        print(step, what, *told, sep=": ", flush=True)

    def attempt(self, step: str, what: str, work: Callable[[], Row]) -> None:
        """Adds the row of `work`'s figures, its "status" among them, or of its error."""
        try:
            figures = work()
        except Exception as error:
            self.add(step, what, FAILED, error=words(error))
        else:
            self.add(step, what, **figures)

    def write_table(self) -> None:
        (self.folder / "table.md").write_text(markdown(self._head, self._rows), encoding="utf-8")


def words(error: BaseException) -> str:
    """An error in one line, and all of it on stderr."""
    traceback.print_exception(error, file=sys.stderr)
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
