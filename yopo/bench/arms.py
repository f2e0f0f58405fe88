"""The arms of a benchmark: the ways to run one model that are compared. What each does is here; how
they are timed is measure.py's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from yopo.bench.random_model import Case
from yopo.bench.simulation import can_simulate, simulate
from yopo.models import attach
from yopo.models.fusing import fuse
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import CACHE_FIELD, attention_is_switchable, has_rms_norm

ARMS = ("sdpa", "eager", "masked", "drop", "yopo")
CHOICES = (*ARMS, "live")  # live: ours by live weights, where it is asked for
ALWAYS = ("sdpa", "yopo")


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


def arms_of(names: Collection[str], model: Any, plan: PruningPlan | None, case: Case) -> list[Arm]:
    """The arms `names`, and those that always run. They share the model: each puts it in its own
    state first. The masked simulation is there for plans that the released code could compute, the
    plan with drop in the sinks' place for those that have sinks."""
    prefill, decode = partial(_prefill, model, case), partial(_decode, model, case)
    stock = partial(_as_stock, model)
    arms = {
        "sdpa": Arm("stock SDPA", prefill, decode, partial(stock, "sdpa")),
        "eager": Arm("stock eager", prefill, decode, partial(stock, "eager"), square=True),
    }
    if not attention_is_switchable():
        arms["eager"].failed = "needs transformers 4.48"
    if plan is not None and can_simulate(plan):
        masked = partial(_masked, model, plan, case)
        arms["masked"] = Arm("masked simulation", masked, None, partial(stock, "sdpa"), square=True)
    if plan is not None:
        prefill = partial(_prefill, model, case, **_told(case))
    if plan is not None and "sink" in (plan.head_mass, plan.cut_mass):
        bare = partial(_as_ours, model, plan.with_mass("drop"), case)
        arms["drop"] = Arm("yopo, drop", prefill, decode, bare)
    if plan is not None and has_rms_norm():
        live = partial(_as_ours, model, plan, case, fused=False)
        arms["live"] = Arm("yopo, live", prefill, decode, live)
    arms["yopo"] = Arm("yopo", prefill, decode, partial(_as_ours, model, plan, case))
    return [arm for name, arm in arms.items() if name in {*names, *ALWAYS}]


def _told(case: Case) -> dict[str, Any]:
    """Where the visual tokens are, as forward takes it."""
    mask = case.layout.visual.to(case.embeds.device)
    return {"visual_mask": mask, "visual_grids": case.layout.grids}


def _prefill(model: Any, case: Case, **told: Any) -> Any:
    """The cache that it leaves."""
    out = model(inputs_embeds=case.embeds, use_cache=True, **last_only(model), **told)
    return getattr(out, CACHE_FIELD)


def last_only(model: Any) -> dict[str, int]:
    """Logits of the last row alone, under the name this transformers has for it (none: all)."""
    known = inspect.signature(type(model).forward).parameters
    return {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in known}


def _decode(model: Any, case: Case, cache: Any) -> None:
    token = torch.zeros(case.embeds.shape[0], 1, dtype=torch.long, device=case.embeds.device)
    model(input_ids=token, use_cache=True, **{CACHE_FIELD: cache})


def _masked(model: Any, plan: PruningPlan, case: Case) -> None:
    released = replace(plan, head_mass="exact", cut_mass="exact")
    simulate(model.model, released, case.layout, case.embeds)


def _as_stock(model: Any, implementation: str) -> None:
    attach.remove(model)
    model.config._attn_implementation = implementation


def _as_ours(model: Any, plan: PruningPlan | None, case: Case, fused: bool = True) -> None:
    """Without a plan ours is stock, as a model of a config without one is under the patch."""
    _as_stock(model, "sdpa")
    if plan is not None:
        attach.apply(model, plan)
        for index in range(len(model.model.layers)):  # as after the first image ever
            model.model._yopo_layer_plans.on(index, case.embeds.device)
        if fused and has_rms_norm():
            fuse(model)
