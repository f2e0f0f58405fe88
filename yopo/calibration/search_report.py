"""A search on paper: every plan tried as CSV, and a picture of what quality costs. Writes files;
finds nothing."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from yopo.calibration.search import Found
from yopo.calibration.search_trials import TEMPERATURE, Evaluation
from yopo.files import write_whole

COLUMNS = (
    "number",
    "why",
    "layer_cut",
    "heads_kept",
    "window",
    "visual_attention",
    "ffn",
    "visual_flops",
    "kl",
    "same_answer",
    "pareto",
    "chosen",
)


def write_csv(path: Path, found: Found) -> None:
    """One line for each plan tried, in order. heads_kept, visual_attention (1: visual tokens
    attend), ffn (neurons): by layer, heads below the layer cut; one value: of all. visual_flops:
    share of the dense model's; kl: nats for each token of the answer, at
    search_trials.TEMPERATURE; pareto: on the front."""
    front = found.front()
    with write_whole(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, tried in enumerate(found.evaluations, 1):
            marks = [int(any(e is tried for e in front)), int(tried is found.chosen)]
            writer.writerow([number, *_row(tried), *marks])


def _row(tried: Evaluation) -> list[object]:
    plan = tried.plan
    kept = plan.head_keep[: plan.layer_cut].sum(1).tolist()
    ffn = [f"1/{plan.ffn_ratio:g}"] if plan.ffn is None else _each(plan.ffn)
    return [
        tried.why,
        plan.layer_cut,
        " ".join(map(str, kept)),
        "none" if plan.window is None else plan.window,
        "".join("01"[on] for on in plan.visual_attends),
        " ".join(map(str, ffn)),
        f"{tried.visual_flops:.6f}",
        f"{tried.divergence:.6g}",
        f"{tried.same:.4f}",
    ]


def _each(value: object) -> Sequence[object]:
    return value if isinstance(value, tuple) else (value,)


def draw(path: Path, found: Found) -> None:
    """A PNG: divergence against visual FLOPs: every plan tried, the front, and the plan chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    def points(tried: list[Evaluation]) -> tuple[list[float], list[float]]:
        return [100 * e.visual_flops for e in tried], [e.divergence for e in tried]

    axes.axvline(100 * found.budget, color="0.7", linewidth=1, linestyle=":", label="budget")
    axes.plot(*points(list(found.evaluations)), "o", color="0.6", label="plans tried")
    axes.plot(*points(found.front()), "-", color="tab:blue", label="Pareto front")
    axes.plot(*points([found.evaluations[0]]), "s", color="tab:orange", label="hand-made")
    axes.plot(*points([found.chosen]), "*", color="tab:red", markersize=13, label="chosen")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("visual FLOPs, % of the dense model's")
    axes.set_ylabel(f"KL from the dense model at temperature {TEMPERATURE:g}, nats per token")
    axes.legend()
    with write_whole(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
