"""What is compared: every variant by name, its plan, and what it costs. Nothing is run here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from network import GRID
from torch import Tensor

from yopo import PruningPlan, recipes
from yopo.calibration.head_rule import released_head_keep, solve_alpha
from yopo.counting import flops

BUDGETS = (50, 25, 12, 4)  # percent of the dense model's visual FLOPs
MASSES = ("drop", "exact", "sink")
PROMPT = flops.Prompt(text_before=1, grids=(GRID,), text_after=9)  # a question has 9 words
WINDOW = 5
# Made by hand in the manner of the paper's "half the layers, half the heads, half the FFN":
# layer cut, heads kept in all layers before it (the first two layers' are always), FFN ratio.
# None: nothing of that reaches 4 %, so visual tokens are frozen, and the heads are all there is.
BY_HAND = {50: (8, 24, 4 / 3), 25: (6, 12, 2), 12: (5, 8, 4.5), 4: (12, 12, None)}
FURTHER = {12: 25, 8: 12, 4: 8}  # a search prunes on what that for another budget has found
# What has no say in the mass, with the budgets that it can be had at.
RECIPES = {"ViCA": (25, 12, 4), "ShortV": (50, 25), "VTW": BUDGETS}
RIVALS = {
    "FastV": (50, 25, 12),
    "random after layer": (50, 25, 12),
    "random tokens": BUDGETS,
    "downsampling": BUDGETS,
}


@dataclass(frozen=True)
class Variant:
    """rule: who chose what is pruned: "hand" (released head rule), "search", one of RECIPES or
    RIVALS, or "dense". mass: of hand-made and searched plans. tuned: fine-tuned under the plan.
    taught: by the dense reader then, not by right answers (distillation)."""

    rule: str
    budget: int = 100
    mass: str = ""
    tuned: bool = False
    taught: bool = False

    @property
    def name(self) -> str:
        how = "taught" if self.taught else "tuned" if self.tuned else "plain"
        parts = (str(self.budget), self.rule, self.mass, how)
        return "-".join(filter(None, parts)).replace(" ", "-")


def all_variants() -> list[Variant]:
    """In the order of their importance: a run that is cut short has the first ones."""

    def of(rule: str, budgets: Sequence[int], *masses: str) -> list[Variant]:
        return [Variant(rule, budget, mass) for mass in masses or ("",) for budget in budgets]

    def tuned(some: Sequence[Variant]) -> list[Variant]:
        return [replace(variant, tuned=True) for variant in some]

    dense, hand = [Variant("dense")], of("hand", BUDGETS, *MASSES)
    other_masses = of("search", BUDGETS, *MASSES[1:])
    return [
        *of("search", (25, 12, 8, 4, 50), "drop"),
        *tuned(of("search", (12, 4, 25, 50), "drop")),
        *dense,
        *tuned(dense),
        *hand,
        *other_masses,
        *(one for rule, budgets in (RECIPES | RIVALS).items() for one in of(rule, budgets)),
        *tuned(hand),
        *tuned(other_masses),
        *tuned(of("ViCA", RECIPES["ViCA"])),  # made for it
        *tuned(of("downsampling", BUDGETS)),
        *(replace(one, tuned=True, taught=True) for one in of("search", (12, 4), *MASSES)),
    ]


def plan_by_hand(budget: int, ratios: Tensor) -> PruningPlan:
    """`ratios` (samples, layers, heads): the released rule's; the mass is `drop`."""
    cut, heads, ratio = BY_HAND[budget]
    below = ratios[:, :cut]
    alpha = solve_alpha(below, heads / (cut * ratios.shape[2]))
    keep = torch.zeros(ratios.shape[1:], dtype=torch.bool)
    keep[:cut] = released_head_keep(below, alpha)
    frozen: dict[str, Any] = {"ffn": 0, "visual_attention": False}
    passed = {"ffn_ratio": ratio, "window": WINDOW, "window_causal": True}  # trained causally
    return PruningPlan(
        keep,
        layer_cut=cut,
        head_mass="drop",
        cut_mass="drop",
        **(frozen if ratio is None else passed),
    )


def recipe(config: Any, rule: str, losing: Sequence[int]) -> PruningPlan:
    """The plan of one of RECIPES in which the layers `losing` lose what it takes from a layer."""
    layers = range(config.num_hidden_layers)
    if rule == "ViCA":
        return recipes.vica(config, layers=set(layers) - set(losing))
    if rule == "ShortV":
        return recipes.shortv(config, layers=losing)
    return recipes.vtw(config, layer=len(layers) - len(losing))


def within(config: Any, rule: str, order: Sequence[int], budget: float) -> PruningPlan | None:
    """The plan of `recipe` within the budget in which the fewest layers lose anything, the first of
    `order`; None if there is none."""
    plans = (recipe(config, rule, order[:count]) for count in range(len(order) + 1))
    return next((plan for plan in plans if shares(config, plan)[0] <= budget), None)


def shares(config: Any, plan: PruningPlan | None) -> tuple[float, float]:
    """Percent of the dense prefill's visual FLOPs, and of all its FLOPs in the layers."""

    def count(of: PruningPlan | None) -> tuple[float, float]:
        layers = flops.prefill_flops(config, PROMPT, of)
        return sum(x.visual for x in layers), sum(x.total for x in layers)

    ours, dense = count(plan), count(None)
    return 100 * ours[0] / dense[0], 100 * ours[1] / dense[1]
