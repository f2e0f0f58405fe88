"""What is compared: every variant by name, its plan, and what it costs. Nothing is run here."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from network import GRID
from torch import Tensor

from yopo import PruningPlan
from yopo.calibration.head_rule import released_head_keep, solve_alpha
from yopo.counting import flops

BUDGETS = (50, 25, 12)  # percent of the dense model's visual FLOPs
MASSES = ("exact", "drop", "calibrated")
PROMPT = flops.Prompt(text_before=1, grids=(GRID,), text_after=9)  # a question has 9 words
WINDOW = 5
# Made by hand in the manner of the paper's "half the layers, half the heads, half the FFN":
# layer cut, heads kept in all layers before it (the first two layers' are always), FFN ratio.
BY_HAND = {50: (8, 24, 4 / 3), 25: (6, 12, 2), 12: (5, 8, 4.5)}


@dataclass(frozen=True)
class Variant:
    """mass: of the plan; "fitted" is "calibrated" with constants fitted to the plan as a whole.
    rule: who chose the plan: "hand" (released head rule), "random" (heads) or "search".
    neurons: "ranked" by use, or the "first". tuned: fine-tuned under the plan."""

    budget: int
    mass: str
    tuned: bool = False
    rule: str = "hand"
    neurons: str = "ranked"
    seed: int = 0

    @property
    def name(self) -> str:
        tail = f"-{self.seed}" if self.rule == "random" else ""
        tuned = "tuned" if self.tuned else "plain"
        return f"{self.budget}-{self.rule}{tail}-{self.neurons}-{self.mass}-{tuned}"


def all_variants() -> list[Variant]:
    """In the order of their importance: the grid, then one change at a time."""
    grid = [Variant(budget, mass) for budget in BUDGETS for mass in MASSES]
    some = [Variant(budget, "calibrated") for budget in BUDGETS]
    changes = [replace(v, mass="fitted") for v in some]
    changes += [replace(v, rule="search") for v in some]
    changes += [replace(v, rule="search", mass="fitted") for v in some]
    changes += [replace(v, neurons="first") for v in some]
    changes += [replace(v, rule="random", seed=seed) for seed in range(3) for v in some]
    searched = [Variant(budget, "drop", rule="search") for budget in BUDGETS]
    changes += [replace(v, rule="search", neurons="first") for v in some]
    searched += [replace(v, tuned=True) for v in searched]
    return grid + [replace(v, tuned=True) for v in grid] + changes + searched


def plan_by_hand(budget: int, ratios: Tensor) -> PruningPlan:
    """`ratios` (samples, layers, heads): the released rule's; the mass is `drop`."""
    cut, heads, ratio = BY_HAND[budget]
    below = ratios[:, :cut]
    alpha = solve_alpha(below, heads / (cut * ratios.shape[2]))
    keep = torch.zeros(ratios.shape[1:], dtype=torch.bool)
    keep[:cut] = released_head_keep(below, alpha)
    return PruningPlan(
        head_keep=keep,
        window=WINDOW,
        layer_cut=cut,
        ffn_ratio=ratio,
        head_mass="drop",
        cut_mass="drop",
        window_causal=True,  # the dense model saw its pictures causally
    )


def with_random_heads(plan: PruningPlan, seed: int) -> PruningPlan:
    """As many heads below the cut, any of them but in the first two layers: there all, as by the
    released rule."""
    keep = plan.head_keep.clone()
    ruled = keep[2 : plan.layer_cut]
    order = torch.randperm(ruled.numel(), generator=torch.Generator().manual_seed(seed))
    keep[2 : plan.layer_cut] = (order < int(ruled.sum())).view(ruled.shape)
    return replace(plan, head_keep=keep)


def with_mass(plan: PruningPlan, mass: str, text_mass: Tensor) -> PruningPlan:
    mass = "calibrated" if mass == "fitted" else mass
    constants = text_mass if mass == "calibrated" else None
    return replace(plan, head_mass=mass, cut_mass=mass, text_mass=constants)


def shares(config: Any, plan: PruningPlan | None) -> tuple[float, float]:
    """Percent of the dense prefill's visual FLOPs, and of all its FLOPs in the layers."""

    def count(of: PruningPlan | None) -> tuple[float, float]:
        layers = flops.prefill_flops(config, PROMPT, of)
        visual = sum(x.visual_projections + x.visual_attention + x.visual_ffn for x in layers)
        return visual, sum(x.total for x in layers)

    ours, dense = count(plan), count(None)
    return 100 * ours[0] / dense[0], 100 * ours[1] / dense[1]
