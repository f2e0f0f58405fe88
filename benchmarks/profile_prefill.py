"""Where the time of one prefill goes, by torch.profiler: stock SDPA and ours, by operation.

    python benchmarks/profile_prefill.py --layers 8 --dtype bfloat16    # benchmarks/profile.md

Takes the options of `python -m yopo bench`. Profiling slows small operations down: for ratios see
the benchmark itself. Of products the shapes and FLOP/s are told.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for yopo where it is not installed

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from yopo.bench.arms import ALWAYS, arms_of
from yopo.bench.random_model import Case, random_model
from yopo.bench.report import machine
from yopo.commands import run_bench

SHOWN = 12  # lines for an arm
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    run_bench.add_arguments(parser)
    args = parser.parse_args()
    benchmark = run_bench.benchmark_of(args)
    setting, device, dtype = benchmark.setting, benchmark.device, benchmark.dtype
    model = random_model(setting.shape, dtype, device)
    case = Case.of(setting.prompt, setting.batch, setting.shape, dtype, device)
    what = f"plan {args.plan}, {args.mass or 'drop'}, batch {args.batch}"
    print(f"{args.preset}, {setting.shape.num_hidden_layers} layers, {what}")
    print(machine(device, dtype))
    for arm in arms_of(ALWAYS, model, setting.plan, case):
        print(f"\n**{arm.name}**\n\n{_table(arm, device)}")


@torch.inference_mode()
def _table(arm: Any, device: torch.device) -> str:
    arm.enter()
    arm.prefill()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as watched:
        arm.prefill()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = watched.key_averages(group_by_input_shape=True)
    events = sorted(found, key=lambda e: getattr(e, name), reverse=True)
    total = sum(getattr(e, name) for e in events)
    rows = []
    for event in events[:SHOWN]:
        micros = getattr(event, name)
        flops = _flops(event) * event.count
        rate = f"{flops / micros / 1e3:.0f}" if flops and micros else ""
        sizes = " · ".join("×".join(map(str, s)) for s in event.input_shapes if len(s) > 1)
        rows.append(
            [event.key, sizes, event.count, f"{micros / 1e3:.1f}", f"{micros / total:.1%}", rate]
        )
    rest = sum(getattr(e, name) for e in events[SHOWN:])
    rows.append(["all others", "", "", f"{rest / 1e3:.1f}", f"{rest / total:.1%}", ""])
    headers = ["operation", "sizes", "calls", "ms", "share", "GFLOP/s"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _flops(event: Any) -> int:
    """Of one product; 0 for anything else."""
    if event.key not in PRODUCTS:
        return 0
    one, other = [s for s in event.input_shapes if len(s) >= 2][-2:]
    return 2 * torch.Size(one).numel() * other[-1]


if __name__ == "__main__":
    main()
