"""The table of a run: Markdown made of its rows, a part for each step. Nothing is computed here but
what is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

# What became of a row. Only FAILED makes the run a failed one.
OK, FAILED, ABSENT, SKIPPED = "ok", "failed", "not there yet", "not run"

TITLES = {
    "right": "1 · Right",
    "rates": "2 · The roofline",
    "fast": "2 · Fast",
    "why": "3 · Why",
    "scaling": "4 · Scaling",
    "compiled": "2 · Fast, against torch.compile",
}


def markdown(head: Row, rows: Sequence[Row]) -> str:
    """`head`: which machine, and when."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in head.items())]
    for step, title in TITLES.items():
        mine = [row for row in rows if row["step"] == step]
        if mine:
            parts += [f"## {title}", *_parts(mine)]
    return "\n\n".join(["# GPU check", *parts]) + "\n"


def _parts(rows: Sequence[Row]) -> list[str]:
    """The tables of one step, one after the other: those of what was raced under their heading."""
    others = [row for row in rows if "model" not in row]
    parts = []
    for columns, kind in ((CHECKS, "arm"), (PHASES, None)):
        mine = [row for row in others if ("arm" in row) == (kind is None)]
        if mine:
            parts.append(_table(columns, mine))
    raced = [row for row in rows if "model" in row]
    for race, mine in groupby(raced, key=_race):
        known = list(mine)
        here = [row for row in known if row["status"] != ABSENT]
        parts += [f"**{race}**", _table(ARMS, here)]
        if len(here) < len(known):
            absent = "; ".join(row["what"] for row in known if row["status"] == ABSENT)
            parts.append(f"{ABSENT}: {absent}".capitalize())
    return parts


def _race(row: Row) -> str:
    return f"{row['model']}, batch {row['batch']}, images {row['images']}"


def _table(columns: Columns, rows: Sequence[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[_cell(column(row)) for column in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(name: str, spec: str, unit: float = 1) -> Callable[[Row], str]:
    """A column that shows the figure of that name, nothing where there is none."""
    return lambda row: "" if row.get(name) is None else format(row[name] / unit, spec)


def _span(name: str) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        if row.get(f"{name}_ms") is None:
            return ""
        low, high = row[f"{name}_spread_ms"]
        return f"{row[f'{name}_ms']:.2f} ({low:.2f}–{high:.2f})"

    return shown


def _share(part: str, whole: str) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        known = row.get(part) is not None and row.get(whole)
        return f"{row[part] / row[whole]:.0%}" if known else ""

    return shown


def _status(row: Row) -> str:
    told = row.get("error") or row.get("note")
    if told is None:
        return "" if row["status"] == OK else row["status"]
    return f"{row['status']}: {told}"


def _found(row: Row) -> str:
    if "product_flops_s" not in row:
        return _number("worst", ".3g")(row)
    product, copy = row["product_flops_s"] / 1e12, row["copy_bytes_s"] / 1e9
    return f"product {product:.1f} TFLOP/s, copy {copy:.0f} GB/s"


def _kinds(row: Row) -> str:
    return ", ".join(f"{kind} {ms:.2f}" for kind, ms in row.get("by_kind_ms", {}).items())


MIB = 2**20
CHECKS: Columns = {
    "check": lambda row: row["what"],
    "found": _found,
    "allowed": _number("allowed", "g"),
    "result": lambda row: _status(row) or OK,
}
PHASES: Columns = {
    "arm": lambda row: row["arm"],
    "phase": lambda row: row.get("phase", ""),
    "kernels": _number("kernels", ".0f"),
    "a layer": _number("kernels_per_layer", ".1f"),
    "took, ms": _number("wall_ms", ".2f"),
    "device busy, ms": _number("busy_ms", ".2f"),
    "idle": _number("idle_share", ".0%"),
    "busy by kind, ms": _kinds,
    "": _status,
}
ARMS: Columns = {
    "arm": lambda row: row["what"],
    "prefill, ms (min–max)": _span("prefill"),
    "× stock": _number("prefill_ratio", ".2f"),
    "of the roofline": _share("prefill_floor_ms", "prefill_ms"),
    "decode step, ms (min–max)": _span("decode"),
    "× stock ": _number("decode_ratio", ".2f"),
    "of the roofline ": _share("decode_floor_ms", "decode_ms"),
    "whole answer, ms": _number("answer_ms", ".0f"),
    "× stock  ": _number("answer_ratio", ".2f"),
    "peak, MiB": _number("peak_bytes", ".4g", MIB),
    "KV, MiB": _number("kv_bytes", ".4g", MIB),
    "": _status,
}
