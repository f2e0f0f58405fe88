"""Sinks fitted by least squares: against stock's attention maps, and by what answers lose."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from calibration_samples import inputs, naive, sample
from layouts import KEEP, SHAPE, Shape, build, make_case

import yopo
from yopo.calibration import collect as collecting
from yopo.calibration.divergence import mean_kl, references
from yopo.calibration.sink_fit import HELD_OUT, fit_sinks
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

TWO_IMAGES = [("text", 2), ("image", 2, 3, False), ("text", 2), ("image", 2, 3, False), ("text", 4)]

ONE_TOKEN = {"answer_ids": torch.tensor([[1]])}


def a_plan(**changes: Any) -> PruningPlan:
    return PruningPlan(KEEP, **({"window": 3, "layer_cut": 2, "ffn_ratio": 2} | changes))


def answered(case: Any) -> dict[str, Any]:
    """A sample whose answer is one token, which no pass is given."""
    return inputs(case) | ONE_TOKEN


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SHAPE)


def test_one_sample_gives_constants_of_stock_s_attention_maps(model: Any) -> None:
    case = make_case([TWO_IMAGES], 32, seed=3)
    sinks = fit_sinks(model, [answered(case)], a_plan(), target="dense").plan.sinks
    expected = naive(SHAPE, case).sinks + math.log(12)  # naive's are of one token each
    torch.testing.assert_close(sinks.a.double(), expected, rtol=1e-4, atol=1e-4)
    assert sinks.tokens == 12 and (sinks.b == 0).all()


def test_b_is_the_key_where_there_is_one_visual_token() -> None:
    # One layer, one visual token, always the same, and no rotation: its score is k·q and no more.
    model, first = build(Shape(layers=1)), sample(0, after=6)
    row = [("text", 2), ("image", 1, 1, False), ("text", 6)]
    samples = []
    for seed in range(8):
        given = inputs(make_case([row], 32, seed=seed))
        given["inputs_embeds"][:, :3] = first["inputs_embeds"][:, :3]
        samples.append(given | {"position_ids": torch.zeros(1, 9, dtype=torch.long)})
    plan = PruningPlan(torch.zeros(1, 4))
    sinks = fit_sinks(model, samples, plan, answer_tokens=1).plan.sinks
    layer = model.model.layers[0]
    with torch.no_grad():
        visual = layer.input_layernorm(samples[0]["inputs_embeds"][0, 2])
        key = layer.self_attn.k_proj(visual).unflatten(-1, (-1, 8)).repeat_interleave(2, 0)
    torch.testing.assert_close(sinks.b[0], key / 8**0.5, rtol=1e-2, atol=1e-3)
    assert sinks.a.abs().max() < 1e-3


def test_sinks_come_nearer_to_exact_than_drop_and_than_constants() -> None:
    shape = Shape(layers=3, heads=4, kv_heads=2)
    model, plan = build(shape), a_plan()
    fit = fit_sinks(model, [sample(seed, shape) for seed in range(24)], plan)
    known = references(model, [sample(seed, shape) for seed in range(50, 62)], 16, plan)
    constant = replace(fit.plan, sinks=replace(fit.plan.sinks, b=None))
    kl = {
        name: mean_kl(model, one, known)
        for name, one in {"drop": plan.with_mass("drop"), "a": constant, "a+b": fit.plan}.items()
    }
    assert kl["a+b"] < kl["a"] < 0.5 * kl["drop"], kl
    assert fit.after < 0.5 * fit.before and 0 < fit.with_b <= 1
    assert fit.plan == replace(plan, sinks=fit.plan.sinks, head_mass="sink", cut_mass="sink")


def test_what_is_reported_are_the_samples_held_out(model: Any) -> None:
    samples = [sample(seed) for seed in range(8)]
    fit = fit_sinks(model, samples, a_plan())
    known = references(model, samples[HELD_OUT - 1 :: HELD_OUT], 16, a_plan())
    assert fit.after == pytest.approx(mean_kl(model, fit.plan, known))
    assert fit.before == pytest.approx(mean_kl(model, a_plan().with_mass("drop"), known))
    assert fit.samples == 8 and f"{fit.after:.3g} with them" in str(fit)


def test_what_is_not_known_is_not_said_to_be_nan(model: Any) -> None:
    few = fit_sinks(model, [sample(0)], a_plan())
    assert "none held out to measure" in str(few) and "nan" not in str(few)
    nothing_blind = fit_sinks(
        model, [sample(seed) for seed in range(4)], PruningPlan.dense(model.config)
    )
    assert "no head is blind" in str(nothing_blind) and "nan" not in str(nothing_blind)


def test_masses_that_have_a_sink_stay_and_others_become_sinks(model: Any) -> None:
    old = Sinks(torch.zeros(3, 4))
    for masses in (("sink", "exact"), ("drop", "sink")):
        plan = a_plan(sinks=old, head_mass=masses[0], cut_mass=masses[1])
        fitted = fit_sinks(model, [sample(0)], plan).plan
        assert (fitted.head_mass, fitted.cut_mass) == masses and fitted.sinks != old
    fitted = fit_sinks(model, [sample(0)], a_plan(head_mass="drop")).plan
    assert (fitted.head_mass, fitted.cut_mass) == ("sink", "sink")


def test_blocks_of_queries_make_no_difference(model: Any, monkeypatch: Any) -> None:
    samples = [sample(seed, after=7) for seed in range(4)]
    whole = fit_sinks(model, samples, a_plan()).plan.sinks
    monkeypatch.setattr(collecting, "BLOCK", 2 * SHAPE.heads * 20)  # two or three queries at a time
    blocks = fit_sinks(model, samples, a_plan()).plan.sinks
    torch.testing.assert_close(blocks.a, whole.a, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(blocks.b, whole.b, rtol=1e-3, atol=1e-4)


def test_tuning_goes_on_from_the_fit_and_is_no_worse_held_out(model: Any) -> None:
    samples = [sample(seed % 3) for seed in range(8)]  # those held out are among those taught
    plain, tuned = (
        fit_sinks(model, samples, a_plan(), target="dense", tune=tune) for tune in (None, 10)
    )
    assert tuned.after < plain.after and tuned.before == plain.before


@pytest.mark.parametrize("target", ["exact", "dense"])
def test_the_model_and_its_plan_stay(target: str) -> None:
    plan = a_plan(cut_mass="drop")
    model = yopo.apply(build(SHAPE), plan).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit = fit_sinks(model, (sample(seed) for seed in range(9)), target=target, limit=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert yopo.plan_of(model) == plan and model.training and fit.samples == 3
    assert math.isnan(fit.after)  # no sample was held out


def no_image() -> dict[str, Any]:
    given = sample(0)
    given["visual_mask"] = torch.zeros_like(given["visual_mask"])
    given.pop("visual_grids", None)
    return given


@pytest.mark.parametrize(
    ("settings", "samples", "message"),
    [
        ({"plan": None}, None, "the model has no plan"),
        ({"target": "drop"}, None, "target is 'drop'; allowed: exact, dense"),
        ({"tune": 0}, None, "tune is 0"),
        ({"tune": 5}, [0], "1 samples to fit sinks to; give at least 4, to tune by"),
        ({}, [], "0 samples to fit sinks to; give at least one"),
        ({"limit": 0}, None, "limit is 0; allowed: whole numbers from 1"),
        ({"limit": True}, None, "limit is True"),
        ({"tune": 1.5}, None, "tune is 1.5; allowed: whole numbers from 1"),
        ({}, ["no text behind"] * 2, "no sample has text behind its image"),
        ({}, ["no image"], r"sample 0 \(the first is 0\) shows no image"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    model: Any, settings: dict[str, Any], samples: Any, message: str
) -> None:
    seeds = range(4) if samples is None else samples
    odd = {"no image": no_image(), "no text behind": sample(0, after=0) | ONE_TOKEN}
    given = [odd.get(seed) or sample(seed) for seed in seeds]
    with pytest.raises(ValueError, match=message):
        fit_sinks(model, given, **({"plan": a_plan()} | settings))
    assert yopo.plan_of(model) is None


def test_a_model_that_gives_nan_is_refused() -> None:
    model = build(SHAPE)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        fit_sinks(model, [sample(0)], a_plan())
