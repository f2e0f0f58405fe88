"""`yopo.calibrate`: the plan that the parts make together, and what cannot be asked of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import SHAPE, Shape, build, make_case
from test_collect import inputs, naive, sample
from test_statistics import made_up

import yopo
from yopo.calibration.collect import collect
from yopo.calibration.divergence import divergence, references
from yopo.calibration.head_rule import released_head_keep
from yopo.plan.pruning_plan import PruningPlan

FOUR = Shape(layers=4, heads=4, kv_heads=4, intermediate=48)
ROWS = [[("text", 2), ("image", 3, 4, False), ("text", 4)], [("image", 2, 2, False), ("text", 3)]]


def test_the_released_rule_gives_the_mask_of_stock_s_attention_maps() -> None:
    cases = [make_case([row], 32, seed=seed) for seed in range(3) for row in ROWS]
    model = build(SHAPE)
    ratios = torch.stack([naive(SHAPE, case).ratios for case in cases])
    samples, kept = [inputs(case) for case in cases], []
    for quantile in (0.2, 0.5, 0.8):
        alpha = float(ratios[:, 2].quantile(quantile))
        plan = yopo.calibrate(model, samples, alpha=alpha, mass="drop")
        assert torch.equal(plan.head_keep, released_head_keep(ratios, alpha))
        kept.append(int(plan.head_keep[2].sum()))
    assert len(set(kept)) > 1  # the rule had something to choose


def test_half_the_heads_stay_unless_said_otherwise() -> None:
    statistics = replace(made_up(5), model=made_up().model)
    model = build(SHAPE)
    plan = yopo.calibrate(model, statistics=statistics, keep=0.75)
    assert plan.head_keep.sum() == 9
    many = replace(made_up(5, 8, 4, 24), model=collect(build(Shape(layers=8)), [sample(0)]).model)
    plan = yopo.calibrate(build(Shape(layers=8)), statistics=many)
    assert plan.head_keep.sum() == 16 and plan.head_keep[:2].all()
    assert (plan.layer_cut, plan.window, plan.ffn_ratio) == (4, 5, 2)


def test_what_is_chosen_by_hand_is_in_the_plan() -> None:
    plan = yopo.calibrate(
        build(SHAPE),
        statistics=made_up(),
        layer_cut=3,
        window=None,
        window_causal=True,
        ffn_ratio=3,
        mass="exact/drop",
    )
    assert (plan.layer_cut, plan.window, plan.window_causal, plan.ffn_ratio) == (3, None, True, 3)
    assert (plan.head_mass, plan.cut_mass, plan.text_mass) == ("exact", "drop", None)


def test_the_calibrated_constant_is_exact_s_where_there_is_one_query_to_fit() -> None:
    # One layer, one text token behind the image: its share is the constant, so the outputs of both
    # masses are the same; those of drop are not.
    one = Shape(layers=1)
    model, given = build(one), sample(0, one, after=1)
    statistics = collect(model, [given])
    plans = {
        mass: yopo.calibrate(model, statistics=statistics, alpha=9.0, layer_cut=0, mass=mass)
        for mass in ("exact", "calibrated", "drop")
    }
    logits = {}
    with torch.no_grad():
        for mass, plan in plans.items():
            logits[mass] = yopo.apply(model, plan)(**given).logits[0, -1]
    torch.testing.assert_close(logits["calibrated"], logits["exact"], rtol=1e-4, atol=1e-5)
    assert (logits["drop"] - logits["exact"]).abs().max() > 0.1


def test_a_budget_searches_on_samples_that_the_statistics_leave_out() -> None:
    model = build(FOUR)
    samples = [sample(seed, FOUR) for seed in range(8)]
    plan = yopo.calibrate(model, samples, budget=0.25, mass="drop")
    held_out, taken = samples[1::2], samples[::2]
    statistics = collect(model, taken, influence=False)
    known = references(model, held_out)
    expected = yopo.calibrate(
        model, statistics=statistics, held_out=iter(held_out), budget=0.25, mass="drop"
    )
    assert plan == expected
    assert divergence(model, plan, known).kl.mean() > 0
    assert yopo.plan_of(model) is None


def test_samples_may_come_one_by_one_and_be_limited() -> None:
    model = build(SHAPE)
    stream = (sample(seed) for seed in range(9))
    one = yopo.calibrate(model, stream, limit=2, alpha=1.5)
    assert one == yopo.calibrate(model, [sample(0), sample(1)], alpha=1.5)
    assert len(list(stream)) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "random"}, "rule is 'random'; allowed: released"),
        ({"alpha": 0.1, "keep": 0.5}, "alpha and keep are both given"),
        ({"alpha": 0.1, "budget": 0.5}, "alpha and budget are both given"),
        ({"window": None, "budget": 0.5}, "window and budget are both given"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"keep": 0.5, "budget": 0.5}, "keep and budget are both given"),
        ({"keep": 1.5}, "keep is 1.5; allowed"),
        ({"mass": "soft"}, "mass is 'soft'"),
        ({"mass": "drop/soft"}, "mass is 'drop/soft'"),
        ({"layer_cut": 4}, "layer_cut is 4"),
        ({"ffn_ratio": 0.5}, "ffn_ratio is 0.5"),
        ({"held_out": []}, "held_out is given without a budget"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yopo.calibrate(build(SHAPE), statistics=made_up(), **settings)


def test_statistics_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="of another model"):
        yopo.calibrate(build(FOUR), statistics=made_up())


def test_nothing_imported_takes_the_function_s_name() -> None:
    code = (
        "import pkgutil, importlib, yopo\n"
        "names = [m.name for m in pkgutil.iter_modules(yopo.__path__) if m.name != '__main__']\n"
        "assert not set(names) & set(yopo.__all__), names\n"
        "import yopo.commands.calibrate_model, yopo.calibration.search\n"
        "assert yopo.calibrate.__name__ == 'calibrate' and callable(yopo.calibrate)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plan_made_is_one_that_can_be_applied() -> None:
    model = build(SHAPE)
    plan = yopo.calibrate(model, [sample(0)])
    assert isinstance(plan, PruningPlan) and plan.text_mass is not None
    with torch.no_grad():
        assert torch.isfinite(yopo.apply(model, plan)(**sample(1)).logits).all()
