"""`python -m yopo bench`: times ours against stock on random weights (yopo/bench/), and prints and
saves what came of it. Arguments, checks and files; nothing is measured here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from yopo.bench.arms import ARMS, CHOICES
from yopo.bench.host import host_figures, measure_host
from yopo.bench.measure import Benchmark, check_memory, measure
from yopo.bench.report import host_table, machine, result_of, save, table, training_table
from yopo.bench.train_steps import measure_training, training_figures
from yopo.commands.input_checks import check_masses
from yopo.commands.setting_options import add_prompt_arguments, preset_setting, refuse_less
from yopo.counting.presets import PRESETS
from yopo.counting.setting import Setting
from yopo.errors import BadInput
from yopo.plan.pruning_plan import MASSES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--preset", default="llava-1.5-7b", help=", ".join(PRESETS))
    parser.add_argument("--layers", type=int, help="only so many layers, the plan in proportion")
    parser.add_argument("--device", default="cpu")
    add_prompt_arguments(parser)
    parser.add_argument("--plan", default="25", help="25, 12, 7b_16 …, none, or a JSON file")
    parser.add_argument(
        "--mass",
        metavar="HEAD[/CUT]",
        help=f"{', '.join(MASSES)} (drop; of a JSON file's plan: its own)",
    )
    parser.add_argument("--steps", type=int, default=8, help="decode steps; 0: none")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of all arms")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--arms", default=",".join(ARMS), help="which to run; sdpa and yopo always")
    parser.add_argument("--out", type=Path, help="folder for results.csv and results.png")
    parser.add_argument(
        "--host",
        action="store_true",
        help="the host's time instead, of a narrow 32-layer model under --plan 25 or 12; of the "
        "other options only --device and --rounds have a say",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="a training step instead, forward and backward: its time, and what the forward keeps",
    )
    parser.set_defaults(command=bench)


def bench(args: argparse.Namespace) -> int:
    """Runs the benchmark. Raises BadInput before any heavy work where something is wrong."""
    if args.host:
        return _bench_host(args)
    if args.train:
        return _bench_training(args)
    benchmark = benchmark_of(args)
    _check_output(args.out)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    check_memory(benchmark)
    tqdm.write(machine(benchmark.device, benchmark.dtype))
    measured = measure(benchmark)
    result = result_of(benchmark, measured) | {"images": args.images}
    print(table(measured.arms, result))
    try:
        if args.out:
            save(args.out, measured.arms, result)
    except OSError as error:
        raise BadInput(f"--out {args.out} cannot be written: {error}") from error
    finally:  # hours of work are not lost to a full disk
        print(json.dumps(result))
    return 0


def _bench_host(args: argparse.Namespace) -> int:
    """Prints a table, and the figures as JSON."""
    if args.plan not in ("25", "12"):
        raise BadInput(f"--plan is {args.plan!r}; with --host: 25 or 12")
    refuse_less(args, rounds=1)
    _check_output(None)
    device = _device(args.device, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        arms = measure_host(args.plan, device, args.rounds)
    finally:
        torch.set_num_threads(threads)
    figures = host_figures(arms)
    print(host_table(figures))
    print(json.dumps({"machine": machine(device, torch.float32), "host": figures}))
    return 0


def _bench_training(args: argparse.Namespace) -> int:
    """Prints a table, and the figures as JSON."""
    setting = _setting(args)
    refuse_less(args, rounds=1, threads=1)
    _check_output(None)
    device = _device(args.device, getattr(torch, setting.dtype))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    on = machine(device, getattr(torch, setting.dtype))
    tqdm.write(on)
    figures = training_figures(measure_training(setting, device, args.rounds))
    print(training_table(figures))
    print(json.dumps({"machine": on, "training": figures}))
    return 0


def benchmark_of(args: argparse.Namespace) -> Benchmark:
    """What the options ask for, all checked. Raises BadInput."""
    setting = _setting(args)
    refuse_less(args, rounds=1, steps=0, threads=1)
    arms = tuple(args.arms.split(","))
    if unknown := {*arms} - {*CHOICES}:
        raise BadInput(f"--arms names {sorted(unknown)}; allowed: {', '.join(CHOICES)}")
    device = _device(args.device, getattr(torch, setting.dtype))
    return Benchmark(setting, device, arms, args.steps, args.rounds)


def _device(name: str, dtype: torch.dtype) -> torch.device:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise BadInput(f"--device is {name!r}; allowed: cpu, cuda, cuda:N")
        torch.zeros(1, device=device, dtype=dtype)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {name} cannot be used here: {reason}") from error
    return device


def _setting(args: argparse.Namespace) -> Setting:
    """The preset with the plan. With --plan none, --mass is checked and has no say: tables run the
    dense model beside the others."""
    mass = args.mass
    if args.plan == "none" and mass is not None:
        check_masses(mass)
        mass = None
    setting = preset_setting(args, args.preset, args.layers, args.plan, mass)
    if setting.plan is None:
        return setting
    return replace(setting, plan=replace(setting.plan, ffn_order=None))  # random weights: any order


def _check_output(out: Path | None) -> None:
    """Raises BadInput where the table or the files could not be written at the end."""
    needed = ("tabulate",) if out is None else ("tabulate", "matplotlib")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise BadInput(f"{', '.join(missing)} is missing: pip install {' '.join(missing)}")
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out} cannot be made: {error}") from error
