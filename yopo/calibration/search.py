"""A plan within a budget of visual FLOPs under which answers change least.

Greedy: from the dense model down, each time what costs the answers least for the FLOPs it saves;
then exchanges, something put back and others taken away, while that helps. What a move loses is
measured, KL of the answers to held-out samples; which moves are worth measuring the statistics and
earlier measurements say. The plan by hand for the budget is tried first, and exchanges begin from
it if it is better: what is found is never worse on these samples. No randomness: the same model,
samples and settings give the same plan. What the moves are is search_plans.py's, running plans
search_trials.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from yopo.calibration.budget import VisualCost
from yopo.calibration.config import SearchConfig
from yopo.calibration.divergence import Reference
from yopo.calibration.sample_statistics import Statistics
from yopo.calibration.search_plans import Move, PlanMaker, Point
from yopo.calibration.search_trials import Evaluation, Trials
from yopo.models.trial import decoder_of
from yopo.plan.pruning_plan import PruningPlan

STEP = 0.7  # of the FLOPs stay in each round of the descent
AGAIN = 24  # moves that are measured anew in each round, the best by what was measured before
FEW = 8  # so many in an exchange
DESCENT = 0.6  # of the evaluations, at most; exchanges take the rest
EXCHANGES = 5  # of the best things to put back, tried before it is left at that
SLACK = 1.3  # moves together may lose so many times the sum of what each loses
LEAST = 4  # plans that a round takes at the least
FINE = 5e-3  # nats that a round may always lose
NOTHING = 1e-6  # nats: less than rounding moves


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
    path: str | Path | None = None,
    progress: bool = False,
    log: Callable[[Evaluation], None] | None = None,
) -> Found:
    """The plan for `model` with at most the share `config.budget` of its dense visual FLOPs,
    counted on the prompts of `known`, under which these answers diverge least from the dense
    model's.

    known: `references` of samples held out. statistics: of this model. start: further plans to
    begin from, with the config's masses: those within the budget are tried first, the others are
    pruned further, in the dense model's place. path: a file that is kept up to date with the plans
    tried: the same call goes on from where it was stopped, and one for another budget takes over
    what it can. log: told of each plan tried.

    Raises ValueError for a budget that no plan reaches, with the least that one does; CannotGoOn,
    which is one, where `path` is of another model or other samples.
    """
    statistics.check(model)
    if not known:
        raise ValueError("there is no answer to choose a plan by: a search takes at least one")
    cost = VisualCost(decoder_of(model).config, [reference.prompt for reference in known])
    maker = PlanMaker(statistics, cost, config)
    maker.refuse_unreachable()
    given = [replace(plan, **maker.masses) for plan in start]
    beyond = [plan for plan in given if cost.share(plan) > config.budget]
    given = [plan for plan in given if plan not in beyond]
    trials = Trials(
        model,
        known,
        cost,
        config.evaluations,
        mark=statistics.model,
        path=None if path is None else Path(path),
        log=log,
        progress=progress,
    )
    try:
        by_hand = maker.hand_made()
        least = ("least", maker.plan(maker.least))  # so that something is found whatever happens
        first = [least if by_hand is None else ("hand-made", by_hand)]
        first += [("given", plan) for plan in given]
        for why, plan in first[: config.evaluations]:
            trials.run(why, plan)
        above = [maker.point(plan) for plan in beyond] or [maker.dense]
        _Way(maker, trials, config).walk(above, [maker.point(plan) for _, plan in first])
    finally:
        trials.close()
    within = [e for e in trials.done if e.visual_flops <= config.budget]
    chosen = min(within, key=lambda e: e.divergence)
    if chosen.divergence == math.inf:
        raise ValueError("no plan tried gives finite logits: look at the model's weights and dtype")
    return Found(chosen.plan, config.budget, trials.done)


class _Way:
    """The way from the dense model to a plan within the budget."""

    def __init__(self, maker: PlanMaker, trials: Trials, config: SearchConfig) -> None:
        self._maker, self._trials, self._budget = maker, trials, config.budget
        self._shares: dict[Point, float] = {}
        self._rates: dict[Move, float] = {}  # nats for each share of the FLOPs, as last measured
        self._gains: dict[Move, float] = {}  # the same, of what is put back
        self._guessed = 1.0  # nats that 1 of `PlanMaker.guess` came to

    def walk(self, above: Sequence[Point], tried: Sequence[Point]) -> None:
        """Down from each point in `above`, and from the best of those and `tried` by exchanges,
        until nothing helps or no more plans may be tried."""
        spend = int(DESCENT * self._trials.left / len(above))
        reached = [self._descend(point, spend) for point in above]
        within = [p for p in (*reached, *tried) if p and self._share(p) <= self._budget]
        point = min(within, key=lambda p: self._kl("here", p), default=None)
        while point is not None and self._trials.left > 0:
            point = self._exchange(point)

    # -- down ----------------------------------------------------------------------------------

    def _descend(self, point: Point, spend: int, again: int = AGAIN) -> Point | None:
        """A point within the budget, after about `spend` more plans; None where no more may be
        tried before it is reached. again: as AGAIN."""
        last = self._trials.left - spend
        while (share := self._share(point)) > self._budget:
            options = self._cheaper(point)
            if self._trials.left < 3 or not options:
                return None
            left = self._trials.left - last
            rounds = math.log(self._budget / share) / math.log(STEP)
            rounds = max(1.0, min(rounds, left / LEAST))
            quota = int(left / rounds) - 2
            losses = self._losses(point, options, max(1, quota), again)
            goal = max(self._budget, share * (self._budget / share) ** (1 / rounds))
            point = self._together(point, losses, goal, careful=quota > LEAST)
        return point

    def _cheaper(self, point: Point) -> dict[Move, Point]:
        share = self._share(point)
        ways = self._maker.removals(point)
        return {move: to for move, to in ways if self._share(to) < share - 1e-12}

    def _losses(
        self, point: Point, options: dict[Move, Point], quota: int, again: int
    ) -> dict[Move, float]:
        """What each move loses, in nats, the best for the FLOPs that it saves first. At most
        `quota` are measured: those that never were, and the `again` best of the others; of the
        rest it is what they lost elsewhere, or what the statistics make of them."""
        base, saved, rates = self._kl("here", point), {}, {}
        for move, to in options.items():
            saved[move] = self._share(point) - self._share(to)
            guess = self._guessed * self._maker.guess(point, move, to) / saved[move]
            rates[move] = self._rates.get(move, guess)
        best = sorted(options, key=lambda move: rates[move])
        anew = set([move for move in best if move in self._rates][:again])
        measured, guesses = 0.0, 0.0
        for move in [move for move in best if move not in self._rates or move in anew]:
            if not self._trials.known(self._maker.plan(options[move])):
                if quota < 1 or self._trials.left < 2:
                    continue
                quota -= 1
            loss = max(self._kl(_why(move), options[move]) - base, 0) + NOTHING
            rates[move] = self._rates[move] = loss / saved[move]
            if math.isfinite(loss):
                measured += loss
                guesses += self._maker.guess(point, move, options[move])
        if guesses > 0:
            self._guessed = measured / guesses
        return {move: rates[move] * saved[move] for move in sorted(rates, key=lambda m: rates[m])}

    def _together(
        self, point: Point, losses: dict[Move, float], goal: float, careful: bool
    ) -> Point:
        """The best moves at once, so many as bring the FLOPs down to `goal`. careful: fewer where
        they would lose much, or together lose more than each alone."""
        base, best = self._kl("here", point), list(losses)
        while True:
            to, expected, made = point, base, set()
            ways = dict(self._maker.removals(to))
            for move in best:
                if move not in ways or move[:2] in made:
                    continue  # of a layer's heads, attention or FFN one at a time
                to, expected = ways[move], expected + losses[move]
                ways = dict(self._maker.removals(to))
                made.add(move[:2])
                if self._share(to) <= goal or (careful and expected > 2 * base + FINE):
                    break
            if not careful or len(made) == 1:
                return to
            if self._kl("together", to) <= max(SLACK * expected, base + FINE):
                return to
            best = [move for move in best if move[:2] in made][: len(made) // 2]

    # -- across --------------------------------------------------------------------------------

    def _exchange(self, point: Point) -> Point | None:
        """A better point within the budget; None where putting things back leads to none."""
        base, share = self._kl("here", point), self._share(point)
        ways = {to: move for move, to in self._maker.additions(point)}
        options = {move: to for to, move in ways.items() if self._share(to) > share + 1e-12}
        for again in (FEW, len(options)):
            gains = self._gain(point, options, again)
            for move in sorted(gains, key=lambda move: -gains[move])[:EXCHANGES]:
                if gains[move] <= 0:
                    break
                there = self._descend(options[move], self._trials.left, FEW)
                if there is not None and self._kl("exchanged", there) < base - NOTHING:
                    return there
        return None

    def _gain(self, point: Point, options: dict[Move, Point], again: int) -> dict[Move, float]:
        """What putting something back gains, in nats for each share of the FLOPs: of what was
        never measured, and of the `again` that gained most before."""
        base, share, gains = self._kl("here", point), self._share(point), {}
        known = sorted((m for m in options if m in self._gains), key=lambda m: -self._gains[m])
        for move in [m for m in options if m not in self._gains] + known[:again]:
            if self._trials.left > 0 or self._trials.known(self._maker.plan(options[move])):
                kl = self._kl(_why(move), options[move])
                gains[move] = (base - kl) / (self._share(options[move]) - share)
        self._gains |= gains
        return gains

    # ------------------------------------------------------------------------------------------

    def _share(self, point: Point) -> float:
        if point not in self._shares:
            self._shares[point] = self._maker.share(point)
        return self._shares[point]

    def _kl(self, why: str, point: Point) -> float:
        plan = self._maker.plan(point)
        if self._trials.left < 1 and not self._trials.known(plan):
            return math.inf
        return self._trials.run(why, plan).divergence


def _why(move: Move) -> str:
    field, layer, to = move
    return f"{field} {to}" if layer < 0 else f"{field} {to} in layer {layer}"
