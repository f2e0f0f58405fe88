"""The plans that a search tries: where it stands, as a `Point`, and the plan within the budget that
a point stands for. Runs no model; which points are tried is search.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from yopo.calibration.budget import VisualCost
from yopo.calibration.config import SearchConfig
from yopo.calibration.head_rule import released_head_keep, solve_alpha
from yopo.calibration.sample_statistics import Statistics
from yopo.plan.pruning_plan import PruningPlan

# (window, window_causal); the causal ones take from visual tokens only what the model never had.
WINDOWS = ((5, False), (5, True), (9, True), (None, False), (3, True))


@dataclass(frozen=True)
class Point:
    """Where the search stands.

    cut: layer cut. heads: share of the heads below it that are kept. first: layers that keep all.
    by: what heads are ranked by, a field of Statistics. zero: the plan's prune_visual_queries.
    """

    cut: int
    heads: float
    first: int = 2
    by: str = "ratios"
    window: tuple[int | None, bool] = WINDOWS[0]
    zero: bool = True


class PlanMaker:
    """Makes plans of points."""

    def __init__(self, statistics: Statistics, cost: VisualCost, config: SearchConfig) -> None:
        self._statistics, self._cost, self._budget = statistics, cost, config.budget
        self.masses = config.mass_fields(statistics)
        _, self.layers, self.heads = statistics.ratios.shape

    def plan(
        self, point: Point, even: bool = False, budget: float | None = None
    ) -> PruningPlan | None:
        """None where not one neuron is left within the budget. even: the share of neurons is that
        of heads, where the budget allows it."""
        scores = getattr(self._statistics, point.by)[:, : point.cut]
        alpha = solve_alpha(scores, point.heads, keep_first=point.first)
        keep = torch.zeros(self.layers, self.heads, dtype=torch.bool)
        keep[: point.cut] = released_head_keep(scores, alpha, keep_first=point.first)
        window, causal = point.window
        plan = PruningPlan(
            keep,
            window=window,
            window_causal=causal,
            layer_cut=point.cut,
            prune_visual_queries=point.zero,
            **self.masses,
        )
        ratio = self._cost.ffn_ratio_within(plan, self._budget if budget is None else budget)
        if ratio is None:
            return None
        if even:
            ratio = max(ratio, min(1 / point.heads, self._cost.shape.intermediate_size))
        return replace(plan, ffn_ratio=ratio)

    def within(self, point: Point) -> Point | None:
        """`point`, or where that leaves no neuron within the budget, with fewer heads, of which the
        first layers then need not keep all; None if that does not help either."""
        few = 1 / (point.cut * self.heads)
        for first in range(point.first, -1, -1):
            for part in (1.0, 0.75, 0.5, 0.25, 0.0):
                fewer = replace(point, first=first, heads=max(few, part * point.heads))
                if self.plan(fewer) is not None:
                    return fewer
        return None

    def hand_made(self) -> Point:
        """Half the layers, and of heads and FFN so much that the budget holds: half and half for a
        quarter of the FLOPs. Where that is no plan: fewer heads, then fewer layers."""
        share = min(1.0, 2 * self._budget)
        cuts = range(max(1, self.layers // 2), 0, -1)
        points = (self.within(Point(cut, share)) for cut in cuts)
        return next(point for point in points if point is not None)

    def refuse_unreachable(self) -> None:
        """Raises ValueError unless some plan with these masses is within the budget."""
        point = Point(1, 1 / self.heads, first=0)
        if self.plan(point) is None:
            least = self.plan(point, budget=float("inf"))
            size = self._cost.shape.intermediate_size
            share = self._cost.share(replace(least, ffn_ratio=size))
            masses = f"{least.head_mass}/{least.cut_mass}"
            raise ValueError(
                f"budget is {self._budget:g}, which no plan with mass {masses} of the search "
                f"reaches (it starts from window 5, at the least one head of one layer): its least "
                f"is {share:.4f} of the visual FLOPs. Give more"
                + ("; drop and sink take less" if "exact" in masses else "")
            )
