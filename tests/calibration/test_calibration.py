"""`yopo.calibrate`: the plan that the parts make together, and what cannot be asked of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_samples import inputs, naive, sample
from layouts import SHAPE, Shape, build, make_case
from made_up_statistics import made_up

import yopo
from yopo.calibration import neurons
from yopo.calibration.budget import VisualCost
from yopo.calibration.collect import collect
from yopo.calibration.config import RuleConfig, SearchConfig
from yopo.calibration.divergence import divergence, references
from yopo.calibration.head_rule import released_head_keep
from yopo.calibration.sample_split import split_for
from yopo.calibration.sample_statistics import Statistics
from yopo.calibration.search_trials import TEMPERATURE
from yopo.calibration.sink_fit import fit_sinks
from yopo.checkpoint import neuron_order
from yopo.errors import CannotGoOn
from yopo.models.attach import ffn_order_of
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
        plan = yopo.calibrate(model, samples, alpha=alpha, mass="drop").plan
        assert torch.equal(plan.head_keep, released_head_keep(ratios, alpha))
        kept.append(int(plan.head_keep[2].sum()))
    assert len(set(kept)) > 1  # the rule had something to choose


def test_half_the_heads_stay_unless_said_otherwise() -> None:
    statistics = replace(made_up(5), model=made_up().model)
    model = build(SHAPE)
    plan = yopo.calibrate(model, statistics=statistics, keep=0.75).plan
    assert plan.head_keep.sum() == 9
    many = replace(made_up(5, 8, 4, 24), model=collect(build(Shape(layers=8)), [sample(0)]).model)
    plan = yopo.calibrate(build(Shape(layers=8)), statistics=many).plan
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
    ).plan
    assert (plan.layer_cut, plan.window, plan.window_causal, plan.ffn_ratio) == (3, None, True, 3)
    assert (plan.head_mass, plan.cut_mass, plan.sinks) == ("exact", "drop", None)


def test_the_constant_sink_is_exact_s_where_there_is_one_query_to_fit() -> None:
    # One layer, one text token behind the image: the sink is its log-sum-exp over the image, so the
    # outputs of both masses are the same; those of drop are not.
    one = Shape(layers=1)
    model, given = build(one), sample(0, one, after=1)
    statistics = collect(model, [given])
    plans = {
        mass: yopo.calibrate(model, statistics=statistics, alpha=9.0, layer_cut=0, mass=mass).plan
        for mass in ("exact", "sink", "drop")
    }
    logits = {}
    with torch.no_grad():
        for mass, plan in plans.items():
            logits[mass] = yopo.apply(model, plan)(**given).logits[0, -1]
    torch.testing.assert_close(logits["sink"], logits["exact"], rtol=1e-4, atol=1e-5)
    assert (logits["drop"] - logits["exact"]).abs().max() > 0.1


def test_a_budget_searches_on_samples_that_the_statistics_leave_out() -> None:
    model = build(FOUR)
    samples = [sample(seed, FOUR) for seed in range(8)]
    plan = yopo.calibrate(model, samples, budget=0.25, mass="drop").plan
    held_out, taken = samples[1::2], samples[::2]
    statistics = collect(model, taken, influence=False)
    known = references(model, held_out)
    expected = yopo.calibrate(
        model, statistics=statistics, held_out=iter(held_out), budget=0.25, mass="drop"
    ).plan
    assert plan == expected
    assert divergence(model, plan, known).kl.mean() > 0
    assert yopo.plan_of(model) is None


def test_samples_may_come_one_by_one_and_be_limited() -> None:
    model = build(SHAPE)
    stream = (sample(seed) for seed in range(9))
    one = yopo.calibrate(model, stream, limit=2, alpha=1.5).plan
    assert one == yopo.calibrate(model, [sample(0), sample(1)], alpha=1.5).plan
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
        ({"budget": 25}, "budget is 25; allowed: above 0"),
        ({"evaluations": 9}, "evaluations is given without budget"),
        ({"budget": 0.5, "evaluations": 0}, "evaluations is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"tune_sinks": 0}, "tune_sinks is 0; allowed: whole numbers from 1"),
        ({"tune_sinks": 1.5}, "tune_sinks is 1.5; allowed: whole numbers from 1"),
        ({"tune_sinks": 5, "mass": "drop"}, "tune_sinks tunes sinks, but mass is drop"),
        ({"tune_sinks": 5}, "tune_sinks is given, but no samples"),
        ({"budget": 0.5}, "0 samples: a search holds every second out"),
        ({"statistics_path": "x"}, "statistics and statistics_path are both given"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yopo.calibrate(build(SHAPE), statistics=made_up(), **settings)


def test_a_setting_that_there_is_not_is_refused() -> None:
    with pytest.raises(TypeError, match="calibrate takes no 'budgets'"):
        yopo.calibrate(build(SHAPE), statistics=made_up(), budgets=0.5)
    with pytest.raises(TypeError, match="config and keep are both given"):
        yopo.calibrate(build(SHAPE), (), RuleConfig(), statistics=made_up(), keep=0.5)


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
    made = yopo.calibrate(model, [sample(0)])
    assert isinstance(made.plan, PruningPlan) and made.plan.sinks is not None
    with torch.no_grad():
        assert torch.isfinite(yopo.apply(model, made.plan)(**sample(1)).logits).all()


# ------------------------------------------------------------------------------------- the pieces


def test_a_config_says_the_same_as_its_settings() -> None:
    model, samples = build(FOUR), [sample(seed, FOUR) for seed in range(6)]
    by_rule = yopo.calibrate(model, samples, RuleConfig(keep=0.75, mass="drop"))
    assert by_rule.plan == yopo.calibrate(model, samples, keep=0.75, mass="drop").plan
    searched = SearchConfig(budget=0.5, evaluations=7, mass="drop")
    found = yopo.calibrate(model, samples, searched)
    again = yopo.calibrate(model, samples, budget=0.5, evaluations=7, mass="drop")
    assert found.plan == again.plan and len(found.report.search.evaluations) <= 7


def test_neurons_stay_unless_asked_and_then_the_order_is_the_one_put_on_the_model() -> None:
    model, samples = build(SHAPE), [sample(seed) for seed in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = yopo.calibrate(model, samples)
    assert kept.neuron_order is None and kept.plan.ffn_order is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    moved = yopo.calibrate(model, samples, reorder_neurons=True)
    assert torch.equal(moved.neuron_order, neurons.ranked(kept.statistics))
    assert moved.plan.ffn_order == neuron_order.checksum(moved.neuron_order)
    assert moved.plan == replace(kept.plan, ffn_order=moved.plan.ffn_order, sinks=moved.plan.sinks)
    assert moved.statistics.model == kept.statistics.model  # of the model as it was given
    for layer, places in enumerate(moved.neuron_order):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(model.state_dict()[name], before[name][places])
    yopo.apply(model, moved.plan)
    neurons.undo(yopo.remove(model), moved.neuron_order)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neurons_in_an_order_already_are_kept_or_refused() -> None:
    model, samples = build(SHAPE), [sample(seed) for seed in range(3)]
    first = yopo.calibrate(model, samples, reorder_neurons=True)
    with pytest.raises(ValueError, match="in another order already.*reorder_neurons=False"):
        yopo.calibrate(model, samples, reorder_neurons=True)
    second = yopo.calibrate(model, samples)
    assert second.neuron_order is None and second.plan.ffn_order == first.plan.ffn_order


def test_a_failure_after_neurons_were_moved_takes_them_back() -> None:
    model, samples = build(FOUR), [sample(seed, FOUR) for seed in range(4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="which no plan with mass exact/exact"):
        yopo.calibrate(model, samples, budget=0.02, mass="exact", reorder_neurons=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ffn_order_of(model) is None


def test_the_report_is_what_the_plan_changes_where_nothing_was_chosen() -> None:
    model, samples = build(FOUR), [sample(seed, FOUR, after=3 + seed) for seed in range(14)]
    lines: list[str] = []
    made = yopo.calibrate(
        model, samples, budget=0.4, evaluations=6, mass="drop", influence=True, tell=lines.append
    )
    report, judging = made.report, samples[1::2][2::3]
    known = references(model, judging)
    change = divergence(model, made.plan, known)
    assert report.kl == pytest.approx(float(change.kl.mean()))
    assert report.same == pytest.approx(float(change.same.double().mean()))
    cost = VisualCost(model.config, [reference.prompt for reference in known])
    assert report.visual_flops == pytest.approx(cost.share(made.plan))
    assert (report.judged, report.samples) == (2, 7) and report.plan == made.plan
    assert report.influence == pytest.approx(made.statistics.influence.double().mean(0).tolist())
    chosen_by = [one for i, one in enumerate(samples[1::2]) if i % 3 != 2]
    kl = divergence(model, made.plan, references(model, chosen_by), TEMPERATURE).kl.mean()
    assert report.search.chosen.divergence == pytest.approx(float(kl))
    assert str(report).splitlines() == lines == report.lines()
    assert f"2 questions held out, by which the plan was not chosen: {100 * report.same:.1f} %" in (
        str(report)
    )


def test_the_report_of_a_rule_says_what_its_questions_are() -> None:
    model, samples = build(SHAPE), [sample(seed) for seed in range(3)]
    made = yopo.calibrate(model, samples, alpha=1.5)
    assert made.report.alpha == 1.5 and made.report.judged == 3 and made.report.search is None
    assert "3 questions of those that the statistics were taken of" in str(made.report)
    again = yopo.calibrate(model, samples, statistics=made.statistics)
    assert "3 questions of those given" in str(again.report)
    bare = yopo.calibrate(model, statistics=made.statistics)
    assert bare.plan == replace(again.plan, sinks=made.statistics.sinks())
    assert bare.report.judged is None and len(bare.report.lines()) == 2  # alpha and the plan


def test_a_call_goes_on_from_the_statistics_that_it_keeps(tmp_path: Path) -> None:
    model, path = build(SHAPE), tmp_path / "statistics.safetensors"
    samples = [sample(seed) for seed in range(4)]
    whole = yopo.calibrate(model, samples)

    def stopping() -> Iterator[Any]:
        yield from samples[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        yopo.calibrate(model, stopping(), statistics_path=path)
    assert len(Statistics.load(path)) == 2
    made = yopo.calibrate(model, samples, statistics_path=path)
    assert made.plan == whole.plan and len(Statistics.load(path)) == 4
    fewer = yopo.calibrate(model, samples[:3], statistics_path=path)
    assert f"statistics of 4 samples, as many as {path} has already" in str(fewer.report)
    with pytest.raises(CannotGoOn, match="sample 0 is not the one"):
        yopo.calibrate(model, samples[1:], statistics_path=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CannotGoOn, match="statistics.safetensors is cut off"):
        yopo.calibrate(model, samples, statistics_path=path)


def test_sinks_are_fitted_to_the_plan_found_from_the_samples_taken() -> None:
    model, samples = build(SHAPE), [sample(seed) for seed in range(16)]
    made = yopo.calibrate(model, samples, budget=0.4, evaluations=7)
    searched = made.report.search.plan
    assert searched.sinks == made.statistics.sinks()
    fit = fit_sinks(model, samples[::2], searched, target="dense")
    assert made.plan == fit.plan == replace(searched, sinks=made.plan.sinks)
    assert made.plan.sinks.b is not None and str(fit) in str(made.report)
    streamed = yopo.calibrate(model, (one for one in samples), tune_sinks=3)
    assert streamed.report.sinks.samples == 16
    whole = yopo.calibrate(model, samples)
    assert replace(streamed.plan, sinks=whole.plan.sinks) == whole.plan


def test_a_mass_without_sinks_gets_none() -> None:
    made = yopo.calibrate(build(SHAPE), [sample(0)], mass="exact/drop")
    assert made.plan.sinks is None and made.report.sinks is None
    half = yopo.calibrate(build(SHAPE), [sample(0)], mass="sink/drop").plan
    assert (half.head_mass, half.cut_mass) == ("sink", "drop") and half.sinks is not None


def test_samples_are_made_when_they_are_asked_for() -> None:
    """A sequence is sliced, not read: its samples may take long to make, and much memory."""
    made: list[int] = []

    class Lazy(Sequence[Any]):
        def __init__(self, seeds: Sequence[int]) -> None:
            self.seeds = seeds

        def __len__(self) -> int:
            return len(self.seeds)

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                return Lazy(self.seeds[index])
            made.append(self.seeds[index])
            return sample(self.seeds[index])

    config = SearchConfig(budget=0.5)
    split = split_for(config, Lazy(range(12)), None, measured=False)
    assert made == []
    assert [len(list(part)) for part in (split.taken, split.choosing, split.judging)] == [6, 4, 2]
    assert sorted(set(made)) == list(range(12))
