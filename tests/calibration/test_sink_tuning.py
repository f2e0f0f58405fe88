"""Sinks moved by gradient: nearer to the answers known, never worse where held out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from calibration_samples import sample
from layouts import KEEP, SHAPE, build

import yopo
from yopo.calibration.divergence import mean_kl, references
from yopo.calibration.sink_tuning import tune_sinks
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks


def a_plan(sinks: Sinks | None = None, **changes: Any) -> PruningPlan:
    values = dict(layer_cut=2, head_mass="sink", cut_mass="sink")
    sinks = Sinks(torch.zeros(3, 4), torch.zeros(3, 4, 8), 12) if sinks is None else sinks
    return PruningPlan(KEEP, sinks=sinks, **(values | changes))


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SHAPE)


@pytest.fixture(scope="module")
def known(model: Any) -> Any:
    return references(model, [sample(seed) for seed in range(8)], 3)


@pytest.mark.parametrize("sinks", [None, Sinks(torch.zeros(3, 4), None, 12)])
def test_tuned_sinks_bring_the_answers_nearer(model: Any, known: Any, sinks: Any) -> None:
    plan = a_plan(sinks)
    tuned = tune_sinks(model, plan, known, known, steps=15)
    assert mean_kl(model, tuned, known) < 0.9 * mean_kl(model, plan, known)
    assert replace(tuned, sinks=plan.sinks) == plan and tuned.sinks.tokens == 12
    seen = KEEP[:2].bool()
    assert (tuned.sinks.a[:2][seen] == 0).all() and (tuned.sinks.a[:2][~seen] != 0).all()
    assert (tuned.sinks.b[:2][seen] == 0).all() and (tuned.sinks.b[2] != 0).any()


def test_what_is_held_out_never_gets_worse(model: Any, known: Any) -> None:
    # One sample to tune by, far too few, and others held out.
    plan = a_plan()
    tuned = tune_sinks(model, plan, known[:1], known[1:], steps=20)
    assert mean_kl(model, tuned, known[1:]) <= mean_kl(model, plan, known[1:])


def test_a_mass_that_is_no_sink_is_not_moved(model: Any, known: Any) -> None:
    tuned = tune_sinks(model, a_plan(cut_mass="exact"), known, known, steps=2).sinks
    assert (tuned.a[2] == 0).all() and (tuned.a[:2] != 0).any()


def test_the_model_is_left_as_it_was(known: Any) -> None:
    model = yopo.apply(build(SHAPE), a_plan()).train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune_sinks(model, a_plan(), known, known, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert yopo.plan_of(model) == a_plan() and model.training
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen == ["lm_head.weight"]
    assert all(weight.grad is None for weight in model.parameters())


def test_a_plan_without_sinks_is_refused(model: Any, known: Any) -> None:
    for plan in (PruningPlan(KEEP), a_plan(head_mass="drop", cut_mass="exact")):
        with pytest.raises(ValueError, match="there are no sinks to tune"):
            tune_sinks(model, plan, known, known, steps=1)
