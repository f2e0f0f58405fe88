"""Draws a plan: which heads of which layers read visual tokens, and where the FLOPs of a prefill go
layer by layer, dense against pruned. Only drawing; the numbers are counts.py's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from yopo.counting.setting import Setting
from yopo.plan.pruning_plan import PruningPlan

HEADS = {  # colour of a head's cell
    "reads visual tokens": "#1f5fa8",
    "pruned": "#f3d9b1",
    "beyond the layer cut": "#e4e4e4",
    "beyond it, visual queries only": "#b5b5b5",
}
PARTS = (  # of a layer's FLOPs: label, keys, colour
    ("text", ("text_projections", "text_attention", "text_ffn"), "#6e6e6e"),
    ("visual FFN", ("visual_ffn",), "#2a7f62"),
    ("visual projections", ("visual_projections",), "#7fc4a4"),
    ("visual attention", ("visual_attention",), "#e08214"),
)
SAVED: dict[str, Any] = dict(facecolor="none", edgecolor="#c9c9c9", hatch="////", linewidth=0.5)


def draw(file: Path, setting: Setting, result: dict[str, Any]) -> None:
    """Writes `file`; raises OSError where it cannot."""
    layers, plan = setting.shape.num_hidden_layers, setting.plan
    height = max(4.2, 2.4 + 0.24 * layers)
    figure = pyplot.figure(figsize=(12.5 if plan else 7, height), layout="constrained")
    grid = figure.add_gridspec(2, 2 if plan else 1, height_ratios=[1, layers])
    top, bars = figure.add_subplot(grid[0, -1]), figure.add_subplot(grid[1, -1])
    _flops(top, bars, result)
    if plan is not None:
        heads = figure.add_subplot(grid[1, 0], sharey=bars)
        _head_map(heads, plan)
        heads.set_ylabel("layer")
    bars.set_ylim(layers - 0.5, -0.5)
    bars.set_yticks(range(0, layers, 1 if layers <= 12 else 4))
    figure.suptitle(_title(setting, result), fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _head_map(axes: Axes, plan: PruningPlan) -> None:
    keep = plan.head_keep.numpy()
    cells = np.where(keep, 0, 1)
    cells[plan.layer_cut :] = 2
    if plan.cut_mass == "exact":  # visual rows go on there, in the heads that the mask keeps
        attends = np.array(plan.visual_attends)[:, None]
        cells[plan.layer_cut :] += (keep & attends)[plan.layer_cut :]
    edges = [np.arange(n + 1) - 0.5 for n in (plan.num_heads, plan.num_layers)]
    axes.pcolormesh(
        *edges,
        cells,
        cmap=ListedColormap(list(HEADS.values())),
        vmin=0,
        vmax=len(HEADS) - 1,
        edgecolors="white",
        linewidth=0.6,
    )
    if plan.layer_cut < plan.num_layers:
        axes.axhline(plan.layer_cut - 0.5, color="black", linewidth=1.5)
    there = set(np.unique(cells).tolist())
    _legend(axes, [item for index, item in enumerate(HEADS.items()) if index in there])
    axes.set_xlabel("head")
    _axis_on_top(axes)


def _flops(top: Axes, bars: Axes, result: dict[str, Any]) -> None:
    """One bar for the dense model, whose layers are all alike, and one for each layer."""
    layers, pruned = result["per_layer"], result["plan"] is not None
    dense = sum(layers[0]["dense"]["prefill"].values())
    unit, name = (1e9, "GFLOPs") if dense >= 1e9 else (1e6, "MFLOPs")
    _stack(top, ["dense"], layers[:1], "dense", unit)
    top.set_xlabel(f"{name} of a layer in a prefill; the dense model: {dense / unit:.4g} in each")
    _axis_on_top(top)
    ends = _stack(bars, range(len(layers)), layers, "pruned" if pruned else "dense", unit)
    legend = [(label, colour) for label, _, colour in PARTS]
    if pruned:
        bars.barh(range(len(layers)), dense / unit - ends, 0.8, ends, **SAVED)
        _legend(bars, legend, Patch(**SAVED, label="saved"))
    else:
        _legend(bars, legend)
        bars.set_ylabel("layer")
    for axes in (top, bars):
        axes.set_xlim(0, 1.01 * max(dense / unit, *ends))
        axes.spines[["right", "bottom"]].set_visible(False)
    bars.spines["top"].set_visible(False)
    bars.tick_params(bottom=False, labelbottom=False)


def _stack(axes: Axes, places: Any, layers: list[Any], arm: str, unit: float) -> np.ndarray:
    left = np.zeros(len(layers))
    for _, keys, colour in PARTS:
        width = np.array([sum(layer[arm]["prefill"][key] for key in keys) for layer in layers])
        axes.barh(places, width / unit, 0.8, left, color=colour)
        left += width / unit
    return left


def _axis_on_top(axes: Axes) -> None:
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()


def _legend(axes: Axes, items: list[tuple[str, str]], *more: Patch) -> None:
    patches = [Patch(facecolor=colour, label=label) for label, colour in items]
    axes.legend(
        handles=[*patches, *more],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=0.8,
        ncols=3,
        fontsize=9,
        frameon=False,
    )


def _title(setting: Setting, result: dict[str, Any]) -> str:
    name = Path(setting.name).name
    prompt = f"{setting.prompt.visual} visual + {setting.prompt.text} text tokens"
    if setting.plan is None:
        return f"{name}: no plan ({prompt})"

    def left(part: str, key: str) -> str:
        both = result[part]
        return f"{both['pruned'][key] / both['dense'][key]:.0%}"

    return (
        f"{name} ({prompt})\nleft of the dense model: {left('prefill', 'visual')} of the visual "
        f"tokens' FLOPs, {left('prefill', 'total')} of the prefill's, {left('kv_bytes', 'filled')} "
        "of the KV cache"
    )
