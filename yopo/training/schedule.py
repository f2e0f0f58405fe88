"""Plans that tighten as training goes on: `tightening` makes them, from one that prunes little to
the one that the model will run under, and `TightenPlan` puts them on. Knows no loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback

from yopo.models.attach import apply
from yopo.plan.config_fields import model_sizes
from yopo.plan.pruning_plan import PruningPlan


def tightening(
    plan: PruningPlan, config: Any, steps: int, stages: int = 4
) -> dict[int, PruningPlan]:
    """For `TightenPlan`: the step at which each of so many plans begins; the last is `plan`, from
    half of `steps` on, for the model that `config` describes.

    Stage i takes away i/stages of what the plan does: the layer cut comes down from the last layer,
    heads go from the last layers first, FFN neurons in all layers alike. Windows, masses, and where
    visual tokens attend are the plan's from the start.

    Raises ValueError for a plan that does not fit, and fewer than two steps for each stage.
    """
    plan.validate(config)
    if stages < 1 or steps < 2 * stages:
        raise ValueError(
            f"stages is {stages}, steps {steps}; allowed: from 1 stage, with two steps for each"
        )
    layers, _, neurons = model_sizes(config)
    going = (~plan.head_keep).flatten().nonzero().flatten().flip(0)  # the last layers' first
    kept = plan.ffn_neurons(neurons)

    def at(share: float) -> PruningPlan:
        keep = plan.head_keep.flatten() | False
        keep[going[round(share * len(going)) :]] = True
        return replace(
            plan,
            head_keep=keep.view_as(plan.head_keep),
            layer_cut=layers - round(share * (layers - plan.layer_cut)),
            ffn_ratio=1,
            ffn=tuple(neurons - round(share * (neurons - each)) for each in kept),
        )

    begins = [stage * (steps // 2) // max(1, stages - 1) for stage in range(stages)]
    looser = [at(stage / stages) for stage in range(1, stages)]
    return dict(zip(begins, [*looser, plan], strict=True))


class TightenPlan(TrainerCallback):
    """Puts a plan on at the beginning of the steps that `plans` names, 0 being the first: from one
    that prunes little to the one that the model will run under. Training that is resumed begins
    with the plan of the step it has come to."""

    def __init__(self, plans: Mapping[int, PruningPlan]) -> None:
        if any(not isinstance(plan, PruningPlan) for plan in plans.values()):
            raise TypeError("plans has values that are no PruningPlan; load them first")
        if not plans or min(plans) != 0:
            raise ValueError(f"plans begin at steps {sorted(plans)}; there must be one at step 0")
        self._plans = dict(sorted(plans.items()))
        self._begun: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = None
        self._put(kwargs["model"], state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put(kwargs["model"], state.global_step)

    def _put(self, model: Any, step: int) -> None:
        begun = max(start for start in self._plans if start <= step)
        if begun != self._begun:
            apply(model, self._plans[begun])
            self._begun = begun
