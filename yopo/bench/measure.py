"""Runs a benchmark: prefill and decode of a random-weight model at real shapes, ours against stock
transformers with SDPA and with eager attention, and against the masked simulation.

All arms run on the same weights in the same process, one after the other in each round, so that a
machine that speeds up or slows down does so for all. What the times mean is report.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

from yopo.bench.arms import ARMS, Arm, arms_of
from yopo.bench.memory import (
    cache_bytes,
    fixed_bytes,
    free_bytes,
    is_out_of_memory,
    layer_bytes,
    peak_of,
    square_bytes,
)
from yopo.bench.random_model import Case, random_model
from yopo.bench.timing import Probe, timed
from yopo.counting.setting import Setting
from yopo.engine.visual_cache import VisualCache
from yopo.errors import BadInput


@dataclass(frozen=True)
class Benchmark:
    """What is to be measured, and where.

    arms: names of arms.ARMS. steps: of decoding after each prefill. rounds: of all arms, without
    the first one, which warms up and is not counted.
    """

    setting: Setting
    device: torch.device
    arms: tuple[str, ...] = ARMS
    steps: int = 8
    rounds: int = 7

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.setting.dtype)


@dataclass(frozen=True)
class Measured:
    """What every arm took; the machine's best (FLOP/s, bytes/s) in the same run."""

    arms: list[Arm]
    rates: tuple[float, float]


def measure(benchmark: Benchmark) -> Measured:
    """Runs all arms. Raises BadInput where the memory does not do for the model alone."""
    setting, device, dtype = benchmark.setting, benchmark.device, benchmark.dtype
    shape, prompt, batch = setting.shape, setting.prompt, setting.batch
    try:
        model = random_model(shape, dtype, device)
        case = Case.of(prompt, batch, shape, dtype, device)
        probe = Probe(shape, dtype, device, prompt, batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise BadInput(f"out of memory on {device} for the model alone: lower --layers") from error
    arms = arms_of(benchmark.arms, model, setting.plan, case)
    _leave_out_square(arms, benchmark)
    for number in tqdm(range(benchmark.rounds + 1), desc="rounds (the first is not counted)"):
        for arm in arms:
            _run(arm, benchmark.steps, device, counted=number > 0)
        probe.run()
    return Measured(arms, probe.rates())


def check_memory(benchmark: Benchmark) -> None:
    """Raises BadInput where the model and what every arm needs exceed the free memory."""
    setting, device = benchmark.setting, benchmark.device
    layers, free = setting.shape.num_hidden_layers, free_bytes(device)
    fixed, layer = (
        of(setting.shape, setting.prompt, setting.batch, benchmark.dtype)
        for of in (fixed_bytes, layer_bytes)
    )
    needed = fixed + layers * layer
    if needed > free:
        fits = int((free - fixed) // layer)
        advice = (
            f"--layers {fits} would" if fits >= 1 else "no number of layers would: lower --batch"
        )
        raise BadInput(
            f"{layers} layers need about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
            f"free on {device}; {advice}"
        )


def _leave_out_square(arms: list[Arm], benchmark: Benchmark) -> None:
    """Leaves out the arms whose n × n scores do not fit beside the model: an operating system that
    overcommits would kill the whole benchmark instead of saying so."""
    setting, dtype = benchmark.setting, benchmark.dtype
    shape, prompt, batch = setting.shape, setting.prompt, setting.batch
    cache = layer_bytes(shape, prompt, batch, dtype) - shape.layer_weights * dtype.itemsize
    needed = square_bytes(shape, prompt, batch, dtype) + shape.num_hidden_layers * cache
    free = free_bytes(benchmark.device)
    for arm in arms:
        if arm.square and not arm.failed and needed > free:
            arm.failed = f"out of memory: needs about {needed / 2**30:.0f} GiB"


@torch.inference_mode()
def _run(arm: Arm, steps: int, device: torch.device, counted: bool) -> None:
    if arm.failed:
        return
    try:
        arm.enter()
        if counted:
            seconds, cache = timed(arm.prefill, device)
            arm.prefill_s.append(seconds)
        else:
            arm.peak_bytes, cache = peak_of(arm.prefill, device)
            arm.cache_bytes = 0 if cache is None else cache_bytes(cache)
            if isinstance(cache, VisualCache):
                arm.visual_bytes = cache.nbytes(visual_only=True)
        if arm.decode is not None:
            for _ in range(steps):
                seconds, _ = timed(lambda: arm.decode(cache), device)
                if counted:
                    arm.decode_s.append(seconds)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        arm.failed = "out of memory"
        if device.type == "cuda":
            torch.cuda.empty_cache()
