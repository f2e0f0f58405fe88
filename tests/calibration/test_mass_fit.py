"""Constants fitted to a plan: nearer to the dense answers, never worse where held out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from calibration_samples import sample
from layouts import KEEP, SHAPE, build

import yopo
from yopo.calibration import mass_fit
from yopo.calibration.divergence import divergence, references
from yopo.plan.pruning_plan import PruningPlan


def a_plan(**changes: Any) -> PruningPlan:
    values = dict(layer_cut=2, head_mass="calibrated", cut_mass="calibrated")
    values["text_mass"] = torch.full((3, 4), 0.5)
    return PruningPlan(KEEP, **(values | changes))


def kl(model: Any, plan: PruningPlan, known: Any) -> float:
    return float(divergence(model, plan, known).kl.mean())


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SHAPE)


@pytest.fixture(scope="module")
def known(model: Any) -> Any:
    return references(model, [sample(seed) for seed in range(8)], 3)


def test_fitted_constants_bring_the_answers_nearer(model: Any, known: Any) -> None:
    plan = a_plan()
    fitted = mass_fit.fit_text_mass(model, plan, known, known, steps=15)
    before = min(kl(model, one, known) for one in (plan, replace(plan, text_mass=torch.ones(3, 4))))
    assert kl(model, fitted, known) < 0.9 * before
    assert replace(fitted, text_mass=plan.text_mass) == plan  # nothing else is changed
    used = torch.cat([~KEEP[:2].bool(), torch.ones(1, 4, dtype=torch.bool)])
    moved = fitted.text_mass != plan.text_mass
    assert moved[used].any() and fitted.text_mass.min() >= 0 and fitted.text_mass.max() <= 1


def test_what_is_held_out_never_gets_worse(model: Any, known: Any) -> None:
    # One sample to fit, far too few, and others held out.
    plan = a_plan(text_mass=torch.full((3, 4), 0.8))
    fitted = mass_fit.fit_text_mass(model, plan, known[:1], known[1:], steps=20)
    assert kl(model, fitted, known[1:]) <= kl(model, plan, known[1:])


def test_gradients_reach_the_constants_in_use_and_no_others(
    model: Any, known: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    step = torch.optim.Adam.step

    def looking(self: Any, *arguments: Any) -> Any:
        (mass,) = self.param_groups[0]["params"]
        seen.append(mass.grad.clone())
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", looking)
    mass_fit.fit_text_mass(model, a_plan(), known, known, steps=1)
    assert torch.equal(seen[0][:2] == 0, KEEP[:2].bool())
    assert (seen[0][2] != 0).all()


def test_the_model_is_left_as_it_was(known: Any) -> None:
    model = yopo.apply(build(SHAPE), a_plan()).train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mass_fit.fit_text_mass(model, a_plan(), known, known, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert yopo.plan_of(model) == a_plan() and model.training
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen == ["lm_head.weight"]
    assert all(weight.grad is None for weight in model.parameters())


def test_a_plan_without_constants_is_refused(model: Any, known: Any) -> None:
    with pytest.raises(ValueError, match="no constants to fit"):
        mass_fit.fit_text_mass(model, PruningPlan(KEEP), known, known)
