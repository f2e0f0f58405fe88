"""The GPU check: is yopo right on this device, how fast is it, and why? One command, all figures.

    python benchmarks/gpu.py --out FOLDER                          # on a CUDA device
    python benchmarks/gpu.py --out FOLDER --device cpu --small     # a rehearsal of it

After each step FOLDER/table.md and FOLDER/results.jsonl hold what is known so far. A check or an
arm that fails is a row with its error, and the run goes on; then the exit status is 1. What there
was no time for is a row, too. Each step is a file in gpu_steps/; needs torch, transformers,
hypothesis and pytest, nothing of the network and no LLaVA.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

# The tests' oracle, random layouts and golden files; and yopo where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_steps import fast, right, scaling, why
from gpu_steps.arms import STOCK
from gpu_steps.clock import Clock
from gpu_steps.journal import Journal, words
from gpu_steps.scale import DTYPE, FULL, SMALL, Scale
from gpu_steps.session import Session
from gpu_steps.tables import FAILED

from yopo.bench.report import machine

RESERVE = 20  # seconds: to import all this, and to end what was begun in time


class Step(NamedTuple):
    """shares: of the time, for each part of it that has a deadline of its own."""

    run: Callable[[Session], None]
    shares: Callable[[Scale], dict[str, float]]


STEPS = {
    "right": Step(right.step, right.shares),
    "fast": Step(fast.step, fast.shares),
    "why": Step(why.step, why.shares),
    "scaling": Step(scaling.step, scaling.shares),
    "compiled": Step(fast.compiled_step, fast.compiled_shares),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for table.md and the rest")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="tiny models, to rehearse the run")
    parser.add_argument("--minutes", type=float, default=6, help="that all of it may take")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="only these")
    parser.add_argument("--raced", nargs="+", choices=fast.SHARES, help="models; 7b and 13b")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes of races; 1 8 32")
    parser.add_argument("--arms", nargs="+", help="only these beside stock; names of the table")
    args = parser.parse_args(argv)
    device = _device(parser, args.device, args.small)
    scale = SMALL if args.small else FULL
    scale = replace(
        scale,
        raced=None if args.raced is None else tuple(args.raced),
        batches=tuple(args.batches or scale.batches),
        arms=None if args.arms is None else (STOCK.name, *args.arms),
    )
    steps = {name: step for name, step in STEPS.items() if name in args.steps}
    journal = Journal(
        args.out,
        device=machine(device, DTYPE),
        date=datetime.date.today().isoformat(),
        size="small: a rehearsal, its times mean nothing" if args.small else "full",
    )
    seconds = max(0.0, 60 * args.minutes - RESERVE)
    shares = {name: step.shares(scale) for name, step in steps.items()}
    clock = Clock(
        seconds, {part: share for step in shares.values() for part, share in step.items()}
    )
    session = Session(device, scale, journal, clock)
    for name, step in steps.items():
        try:
            step.run(session)
        except Exception as error:
            journal.add(name, "the whole step", FAILED, error=words(error))
        clock.forget(shares[name])
        journal.write_table()
    session.free()
    print(f"{seconds - clock.left:.0f} s; {args.out / 'table.md'}")
    return int(journal.failed)


def _device(parser: argparse.ArgumentParser, name: str, small: bool) -> torch.device:
    """Ends the program with what would do, where the device does not."""
    # A cache that grows by each token leaves holes in memory, stock's the most: it shall not suffer
    # from that. torch reads this when it first allocates on a GPU.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            parser.error(f"--device is {name!r}; allowed: cuda, cuda:N, cpu")
        device = torch.zeros(1, device=device, dtype=DTYPE).device  # with its number
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        parser.error(f"--device {name} cannot be used here ({reason}): try --device cpu --small")
    if device.type == "cpu" and not small:
        parser.error("--device cpu goes with --small: whole models would take hours")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # for models as tiny as these more are slower
    return device


if __name__ == "__main__":
    sys.exit(main())
