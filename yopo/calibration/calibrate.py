"""`yopo.calibrate`: from a model and samples to a plan. Puts the parts together: statistics
(collect.py), the head rule (rules.py), or a search under a budget (search.py)."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from itertools import islice
from typing import Any

from torch import Tensor, nn

from yopo.calibration.collect import collect
from yopo.calibration.head_rule import released_head_keep, solve_alpha
from yopo.calibration.sample_statistics import Statistics
from yopo.plan.pruning_plan import PruningPlan, split_masses

RULES = ("released",)


def calibrate(
    model: nn.Module,
    samples: Iterable[dict[str, Any]] = (),
    *,
    budget: float | None = None,
    held_out: Iterable[dict[str, Any]] | None = None,
    mass: str = "calibrated",
    statistics: Statistics | None = None,
    limit: int | None = None,
    progress: bool = False,
    **chosen: Any,
) -> PruningPlan:
    """A plan for `model`, made from `samples`, model inputs of one prompt each (sample.py).

    budget: the plan under which visual tokens take at most this share of the dense model's FLOPs
    for them and the answers of `held_out` (default: every second sample, which the statistics then
    leave out) change least (search.py).
    Without a budget: the plan by a head rule; `chosen` are arguments of `plan_from` (rule, alpha or
    keep, window, window_causal, layer_cut, ffn_ratio).
    mass: HEAD[/CUT], the plan's head_mass and cut_mass.
    statistics: of this model, in place of taking them. limit: take only so many samples.

    The model and its plan stay as they are. Visual tokens use the first FFN neurons as they are;
    `yopo.calibration.neurons.reorder` ranks them first, in place, as the command line does.

    Raises ValueError naming what does not fit, TypeError for an argument that there is not.
    """
    if unknown := chosen.keys() - signature(plan_from).parameters.keys():
        raise TypeError(f"calibrate takes no {sorted(unknown)[0]!r}")
    if budget is not None:
        if chosen:
            raise ValueError(
                f"{next(iter(chosen))} and budget are both given: a budget chooses the plan"
            )
        from yopo.calibration.search import search, split

        if held_out is None:
            samples, held_out = split(list(islice(samples, limit)))
        if statistics is None:
            statistics = collect(model, samples, limit=limit, progress=progress, influence=False)
        return search(model, held_out, budget, statistics, mass=mass, progress=progress).plan
    if held_out is not None:
        raise ValueError("held_out is given without a budget: only the search needs it")
    if statistics is None:
        statistics = collect(model, samples, limit=limit, progress=progress, influence=False)
    statistics.check(model)
    return plan_from(statistics, mass=mass, **chosen)


def plan_from(
    statistics: Statistics,
    *,
    rule: str = "released",
    alpha: float | None = None,
    keep: float | None = None,
    window: int | None = 5,
    window_causal: bool = False,
    layer_cut: int | None = None,
    ffn_ratio: float = 2,
    mass: str = "calibrated",
) -> PruningPlan:
    """The plan by a head rule, of the model that the statistics are of. Takes no time.

    Heads by `rule` with threshold `alpha`, or the one at which the share `keep` of the heads of all
    layers is kept (default 0.5; the first two layers keep theirs whatever it is); layer_cut None:
    half the layers. window, window_causal, ffn_ratio: as the plan's.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; allowed: {', '.join(RULES)}")
    if alpha is not None and keep is not None:
        raise ValueError("alpha and keep are both given: each decides how many heads are kept")
    if keep is not None and not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep!r}; allowed: a share of the heads, 0 to 1")
    ratios, masses = statistics.ratios, masses_of(mass)
    if alpha is None:
        alpha = solve_alpha(ratios, 0.5 if keep is None else keep)
    return PruningPlan(
        released_head_keep(ratios, alpha),
        window=window,
        window_causal=window_causal,
        layer_cut=ratios.shape[1] // 2 if layer_cut is None else layer_cut,
        ffn_ratio=ffn_ratio,
        **masses,
        text_mass=text_mass_for(masses, statistics),
    )


def masses_of(mass: str) -> dict[str, str]:
    """The fields head_mass and cut_mass of HEAD[/CUT]; raises ValueError for other words."""
    return dict(zip(("head_mass", "cut_mass"), split_masses(mass), strict=True))


def text_mass_for(masses: dict[str, str], statistics: Statistics) -> Tensor | None:
    """The constants that a plan with these masses carries."""
    return statistics.text_mass() if "calibrated" in masses.values() else None
