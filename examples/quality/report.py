"""results/: every measured variant as table, CSV, JSON and figure. Reads what run.py measured."""

import csv
import json
from pathlib import Path
from typing import Any

import answers
from pictures import KINDS, LEARNED, Task
from variants import RECIPES, RIVALS, Variant

RULES = ["dense", "search", "hand", *RECIPES, *RIVALS]
Row = dict[str, Any]
COLUMNS = ["name", "budget", "rule", "mass", "tuned", "taught", "visual", "total"]
COLUMNS += [f"{task}{end}" for task in ("easy", "digits") for end in ("", "_low", "_high")]
COLUMNS += ["below_dense", "below_dense_low", "below_dense_high", *KINDS, "products", "plan"]


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
        reference = found.get(Variant("dense", tuned=one["tuned"]).name)
        if reference is not None:
            loss = answers.mean_loss(one["right"], reference["right"])
            one["below_dense"], one["below_dense_low"], one["below_dense_high"] = loss
    for one in made:
        del one["right"]
    made.sort(key=lambda r: (-r["budget"], RULES.index(r["rule"]), *_of_row(r)))
    return made


def _of_row(row: Row) -> tuple[Any, ...]:
    return row["tuned"] + row["taught"], row["mass"]


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


def table(made: list[Row]) -> str:
    """The table of the README, in Markdown: a row a variant, the budgets beside one another."""
    budgets = sorted({row["budget"] for row in made if row["rule"] != "dense"}, reverse=True)
    lines = [
        "| plan or rival | mass | fine-tuned | " + " | ".join(f"{b} %" for b in budgets) + " |",
        "|---|---|---|" + "---|" * len(budgets),
    ]

    def cell(row: Row) -> str:
        reach = f"{row['digits_low']:.1f}–{row['digits_high']:.1f}"
        return f"{row['easy']:.1f} · **{row['digits']:.1f}** ({reach}) at {row['visual']:.1f}"

    def kind(row: Row) -> tuple[Any, ...]:
        return RULES.index(row["rule"]), *_of_row(row)

    for one in sorted({kind(row) for row in made}):
        cells = {row["budget"]: cell(row) for row in made if kind(row) == one}
        rule, tuned, mass = RULES[one[0]], ("no", "yes", "distilled")[one[1]], one[2] or "–"
        if rule == "dense":
            cells = {budgets[0]: cells[100]} if budgets else {}
        told = " | ".join(cells.get(budget, "") for budget in budgets)
        lines.append(f"| {rule} | {mass} | {tuned} | {told} |")
    return "\n".join(lines) + "\n"


# Percent right on digits that were hoped for, of searched plans under drop: (budget, fine-tuned).
HOPED = {(25, False): 96.5, (12, False): 94, (8, False): 90, (12, True): 96.8, (4, True): 96}


def targets(made: list[Row]) -> str:
    """What was hoped for, and what came out, in percent right on digits; in Markdown."""
    lines = ["| hoped for | came out |", "|---|---|"]

    def add(what: str, met: bool, told: str) -> None:
        lines.append(f"| {what} | {'met' if met else 'missed'}: {told} |")

    found = {
        (r["rule"], r["budget"], r["mass"], r["tuned"]): r["digits"]
        for r in made
        if not r["taught"]
    }
    for (budget, tuned), least in HOPED.items():
        got = found.get(("search", budget, "drop", tuned))
        if got is not None:
            how = "fine-tuned" if tuned else "not fine-tuned"
            sink = found.get(("search", budget, "sink", tuned))
            told = f"{got:.1f}" if sink is None else f"{got:.1f}, under sink {sink:.1f}"
            add(f"search, {budget} %, {how}: {least} or more", got >= least, told)
    for (rule, budget, mass, tuned), ours in found.items():
        others = [
            (digits, name)
            for (name, other, _, also), digits in found.items()
            if (other, also) == (budget, tuned) and name not in ("search", "dense")
        ]
        if (rule, mass) == ("search", "drop") and others:
            best, name = max(others)
            how = "fine-tuned" if tuned else "not fine-tuned"
            what = f"search, {budget} %, {how}: no worse than anything else"
            add(what, ours >= best, f"{ours:.1f}, {name} {best:.1f}")
    return "\n".join(lines) + "\n"


_COLOURS = {"drop": "tab:orange", "exact": "tab:blue", "sink": "tab:green"}
_OTHERS = {
    "ViCA": ("tab:red", "D"),
    "ShortV": ("tab:pink", "P"),
    "VTW": ("tab:brown", "v"),
    "FastV": ("tab:purple", "^"),
    "random after layer": ("silver", "<"),
    "random tokens": ("tab:gray", "s"),
    "downsampling": ("tab:olive", "*"),
}


def draw(made: list[Row], path: Path) -> None:
    """Accuracy against visual FLOPs: a column for each task, fine-tuned below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(14, 10), sharex=True)
    for tuned, line in zip((False, True), panels, strict=True):
        for axes, task in zip(line, ("easy", "digits"), strict=True):
            shown = [row for row in made if row["tuned"] == tuned and not row["taught"]]
            _panel(axes, shown, task)
            name = {"easy": "easy-VQA", "digits": "digits"}[task]
            axes.set_title(f"{name}, {'' if tuned else 'not '}fine-tuned")
    for axes in panels[1]:
        axes.set_xlabel("visual FLOPs, % of dense")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    known: dict[str, Any] = {}
    for axes in panels.flat:
        known |= {
            label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    figure.legend(known.values(), known.keys(), fontsize=9, loc="center right")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panel(axes: Any, made: list[Row], task: str) -> None:
    for rule, mass in sorted(
        {(r["rule"], r["mass"]) for r in made}, key=lambda k: RULES.index(k[0])
    ):
        chosen = [r for r in made if (r["rule"], r["mass"]) == (rule, mass) and r["visual"] > 0]
        if not chosen:
            continue
        chosen.sort(key=lambda r: r["visual"])
        if rule == "dense":
            axes.axhline(chosen[0][task], color="black", linewidth=0.8, label="dense")
            continue
        colour, marker = (_COLOURS[mass], "o") if mass else _OTHERS[rule]
        values = [r[task] for r in chosen]
        ends = [[abs(r[task] - r[f"{task}{end}"]) for r in chosen] for end in ("_low", "_high")]
        axes.errorbar(
            [r["visual"] for r in chosen], values, ends, color=colour, marker=marker,
            label=", ".join(filter(None, (rule, mass))), capsize=2, linewidth=1.2, markersize=5,
            linestyle={"search": "-", "hand": "--"}.get(rule, ":"),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(2.5, 110)  # what costs nothing sees no picture: it is in the table
    axes.set_xticks([4, 8, 12, 25, 50, 100], ["4", "8", "12", "25", "50", "100"])
    axes.minorticks_off()
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.3)
