"""results/: every measured variant as CSV and JSON, and the figure. Reads what run.py measured."""

import csv
import json
from pathlib import Path
from typing import Any

import answers
from pictures import KINDS, LEARNED, Task

Row = dict[str, Any]
COLUMNS = ["name", "budget", "rule", "neurons", "mass", "tuned", "visual", "total"]
COLUMNS += [f"{task}{end}" for task in ("easy", "digits") for end in ("", "_low", "_high")]
COLUMNS += ["below_dense", "below_dense_low", "below_dense_high", *KINDS, "plan"]


def rows(measured: Path, test: dict[str, Task]) -> list[Row]:
    """One row a variant: percent right with 95 % intervals, and how far the mean of both tasks is
    below the dense reader's (the equally long trained one's, for a fine-tuned variant)."""
    found = {}
    for path in sorted(measured.glob("*.json")):
        one = json.loads(path.read_text())
        found[one["name"]] = one
    made = []
    for one in found.values():
        right = one.pop("right")
        one |= answers.by_kind(right["digits"], test["digits"])
        right["digits"] = learned(right["digits"], test["digits"])
        for task, marks in right.items():
            one[task] = answers.accuracy(marks)
            one[f"{task}_low"], one[f"{task}_high"] = answers.interval(marks)
        one["right"] = right
        made.append(one)
    for one in made:
        reference = found.get("dense-tuned" if one["tuned"] else "dense")
        if reference is not None:
            loss = answers.mean_loss(one["right"], reference["right"])
            one["below_dense"], one["below_dense_low"], one["below_dense_high"] = loss
    for one in made:
        del one["right"]
    order = {"dense": 0, "hand": 1, "search": 2, "random": 3}
    made.sort(key=lambda r: (-r["budget"], order.get(r["rule"], 4), r["name"]))
    return made


def learned(right: list[list[bool]], task: Task) -> list[list[bool]]:
    """Of each picture the questions of the kinds that are studied."""
    return [
        [mark for (kind, _, _), mark in zip(about, marks, strict=True) if kind in LEARNED]
        for about, marks in zip(task.turns, right, strict=True)
    ]


def write_report(measured: Path, results: Path, test: dict[str, Task]) -> list[Row]:
    made = rows(measured, test)
    results.mkdir(parents=True, exist_ok=True)
    tidy = [{k: _rounded(row.get(k, "")) for k in COLUMNS} for row in made]
    (results / "quality.json").write_text(json.dumps(tidy, indent=1) + "\n")
    with open(results / "quality.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(tidy)
    (results / "quality.md").write_text(table(made) + "\n" + targets(made))
    draw(made, results / "quality.png")
    return made


def _rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


_ORDER = ["dense", "hand", "search", "random", "FastV", "VTW", "random after layer"]


def table(made: list[Row]) -> str:
    """The table of the README, in Markdown: a row a variant, the budgets beside one another."""
    budgets = sorted({row["budget"] for row in made if row["rule"] != "dense"}, reverse=True)
    lines = [
        "| plan or rival | mass | fine-tuned | " + " | ".join(f"{b} %" for b in budgets) + " |",
        "|---|---|---|" + "---|" * len(budgets),
    ]

    def cell(row: Row | None) -> str:
        if row is None:
            return "–"
        reach = f"{row['digits_low']:.1f}–{row['digits_high']:.1f}"
        return f"{row['easy']:.1f} · **{row['digits']:.1f}** ({reach}) at {row['visual']:.1f}"

    def kind(row: Row) -> tuple[Any, ...]:
        place = _ORDER.index(row["rule"]) if row["rule"] in _ORDER else len(_ORDER)
        tokens = row["rule"] == "random" and not row["neurons"]
        first, seed = row["neurons"] == "first", row.get("seed", 0)
        return place + 9 * tokens, row["tuned"], first, row["rule"], seed, row["mass"]

    for one in sorted({kind(row) for row in made}):
        alike = [row for row in made if kind(row) == one]
        row = alike[0]
        what = row["rule"] + (", first neurons" if row["neurons"] == "first" else "")
        if row["rule"] == "random":
            what = f"random heads {row['seed']}" if row["neurons"] else "random tokens"
        if row["rule"] == "dense":
            cells = [cell(row)] + [""] * (len(budgets) - 1)
        else:
            cells = [cell(next((r for r in alike if r["budget"] == b), None)) for b in budgets]
        tuned = "yes" if row["tuned"] else "no"
        lines.append(f"| {what} | {row['mass'] or '–'} | {tuned} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def targets(made: list[Row]) -> str:
    """What was hoped for, and what came out, on the mean of both tasks; in Markdown."""

    def mean(**wanted: Any) -> float | None:
        for row in made:
            if all(row.get(k) == v for k, v in wanted.items()):
                return (row["easy"] + row["digits"]) / 2
        return None

    lines = ["| hoped for | came out |", "|---|---|"]
    dense = mean(name="dense-tuned")
    for budget, points in ((25, 1), (12, 2)):
        for rule in ("hand", "search"):
            for mass in ("exact", "drop", "calibrated"):
                ours = mean(budget=budget, rule=rule, mass=mass, neurons="ranked", tuned=True)
                if ours is not None and dense is not None:
                    met = "met" if dense - ours <= points else "missed"
                    what = f"{budget} %, {rule}, {mass}, fine-tuned: within {points} of dense"
                    lines.append(f"| {what} | {met}: {dense - ours:.2f} points below |")
    for budget in (50, 25, 12):
        plain = {"budget": budget, "rule": "hand", "neurons": "ranked", "tuned": False}
        exact, drop, ours = (mean(**plain, mass=m) for m in ("exact", "drop", "calibrated"))
        for mass in ("calibrated", "fitted"):
            reached = mean(**plain, mass=mass)
            if None not in (exact, drop, reached):
                gap, closed = exact - drop, reached - drop
                met = "no gap to close" if gap <= 0 else "met" if closed >= gap / 2 else "missed"
                what = f"{budget} %: {mass} closes half the gap between drop and exact"
                lines.append(f"| {what} | {met}: {closed:.2f} of {gap:.2f} points |")
        found = mean(**plain | {"rule": "search"}, mass="calibrated")
        if found is not None and ours is not None:
            met = "met" if found >= ours else "missed"
            what = f"{budget} %: search no worse than the plan made by hand (calibrated)"
            lines.append(f"| {what} | {met}: {found:.2f} against {ours:.2f} |")
    return "\n".join(lines) + "\n"


# (label, colour, marker, line style, which rows)
_SERIES = [
    *(
        (
            f"hand, {mass}, {'fine-tuned' if tuned else 'as it is'}",
            {"exact": "tab:blue", "drop": "tab:orange", "calibrated": "tab:green"}[mass],
            "o" if tuned else "x",
            "-" if tuned else "--",
            {"rule": "hand", "neurons": "ranked", "mass": mass, "tuned": tuned},
        )
        for mass in ("exact", "drop", "calibrated")
        for tuned in (True, False)
    ),
    ("hand, fitted", "lime", "x", "--",
     {"rule": "hand", "neurons": "ranked", "mass": "fitted"}),
    ("search, fitted", "tab:pink", "x", "--", {"rule": "search", "mass": "fitted"}),
    ("search, calibrated", "tab:red", "x", "--",
     {"rule": "search", "neurons": "ranked", "mass": "calibrated", "tuned": False}),
    ("search, drop, fine-tuned", "tab:red", "o", "-",
     {"rule": "search", "mass": "drop", "tuned": True}),
    ("FastV", "tab:purple", "^", ":", {"rule": "FastV"}),
    ("VTW", "tab:brown", "v", ":", {"rule": "VTW"}),
    ("random tokens", "tab:gray", "s", ":", {"rule": "random", "neurons": ""}),
]  # fmt: skip


def draw(made: list[Row], path: Path) -> None:
    """Accuracy against visual FLOPs, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(14, 5.5), sharex=True)
    for axes, task in zip(panels, ("easy", "digits"), strict=True):
        for label, colour, marker, style, wanted in _SERIES:
            chosen = [r for r in made if all(r.get(k) == v for k, v in wanted.items())]
            chosen.sort(key=lambda r: r["visual"])
            if not chosen:
                continue
            values = [r[task] for r in chosen]
            reach = [
                [r[task] - r[f"{task}_low"] for r in chosen],
                [r[f"{task}_high"] - r[task] for r in chosen],
            ]
            at = [r["visual"] for r in chosen]
            axes.errorbar(
                at, values, reach, label=label, color=colour, marker=marker, linestyle=style,
                capsize=2, linewidth=1.2, markersize=5,
            )  # fmt: skip
        for row in made:
            if row["rule"] == "dense":
                label = "dense, trained on" if row["tuned"] else "dense"
                style = "-" if row["tuned"] else "--"
                axes.axhline(row[task], color="black", linestyle=style, linewidth=0.8, label=label)
        axes.set_title({"easy": "easy-VQA", "digits": "digits"}[task])
        axes.set_xlabel("visual FLOPs, % of dense")
        axes.set_ylabel("right answers, %")
        axes.grid(alpha=0.3)
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    figure.legend(*panels[1].get_legend_handles_labels(), fontsize=8, loc="center right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
