"""A training step, forward and backward, of ours against stock: its time, and how much the forward
keeps for the backward. All arms in turn in each round, medians. With an image, and with text alone.

Logits, their loss and the optimiser are left out: a plan does not change them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from yopo.bench.random_model import Case, random_model
from yopo.bench.timing import timed
from yopo.counting.setting import Setting
from yopo.models import attach

STOCK, OURS = "stock SDPA", "yopo"
KINDS = ("image", "text")


@dataclass
class TrainArm:
    """One way to train the model. seconds: of each step, by kind of batch; kept_bytes: what its
    forward keeps for the backward, beside parameters and inputs."""

    name: str
    enter: Callable[[], Any]
    told: dict[str, Any]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    kept_bytes: dict[str, int] = field(default_factory=dict)


def measure_training(setting: Setting, device: torch.device, rounds: int) -> list[TrainArm]:
    """Of stock and of ours under the setting's plan, at its sizes, prompt and batch."""
    dtype, plan = getattr(torch, setting.dtype), setting.plan
    model = random_model(setting.shape, dtype, device).train()
    case = Case.of(setting.prompt, setting.batch, setting.shape, dtype, device)
    embeds = {"image": case.embeds, "text": case.embeds[:, : setting.prompt.text]}
    visual = case.layout.visual.to(device)
    told = {"visual_mask": visual, "visual_grids": case.layout.grids}
    arms = [TrainArm(STOCK, partial(attach.remove, model), {})]
    if plan is not None:
        arms.append(TrainArm(OURS, partial(attach.apply, model, plan), told))

    def step(arm: TrainArm, kind: str) -> None:
        given = arm.told if kind == "image" else _of_text(arm.told, embeds["text"])
        loss = model.model(inputs_embeds=embeds[kind], use_cache=False, **given)[0].sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    for arm in arms:
        arm.enter()
        for kind in KINDS:
            arm.kept_bytes[kind] = _kept(model, embeds[kind], partial(step, arm, kind))
    for _ in tqdm(range(rounds), desc="training steps"):
        for kind in KINDS:
            for arm in arms:
                arm.enter()
                arm.seconds[kind].append(timed(partial(step, arm, kind), device)[0])
    return arms


def training_figures(arms: list[TrainArm]) -> list[dict[str, Any]]:
    """Of each arm; stock's time over it, in the same round, of their median."""
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name}
        for kind in KINDS:
            mine, stock = arm.seconds[kind], arms[0].seconds[kind]
            row[f"{kind}_s"] = statistics.median(mine)
            ratios = [b / a for a, b in zip(mine, stock, strict=True)]
            row[f"{kind}_ratio"] = statistics.median(ratios)
            row[f"{kind}_kept_bytes"] = arm.kept_bytes[kind]
            row[f"{kind}_kept_of_stock"] = arm.kept_bytes[kind] / arms[0].kept_bytes[kind]
        rows.append(row)
    return rows


def _of_text(told: dict[str, Any], embeds: Tensor) -> dict[str, Any]:
    if not told:
        return {}
    return {"visual_mask": torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)}


def _kept(model: nn.Module, embeds: Tensor, step: Callable[[], None]) -> int:
    """Bytes of the memory that a step's forward keeps for its backward, each counted once."""
    known = {each.untyped_storage().data_ptr() for each in (embeds, *model.parameters())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(each: Tensor) -> Tensor:
        storage = each.untyped_storage()
        if storage.data_ptr() not in known:
            # Held, so that no other takes its place.
            kept[storage.data_ptr()] = storage.nbytes(), each
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        step()
    return sum(size for size, _ in kept.values())
