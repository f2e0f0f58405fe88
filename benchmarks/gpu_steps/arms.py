"""The arms: the ways to run one model that are compared. What each does to the model is here; how
they are timed is race.py's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import yopo
from yopo.counting.presets import Shape
from yopo.plan import recipes
from yopo.plan.sinks import Sinks

LIVE, FUSED, GRAPHED, COMPILED = "live", "fused", "graphed", "compiled"
NEEDED = {FUSED: "fuse", GRAPHED: "graphed"}  # of yopo, for a way


@dataclass(frozen=True)
class Arm:
    """One way to run a model.

    plan: a name of recipes.named_plan; None: stock. mass: HEAD[/CUT]. way: how the same mathematics
    is run, one of the words above; stock knows LIVE and COMPILED.
    """

    plan: str | None = None
    mass: str = ""
    way: str = LIVE

    @property
    def name(self) -> str:
        what = "stock SDPA" if self.plan is None else f"{self.plan} {self.mass}"
        return what if self.way == LIVE else f"{what}, {self.way}"

    def absent(self, shape: Shape) -> str | None:
        """Why this yopo does not know the arm; None: it does."""
        if self.way in NEEDED and not hasattr(yopo, NEEDED[self.way]):
            return f"there is no yopo.{NEEDED[self.way]}"
        try:
            self.plan_for(shape)
        except ValueError as error:
            return str(error)
        return None

    def plan_for(self, shape: Shape) -> yopo.PruningPlan | None:
        """Raises ValueError where the plan does not take the mass."""
        if self.plan is None:
            return None
        sizes = (shape.num_hidden_layers, shape.num_attention_heads)
        plan = recipes.named_plan(self.plan, *sizes)
        # Sinks cost the same whatever they are.
        sinks = Sinks(torch.zeros(sizes), torch.zeros(*sizes, shape.head_dim))
        return replace(plan, sinks=sinks).with_mass(self.mass)


PLANS = ("25", "12")
STOCK, STOCK_COMPILED = Arm(), Arm(way=COMPILED)
# Raced with every model and batch, the most telling first.
MAIN = (
    STOCK,
    *(Arm("12", "sink", way) for way in (GRAPHED, FUSED)),
    *(Arm("25", mass, FUSED) for mass in ("drop", "exact")),
    *(Arm("25", mass) for mass in ("drop", "exact")),
    *(Arm("25", "sink", way) for way in (GRAPHED, FUSED)),
    *(Arm("12", mass) for mass in ("drop", "exact")),
    *(Arm(plan, mass) for mass in ("sink", "exact/drop") for plan in PLANS),
)
ALL = (  # with the first only
    *MAIN,
    *(Arm(plan, "drop", GRAPHED) for plan in PLANS),
    Arm("12", "drop", FUSED),
)
FEW = (STOCK, Arm("12", "sink", FUSED), Arm("25", "drop"), Arm("25", "exact"))


@contextmanager
def entered(model: Any, shape: Shape, arm: Arm, compiled: Any = None) -> Iterator[Any]:
    """What to call as the model while `arm` is on it; afterwards the model is stock again.

    compiled: torch.compile's of `model`.
    """
    plan = arm.plan_for(shape)
    if plan is None:
        yield compiled if arm.way == COMPILED else model
        return
    with yopo.applied(model, plan):
        if arm.way == LIVE:
            yield model
            return
        yopo.fuse(model)  # graphs are of fused weights
        try:
            yield yopo.graphed(model) if arm.way == GRAPHED else model
        finally:
            yopo.unfuse(model)
