"""What a benchmark measured, against what was to be expected: ratios, roofline floor, table, files.

Reported are medians, and next to them the ideal ratio (counted FLOPs) and the roofline floor (FLOPs
at the GEMM rate, or weight bytes at the bandwidth, measured in the same run, whichever is longer
for a layer). Nothing here builds or runs a model.
"""

from __future__ import annotations

import csv
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

from yopo.bench.arms import Arm
from yopo.bench.floor import prefill_floor
from yopo.bench.measure import Benchmark, Measured
from yopo.counting.flops import prefill_flops
from yopo.plan.pruning_plan import PruningPlan


def host_table(figures: list[dict[str, Any]]) -> str:
    """Of host.host_figures."""
    columns = (
        ("{}, ms", "ms", ".2f", 1),
        ("over stock", "over_stock", ".2f", 1),
        ("operations a layer", "operations", ".1f", 1),
        ("over stock ", "operations_over_stock", ".2f", 1),
    )
    return _table_of(figures, ("prefill", "decode"), columns)


def training_table(figures: list[dict[str, Any]]) -> str:
    """Of train_steps.training_figures."""
    columns = (
        ("with {}: step, s", "s", ".2f", 1),
        ("× stock", "ratio", ".2f", 1),
        ("kept, MiB", "kept_bytes", ".0f", 2**20),
        ("of stock", "kept_of_stock", ".1%", 1),
    )
    return _table_of(figures, ("image", "text"), columns)


def _table_of(
    figures: list[dict[str, Any]],
    parts: tuple[str, ...],
    columns: tuple[tuple[str, str, str, int], ...],
) -> str:
    """A line for each arm. columns: of each part, in turn: head, key, format, unit."""
    from tabulate import tabulate

    each = [(part, *column) for part in parts for column in columns]
    heads = ["arm", *(head.format(part) for part, head, *_ in each)]
    rows = [
        [
            row["arm"],
            *(format(row[f"{part}_{key}"] / unit, spec) for part, _, key, spec, unit in each),
        ]
        for row in figures
    ]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def machine(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return (
        f"{name}; {str(dtype).removeprefix('torch.')}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(stock: list[float], ours: list[float]) -> float | None:
    """Median of the ratios of each round."""
    return _median([a / b for a, b in zip(stock, ours, strict=False)])


def result_of(benchmark: Benchmark, measured: Measured) -> dict[str, Any]:
    """All figures, JSON-able; times by arm."""
    setting, dtype, arms = benchmark.setting, benchmark.dtype, measured.arms
    shape, prompt, plan = setting.shape, setting.prompt, setting.plan
    by_name = {arm.name: arm for arm in arms}
    stock, ours = by_name["stock SDPA"], by_name["yopo"]
    drop = by_name.get("yopo, drop", Arm("", lambda: None))
    floors = {
        arm.name: prefill_floor(
            shape, prompt, pruned_by, setting.batch, dtype.itemsize, measured.rates
        )
        for arm, pruned_by in ((stock, None), (ours, plan))
    }
    heads = shape.num_key_value_heads * shape.head_dim
    token = 2 * setting.batch * shape.num_hidden_layers * heads * dtype.itemsize
    visual = token * prompt.visual if ours.visual_bytes is None else ours.visual_bytes
    return {
        "preset": setting.name,
        "layers": shape.num_hidden_layers,
        "plan": setting.plan_name,
        "mass": _masses(plan),
        "batch": setting.batch,
        "text_tokens": prompt.text,
        "device": machine(benchmark.device, dtype),
        "prefill_ratio_vs_sdpa": _ratio(stock.prefill_s, ours.prefill_s),
        "prefill_ideal_ratio": _ideal(benchmark),
        "prefill_roofline_fraction": _fraction(floors, ours),
        "sdpa_roofline_fraction": _fraction(floors, stock),
        "decode_ratio_vs_sdpa": _ratio(stock.decode_s, ours.decode_s),
        "prefill_ratio_vs_drop": _ratio(drop.prefill_s, ours.prefill_s),
        "decode_ratio_vs_drop": _ratio(drop.decode_s, ours.decode_s),
        "kv_visual_fraction": visual / (token * prompt.visual) if ours.cache_bytes else None,
        "prefill_floor_s": floors,
        "gemm_tflops": measured.rates[0] / 1e12,
        "weight_read_gbytes": measured.rates[1] / 1e9,
        "prefill_median_s": {arm.name: _median(arm.prefill_s) for arm in arms},
        "prefill_spread_s": {arm.name: _spread(arm.prefill_s) for arm in arms},
        "decode_median_s": {arm.name: _median(arm.decode_s) for arm in arms},
        "decode_spread_s": {arm.name: _spread(arm.decode_s) for arm in arms},
        "peak_bytes": {arm.name: arm.peak_bytes for arm in arms},
        "cache_bytes": {arm.name: arm.cache_bytes for arm in arms},
        "failed": {arm.name: arm.failed for arm in arms if arm.failed},
    }


def _ideal(benchmark: Benchmark) -> float:
    """How many times fewer FLOPs the plan leaves."""
    setting = benchmark.setting
    dense, pruned = (
        sum(layer.total for layer in prefill_flops(setting.shape, setting.prompt, plan))
        for plan in (None, setting.plan)
    )
    return dense / pruned


def _masses(plan: PruningPlan | None) -> str | None:
    """HEAD, or HEAD/CUT where they differ."""
    if plan is None:
        return None
    return "/".join(dict.fromkeys((plan.head_mass, plan.cut_mass)))


def _fraction(floors: dict[str, float], arm: Arm) -> float | None:
    return floors[arm.name] / statistics.median(arm.prefill_s) if arm.prefill_s else None


def _spread(values: list[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def _rows(arms: list[Arm], result: dict[str, Any]) -> list[dict[str, Any]]:
    """ideal ×, floor s (both of what must be computed) and visual KV where they are known."""
    stock = arms[0]
    ideal = {"stock SDPA": 1.0, "yopo": result["prefill_ideal_ratio"]}
    visual = {"yopo": result["kv_visual_fraction"]}
    rows = []
    for arm in arms:
        took, step = _median(arm.prefill_s), _median(arm.decode_s)
        rows.append(
            {
                "arm": arm.name,
                "prefill s": arm.failed or f"{took:.3f}",
                "min–max": _range(arm.prefill_s, 1, ".3f"),
                "× SDPA": _fixed(_ratio(stock.prefill_s, arm.prefill_s), ".2f"),
                "ideal ×": _fixed(ideal.get(arm.name), ".2f"),
                "floor s": _fixed(result["prefill_floor_s"].get(arm.name), ".3f"),
                "decode ms": _fixed(None if step is None else 1e3 * step, ".1f"),
                "decode min–max": _range(arm.decode_s, 1e3, ".1f"),
                "decode × SDPA": _fixed(_ratio(stock.decode_s, arm.decode_s), ".2f"),
                "peak MiB": _fixed(arm.peak_bytes / 2**20 or None, ".0f"),
                "cache MiB": _fixed(arm.cache_bytes / 2**20 or None, ".1f"),
                "visual KV": _fixed(visual.get(arm.name), ".1%"),
            }
        )
    return rows


def _range(values: list[float], unit: float, spec: str) -> str:
    return "–".join(format(unit * value, spec) for value in _spread(values) or ())


def _fixed(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def table(arms: list[Arm], result: dict[str, Any]) -> str:
    from tabulate import tabulate

    return tabulate(_rows(arms, result), headers="keys", disable_numparse=True, tablefmt="github")


def save(folder: Path, arms: list[Arm], result: dict[str, Any]) -> None:
    """results.csv and results.png, a bar for each arm's prefill."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(arms, result)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    timed = [arm for arm in arms if arm.prefill_s]
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.5 * len(timed)))
    axes.barh([arm.name for arm in timed], [_median(arm.prefill_s) for arm in timed])
    axes.invert_yaxis()
    axes.set_xlabel("prefill, seconds (median)")
    plan = ", ".join(filter(None, (result["plan"], result["mass"])))
    axes.set_title(f"{result['preset']}, plan {plan}", fontsize=10)
    figure.tight_layout()
    figure.savefig(folder / "results.png", dpi=150)
    pyplot.close(figure)
