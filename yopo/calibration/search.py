"""A plan within a budget of visual FLOPs under which answers change least: coordinate search.

Heads, layer cut and window are moved one at a time; FFN neurons take what the budget leaves. Starts
from the hand-made plan for the budget: what is found is never worse on the held-out samples.
No randomness: the same model, samples and budget give the same plan. How a plan is made of a place
in the search is search_plans.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from yopo.calibration.budget import VisualCost
from yopo.calibration.config import SearchConfig
from yopo.calibration.divergence import Reference, divergence
from yopo.calibration.sample_statistics import Statistics
from yopo.calibration.search_plans import WINDOWS, PlanMaker, Point
from yopo.models.trial import decoder_of
from yopo.plan.pruning_plan import PruningPlan

STEPS = (1 / 4, 1 / 8, 1 / 16)  # of the layers and of the heads
OTHER_BUDGETS = (1 / 4, 1 / 2, 3 / 4, 3 / 2, 2)  # tried at the end, to show what others would cost


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


def search(
    model: nn.Module,
    known: Sequence[Reference],
    statistics: Statistics,
    config: SearchConfig,
    *,
    start: Sequence[PruningPlan] = (),
    progress: bool = False,
    log: Callable[[Evaluation], None] | None = None,
) -> Found:
    """The plan for `model` with at most the share `config.budget` of its dense visual FLOPs,
    counted on the prompts of `known`, under which these answers diverge least from the dense
    model's.

    known: `references` of samples held out. statistics: of this model. start: further plans to try
    first, with the config's masses. log: told of each plan tried.

    Raises ValueError for a budget that no plan it makes reaches, with the least that one does.
    """
    statistics.check(model)
    if not known:
        raise ValueError("there is no answer to choose a plan by: a search takes at least one")
    cost = VisualCost(decoder_of(model).config, [reference.prompt for reference in known])
    maker = PlanMaker(statistics, cost, config)
    maker.refuse_unreachable()
    bar = tqdm(desc="search", total=config.evaluations, disable=not progress)
    trials = _Trials(model, known, cost, config.evaluations, bar, log)

    point = maker.hand_made()
    trials.run("hand-made", maker.plan(point, even=True))
    _try_given(start, maker, trials, config)
    point = _descend(point, maker, trials)
    _try_other_budgets(point, maker, trials, config)
    within = [e for e in trials.done if e.visual_flops <= config.budget]
    chosen = min(within, key=lambda e: e.divergence)
    if chosen.divergence == math.inf:
        raise ValueError("no plan tried gives finite logits: look at the model's weights and dtype")
    bar.total = len(trials.done)
    bar.close()
    return Found(chosen.plan, config.budget, tuple(trials.done))


def _try_given(
    start: Sequence[PruningPlan], maker: PlanMaker, trials: _Trials, config: SearchConfig
) -> None:
    for plan in start[: config.evaluations - 1]:
        plan = replace(plan, **maker.masses)
        share = trials.cost.share(plan)
        if share > config.budget:
            raise ValueError(
                f"a plan to start from takes {share:.3f} of the visual FLOPs, more than the budget "
                f"of {config.budget:g}"
            )
        trials.run("given", plan)


def _try_other_budgets(
    point: Point, maker: PlanMaker, trials: _Trials, config: SearchConfig
) -> None:
    for factor in OTHER_BUDGETS[: max(0, config.evaluations - len(trials.done))]:
        other = config.budget * factor
        plan = maker.plan(point, budget=other) if other <= 1 else None
        if plan is not None:
            trials.run(f"budget {other:g}", plan)


def _descend(point: Point, maker: PlanMaker, trials: _Trials) -> Point:
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


class _Trials:
    """Runs plans, each once, and keeps what came out."""

    def __init__(
        self,
        model: nn.Module,
        known: Sequence[Reference],
        cost: VisualCost,
        evaluations: int,
        bar: Any,
        log: Callable[[Evaluation], None] | None,
    ) -> None:
        self._model, self._known, self.cost = model, known, cost
        self._bar, self._log = bar, log
        self.left = evaluations - len(OTHER_BUDGETS)  # for all but the last ones
        self.done: list[Evaluation] = []
        self._by_plan: dict[PruningPlan, Evaluation] = {}

    def run(self, why: str, plan: PruningPlan) -> Evaluation:
        if plan not in self._by_plan:
            self.left -= 1
            kl, same = (
                float(x.double().mean()) for x in divergence(self._model, plan, self._known)
            )
            kl = kl if math.isfinite(kl) else math.inf  # NaN would pass for the least
            tried = Evaluation(why, plan, self.cost.share(plan), kl, same)
            self._by_plan[plan] = tried
            self.done.append(tried)
            self._bar.update()
            if self._log is not None:
                self._log(tried)
        return self._by_plan[plan]
