"""What a benchmark measured, against what was to be expected: ratios, roofline floor, table, files.

Nothing here builds or runs a model; the two products that `Probe` times are all it computes.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from yopo.counting.flops import Prompt, prefill_flops
from yopo.counting.presets import Shape
from yopo.plan.pruning_plan import PruningPlan


@dataclass
class Arm:
    """One way to run the model. seconds of each prefill and of each decode step; bytes.

    square: it forms n × n scores. visual_bytes: of the cache, those of visual tokens; None: all are
    there. failed: why it gave nothing.
    """

    name: str
    prefill: Callable[[], Any]
    decode: Callable[[Any], None] | None = None
    enter: Callable[[], None] = lambda: None
    square: bool = False
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    cache_bytes: int = 0
    visual_bytes: int | None = None
    failed: str | None = None


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


class Probe:
    """Measures what the machine can do, once in each round, next to the arms: a GEMM as wide as the
    prefill's, and reading a weight, by one row times it and by summing it up (the sum, since the
    product of half precision is slower on some CPUs than their memory)."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, prompt: Prompt, batch: int
    ) -> None:
        self._device = device
        rows = batch * (prompt.text + prompt.visual)
        self._weight = torch.randn(shape.intermediate_size, shape.hidden_size).to(device, dtype)
        self._wide = torch.randn(rows, shape.hidden_size).to(device, dtype)
        self._times: dict[str, list[float]] = {"gemm": [], "read": []}

    def run(self) -> None:
        numbers = self._weight.flatten().view(torch.float32)  # whatever they mean
        for name, work in (
            ("gemm", lambda: F.linear(self._wide, self._weight)),
            ("read", lambda: F.linear(self._wide[:1], self._weight)),
            ("read", numbers.sum),
        ):
            for _ in range(3):
                self._times[name].append(timed(work, self._device)[0])

    def rates(self) -> tuple[float, float]:
        """(FLOP/s, bytes/s), the best seen: a bound must not come from a slow moment."""
        flops = 2 * self._wide.shape[0] * self._weight.numel()
        gemm, read = min(self._times["gemm"]), min(self._times["read"])
        return flops / gemm, self._weight.numel() * self._weight.element_size() / read


def _floor(
    shape: Shape, prompt: Prompt, plan: PruningPlan | None, batch: int, rates: tuple[float, float],
    dtype: torch.dtype,
) -> float:  # fmt: skip
    """Seconds under which no prefill of these FLOPs and weights can come on this machine."""
    rate, bandwidth = rates
    read = shape.layer_weights * dtype.itemsize / bandwidth
    layers = prefill_flops(shape, prompt, plan)
    head = 2 * shape.hidden_size * shape.vocab_size
    last = max(batch * head / rate, head / 2 * dtype.itemsize / bandwidth)
    return last + sum(max(batch * layer.total / rate, read) for layer in layers)


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


def result_of(
    args: argparse.Namespace,
    shape: Shape,
    prompt: Prompt,
    plan: PruningPlan | None,
    arms: list[Arm],
    rates: tuple[float, float],
    dtype: torch.dtype,
) -> dict[str, Any]:
    by_name = {arm.name: arm for arm in arms}
    stock, ours = by_name["stock SDPA"], by_name["yopo"]
    dense = sum(layer.total for layer in prefill_flops(shape, prompt))
    pruned = sum(layer.total for layer in prefill_flops(shape, prompt, plan))
    floors = {
        arm.name: _floor(shape, prompt, pruned_by, args.batch, rates, dtype)
        for arm, pruned_by in ((stock, None), (ours, plan))
    }
    heads = shape.num_key_value_heads * shape.head_dim
    token = 2 * args.batch * shape.num_hidden_layers * heads * dtype.itemsize
    visual = token * prompt.visual if ours.visual_bytes is None else ours.visual_bytes
    return {
        "preset": args.preset,
        "layers": shape.num_hidden_layers,
        "plan": args.plan,
        "mass": _masses(plan),
        "batch": args.batch,
        "images": args.images,
        "text_tokens": args.text_tokens,
        "device": machine(torch.device(args.device), dtype),
        "prefill_ratio_vs_sdpa": _ratio(stock.prefill_s, ours.prefill_s),
        "prefill_ideal_ratio": dense / pruned,
        "prefill_roofline_fraction": _fraction(floors, ours),
        "sdpa_roofline_fraction": _fraction(floors, stock),
        "decode_ratio_vs_sdpa": _ratio(stock.decode_s, ours.decode_s),
        "kv_visual_fraction": visual / (token * prompt.visual) if ours.cache_bytes else None,
        "prefill_floor_s": floors,
        "gemm_tflops": rates[0] / 1e12,
        "weight_read_gbytes": rates[1] / 1e9,
        "prefill_median_s": {arm.name: _median(arm.prefill_s) for arm in arms},
        "prefill_spread_s": {arm.name: _spread(arm.prefill_s) for arm in arms},
        "decode_median_s": {arm.name: _median(arm.decode_s) for arm in arms},
        "decode_spread_s": {arm.name: _spread(arm.decode_s) for arm in arms},
        "peak_bytes": {arm.name: arm.peak_bytes for arm in arms},
        "cache_bytes": {arm.name: arm.cache_bytes for arm in arms},
        "failed": {arm.name: arm.failed for arm in arms if arm.failed},
    }


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
