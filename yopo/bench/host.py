"""The host's part of a pass: how long the program takes to launch it, where arithmetic costs next
to nothing. That is what bounds a GPU at batch 1. All arms in turn in each round, medians; and how
many operations a layer has.

The models are as deep as a 7B and very narrow. Times are of one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from yopo.models.attach import apply
from yopo.models.fusing import fuse
from yopo.plan import recipes
from yopo.plan.sinks import Sinks
from yopo.versions import CACHE_FIELD

LAYERS, HEADS, HEAD_DIM, SIDE, TEXT = 32, 32, 2, 6, 40
PHASES = ("prefill", "decode")
STOCK = "stock SDPA"
WAYS = ("live", "fused")
MASSES = ("drop", "sink", "exact")


@dataclass
class HostArm:
    """One way to run the model. seconds: of each prefill and of each decode step. operations: of
    one of each, a layer."""

    name: str
    prefill: Callable[[], Any]
    decode: Callable[[], Any]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})
    operations: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def measure_host(plan: str, device: torch.device, rounds: int) -> list[HostArm]:
    """Of stock, and of a plan of `recipes.named_plan` under each mass, live and fused."""
    arms = [_arm(STOCK, None, "live", device)]
    for mass in MASSES:
        arms += [_arm(f"{plan} {mass}, {way}", _plan(plan, mass), way, device) for way in WAYS]
    for arm in arms:
        for phase in PHASES:
            work = getattr(arm, phase)
            work()
            with _Operations() as seen:
                work()
            arm.operations[phase] = seen.count / LAYERS
    for phase in PHASES:
        for _ in tqdm(range(rounds), desc=f"host, {phase}"):
            for arm in arms:
                arm.seconds[phase].append(_seconds(getattr(arm, phase), device))
    return arms


def host_figures(arms: list[HostArm]) -> list[dict[str, Any]]:
    """Of each arm; ratios are its time over stock's in the same round, of their median."""
    stock = arms[0]
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name}
        for phase in PHASES:
            mine, theirs = arm.seconds[phase], stock.seconds[phase]
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            row[f"{phase}_ms"] = 1e3 * statistics.median(mine)
            row[f"{phase}_over_stock"] = statistics.median(ratios)
            row[f"{phase}_operations"] = arm.operations[phase]
            row[f"{phase}_operations_over_stock"] = arm.operations[phase] / stock.operations[phase]
        rows.append(row)
    return rows


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """That the host takes: the device is not waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _plan(name: str, mass: str) -> Any:
    plan = recipes.named_plan(name, LAYERS, HEADS)
    generator = torch.Generator().manual_seed(0)
    sinks = Sinks(
        torch.randn(LAYERS, HEADS, generator=generator),
        torch.randn(LAYERS, HEADS, HEAD_DIM, generator=generator),
    )
    return replace(plan, sinks=sinks).with_mass(mass)


def _arm(name: str, plan: Any, way: str, device: torch.device) -> HostArm:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).eval().to(device)
    embeds = torch.randn(1, TEXT + SIDE * SIDE, config.hidden_size, device=device)
    told: dict[str, Any] = {}
    if plan is not None:
        apply(model, plan)
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=device)
        visual[:, TEXT // 2 : TEXT // 2 + SIDE * SIDE] = True
        told = {"visual_mask": visual}
        if way == "fused":
            fuse(model)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    def prefill() -> Any:
        return getattr(model(inputs_embeds=embeds, use_cache=True, **told), CACHE_FIELD)

    cache = prefill()
    return HostArm(
        name, prefill, lambda: model(input_ids=token, use_cache=True, **{CACHE_FIELD: cache})
    )


class _Operations(TorchDispatchMode):
    """Counts the operations that compute or copy something; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += not _is_view(function, out)
        return out


def _is_view(function: Any, out: Any) -> bool:
    returned = function._schema.returns
    aliases = [each.alias_info for each in returned]
    if any(alias is not None and not alias.is_write for alias in aliases):
        return True
    first = out[0] if isinstance(out, tuple | list) and out else out
    return not isinstance(first, Tensor)
