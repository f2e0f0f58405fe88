"""A plan within a budget of visual FLOPs under which answers change least: coordinate search.

Heads, layer cut and window are moved one at a time; FFN neurons take what the budget leaves. Starts
from the hand-made plan for the budget: what is found is never worse on the held-out samples.
No randomness: the same model, samples and budget give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from yopo.calibration.budget import VisualCost
from yopo.calibration.calibrate import masses_of, text_mass_for
from yopo.calibration.divergence import Reference, divergence, references
from yopo.calibration.head_rule import released_head_keep, solve_alpha
from yopo.calibration.sample_statistics import Statistics
from yopo.models.trial import stack_of
from yopo.plan.pruning_plan import PruningPlan

# (window, window_causal); the causal ones take from visual tokens only what the model never had.
WINDOWS = ((5, False), (5, True), (9, True), (None, False), (3, True))
STEPS = (1 / 4, 1 / 8, 1 / 16)  # of the layers and of the heads
OTHER_BUDGETS = (1 / 4, 1 / 2, 3 / 4, 3 / 2, 2)  # tried at the end, to show what others would cost


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


@dataclass(frozen=True)
class Evaluation:
    """One plan tried. why: which move led to it. visual_flops: share of the dense model's.
    divergence, same: means over the held-out samples (divergence.Change)."""

    why: str
    plan: PruningPlan
    visual_flops: float
    divergence: float
    same: float


@dataclass(frozen=True)
class Found:
    """What a search came to. evaluations: all, in order, the hand-made plan first."""

    plan: PruningPlan
    budget: float
    evaluations: tuple[Evaluation, ...]

    @property
    def chosen(self) -> Evaluation:
        return next(e for e in self.evaluations if e.plan is self.plan)

    def front(self) -> list[Evaluation]:
        """The Pareto front: those that nothing tried beats in FLOPs and divergence at once."""
        front: list[Evaluation] = []
        for e in sorted(self.evaluations, key=lambda e: (e.visual_flops, e.divergence)):
            if not front or e.divergence < front[-1].divergence:
                front.append(e)
        return front


def split(samples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(for statistics, held out): every second sample is held out. Fewer would do for statistics
    of the rest, but the search chooses by the few that are, and what it finds is best for these."""
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples: a search holds every second out; give more")
    return list(samples[::2]), list(samples[1::2])


def search(
    model: nn.Module,
    held_out: Iterable[dict[str, Any]],
    budget: float,
    statistics: Statistics,
    *,
    mass: str = "calibrated",
    start: Sequence[PruningPlan] = (),
    evaluations: int = 40,
    answer_tokens: int = 16,
    known: Sequence[Reference] | None = None,
    progress: bool = False,
    log: Callable[[Evaluation], None] | None = None,
) -> Found:
    """The plan for `model` with at most the share `budget` of its dense visual FLOPs, counted on
    the prompts of `held_out`, under which their answers diverge least from the dense model's.

    statistics: of this model. mass: HEAD[/CUT]. start: further plans to try first, with these
    masses. evaluations: most plans tried. answer_tokens: of the dense model's answer where a sample
    has none. known: `references` of held_out, if taken already. log: told of each plan tried.

    Raises ValueError for a budget that no plan it makes reaches, with the least that one does.
    """
    statistics.check(model)
    held_out = list(held_out)
    if not 0 < budget <= 1:
        raise ValueError(f"budget is {budget!r}; allowed: above 0, to 1 (all visual FLOPs)")
    if evaluations < 1 or (known is None and not len(held_out)):
        raise ValueError(
            f"evaluations is {evaluations} and held_out has {len(held_out)} samples; a search "
            "takes at least one of each"
        )
    masses: dict[str, Any] = masses_of(mass)
    masses["text_mass"] = text_mass_for(masses, statistics)
    if known is None:
        known = references(model, held_out, answer_tokens)
    cost = VisualCost(stack_of(model).config, [reference.prompt for reference in known])
    maker = _Maker(statistics, cost, masses, budget)
    maker.refuse_unreachable()
    bar = tqdm(desc="search", total=evaluations, disable=not progress)
    trials = _Trials(model, known, cost, evaluations - len(OTHER_BUDGETS), bar, log)

    point = maker.hand_made()
    trials.run("hand-made", maker.plan(point, even=True))
    for plan in start[: max(0, evaluations - 1)]:
        plan = replace(plan, **masses)
        if cost.share(plan) > budget:
            raise ValueError(
                f"a plan to start from takes {cost.share(plan):.3f} of the visual FLOPs, more than "
                f"the budget of {budget:g}"
            )
        trials.run("given", plan)
    point = _descend(point, maker, trials)
    trials.left = evaluations - len(trials.done)
    for factor in OTHER_BUDGETS[: max(0, trials.left)]:
        other = budget * factor
        plan = maker.plan(point, budget=other) if other <= 1 else None
        if plan is not None:
            trials.run(f"budget {other:g}", plan)
    within = [e for e in trials.done if e.visual_flops <= budget]
    chosen = min(within, key=lambda e: e.divergence)
    if chosen.divergence == math.inf:
        raise ValueError("no plan tried gives finite logits: look at the model's weights and dtype")
    bar.total = len(trials.done)
    bar.close()
    return Found(chosen.plan, budget, tuple(trials.done))


def _descend(point: Point, maker: _Maker, trials: _Trials) -> Point:
    """Where no move from `point`, or from like points with other layer cuts, helps any more."""
    if trials.left < 1:
        return point
    best = trials.run("FFN fills the budget", maker.plan(point))
    for quarters in (1, 3, 4):
        cut = max(1, maker.layers * quarters // 4)
        other = maker.within(replace(point, cut=cut, first=2))
        if other is not None and trials.left > 0:
            tried = trials.run(f"{cut} layers", maker.plan(other))
            best, point = min((best, point), (tried, other), key=lambda pair: pair[0].divergence)
    for step in STEPS:
        moved = True
        while moved and trials.left > 0:
            moved = False
            for move in _moves(step):
                # A move that helped is made again.
                while trials.left > 0 and (ahead := move.of(point, maker.layers)) is not None:
                    ahead = maker.within(ahead)
                    if ahead is None:
                        break
                    tried = trials.run(move.name, maker.plan(ahead))
                    if tried.divergence >= best.divergence:
                        break
                    best, point, moved = tried, ahead, True
    return point


@dataclass(frozen=True)
class _Move:
    """A step along one coordinate. of: (point, layers) → the point it leads to, None if to none."""

    name: str
    of: Callable[[Point, int], Point | None]


def _moves(step: float) -> Iterator[_Move]:
    """By layers and heads at each step size, the rest at the largest only."""
    for sign, more in ((-1, "fewer"), (1, "more")):

        def cut(point: Point, layers: int, sign: int = sign) -> Point | None:
            to = point.cut + sign * max(1, round(step * layers))
            return replace(point, cut=to) if 1 <= to <= layers else None

        def heads(point: Point, layers: int, sign: int = sign) -> Point | None:
            to = min(1.0, point.heads + sign * step)
            return replace(point, heads=to) if 0 < to != point.heads else None

        yield _Move(f"{more} layers", cut)
        yield _Move(f"{more} heads", heads)
    if step != STEPS[0]:
        return
    for window in WINDOWS:

        def look(point: Point, layers: int, window: Any = window) -> Point | None:
            return replace(point, window=window) if window != point.window else None

        yield _Move("window", look)
    for first in (2, 1, 0):

        def whole(point: Point, layers: int, first: int = first) -> Point | None:
            return replace(point, first=first) if first != point.first else None

        yield _Move("first layers", whole)
    by = {"ratios": "visual_mass", "visual_mass": "ratios"}
    yield _Move("ranking of heads", lambda point, layers: replace(point, by=by[point.by]))
    yield _Move("visual queries", lambda point, layers: replace(point, zero=not point.zero))


class _Maker:
    """Makes plans of points."""

    def __init__(
        self, statistics: Statistics, cost: VisualCost, masses: dict[str, Any], budget: float
    ) -> None:
        self._statistics, self._cost, self._masses = statistics, cost, masses
        self._budget = budget
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
            **self._masses,
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
                + ("; drop and calibrated take less" if "exact" in masses else "")
            )


class _Trials:
    """Runs plans, each once, and keeps what came out."""

    def __init__(
        self,
        model: nn.Module,
        known: Sequence[Reference],
        cost: VisualCost,
        left: int,
        bar: Any,
        log: Callable[[Evaluation], None] | None,
    ) -> None:
        self._model, self._known, self._cost = model, known, cost
        self._bar, self._log = bar, log
        self.left = left
        self.done: list[Evaluation] = []
        self._by_plan: dict[PruningPlan, Evaluation] = {}

    def run(self, why: str, plan: PruningPlan) -> Evaluation:
        if plan not in self._by_plan:
            self.left -= 1
            kl, same = (
                float(x.double().mean()) for x in divergence(self._model, plan, self._known)
            )
            kl = kl if math.isfinite(kl) else math.inf  # NaN would pass for the least
            tried = Evaluation(why, plan, self._cost.share(plan), kl, same)
            self._by_plan[plan] = tried
            self.done.append(tried)
            self._bar.update()
            if self._log is not None:
                self._log(tried)
        return self._by_plan[plan]
