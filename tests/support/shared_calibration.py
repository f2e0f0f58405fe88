"""Calibrating in one process and in several, for tests/calibration/test_shared_processes.py.
Importable by processes that tests start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from calibration_samples import sample
from layouts import Shape, build

import yopo

SHAPE = Shape(layers=3, heads=4, kv_heads=4, intermediate=48)


def calibrated(rank: int, folder: str | None, budget: float | None, distributed: bool) -> Any:
    """The plan as saved fields, statistics, and the lines told. folder: for files; None: none."""
    torch.set_num_threads(1)
    model = build(SHAPE)
    samples = [sample(seed, SHAPE, after=3 + seed % 2) for seed in range(9)]
    told: list[str] = []
    settings: dict[str, Any] = {"mass": "sink", "influence": True, "answer_tokens": 3}
    if budget is not None:
        settings |= {"budget": budget, "evaluations": 12}
    files = (
        {}
        if folder is None
        else {
            "statistics_path": Path(folder) / "statistics.safetensors",
            "search_path": Path(folder) / "search.jsonl",
        }
    )
    found = yopo.calibrate(
        model, samples, tell=told.append, distributed=distributed, **files, **settings
    )
    fields: dict[str, Any] = {}
    found.plan.save_to(fields)
    tensors = {n: x for n, x in vars(found.statistics).items() if isinstance(x, torch.Tensor)}
    return fields, tensors, told


def fails(rank: int) -> str:
    """What is raised where one sample, which the second process gets, has no image."""
    samples = [sample(seed, SHAPE) for seed in range(4)]
    samples[3] = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    try:
        yopo.calibrate(build(SHAPE), samples, distributed=True)
    except ValueError as error:
        return str(error)
    return ""


def unlike(rank: int, what: str) -> str:
    """What is raised where processes have samples or settings of their own."""
    samples = [sample(seed, SHAPE) for seed in range(6)]
    if what == "shards":
        samples = samples[rank::2]
    elif what == "another order" and rank:
        samples = samples[::-1]
    elif what == "fewer" and rank:
        samples = samples[:3]
    keep = 0.25 if what == "settings" and rank else 0.5
    try:
        yopo.calibrate(build(SHAPE), samples, keep=keep, distributed=True)
    except ValueError as error:
        return str(error)
    return ""
