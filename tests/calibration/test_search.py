"""The search: within its budget, the same each time, never worse than where it began, and gone on
with where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_samples import sample
from layouts import Shape, build

import yopo
from yopo.calibration.budget import VisualCost
from yopo.calibration.collect import collect
from yopo.calibration.config import SearchConfig
from yopo.calibration.divergence import divergence, references
from yopo.calibration.head_rule import released_head_keep, solve_alpha
from yopo.calibration.sample_split import split
from yopo.calibration.search import Found, search
from yopo.calibration.search_plans import PlanMaker
from yopo.calibration.search_trials import TEMPERATURE
from yopo.counting.flops import Prompt, prefill_flops
from yopo.errors import CannotGoOn
from yopo.plan.pruning_plan import PruningPlan

SHAPE = Shape(layers=4, heads=4, kv_heads=4, intermediate=48)
# No search of a plain coordinate kind would come by this mask.
ODD = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 0]])


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SHAPE)


@pytest.fixture(scope="module")
def statistics(model: Any) -> Any:
    return collect(model, [sample(seed, SHAPE) for seed in range(6)], influence=False)


@pytest.fixture(scope="module")
def known(model: Any) -> Any:
    return references(model, [sample(seed, SHAPE, after=3 + seed) for seed in range(3)], 3)


def found_for(model: Any, statistics: Any, known: Any, budget: float, **settings: Any) -> Found:
    told = {name: settings.pop(name) for name in ("start", "log", "path") if name in settings}
    return search(model, known, statistics, SearchConfig(budget=budget, **settings), **told)


def visual_flops(plan: PruningPlan | None, known: Any) -> float:
    shape = build(SHAPE).config
    shape.head_dim = 8
    layers = [x for r in known for x in prefill_flops(shape, r.prompt, plan)]
    return sum(x.visual_projections + x.visual_attention + x.visual_ffn for x in layers)


@pytest.mark.parametrize(
    ("mass", "budget"),
    [("drop", 0.5), ("sink", 0.25), ("exact/drop", 0.12), ("exact", 0.3), ("drop", 0.04)],
)
def test_the_plan_is_within_the_budget_and_no_worse_than_the_hand_made_one(
    model: Any, statistics: Any, known: Any, mass: str, budget: float
) -> None:
    found = found_for(model, statistics, known, budget, mass=mass, evaluations=60)
    hand_made = found.evaluations[0]
    assert hand_made.why == "hand-made" and hand_made.visual_flops <= budget
    share = visual_flops(found.plan, known) / visual_flops(None, known)
    assert share <= budget and found.chosen.visual_flops == pytest.approx(share)
    kl = float(divergence(model, found.plan, known, TEMPERATURE).kl.mean())
    assert kl == pytest.approx(found.chosen.divergence) and kl <= hand_made.divergence
    assert found.plan.head_mass == mass.split("/")[0] and found.plan.cut_mass == mass.split("/")[-1]
    within = [e for e in found.evaluations if e.visual_flops <= budget]
    assert found.chosen.divergence == min(e.divergence for e in within)
    assert len(found.evaluations) <= 60 and yopo.plan_of(model) is None


@pytest.mark.parametrize(("budget", "evaluations"), [(0.12, 150), (0.12, 30), (0.04, 60)])
def test_it_finds_something_better(
    model: Any, statistics: Any, known: Any, budget: float, evaluations: int
) -> None:
    found = found_for(model, statistics, known, budget, mass="drop", evaluations=evaluations)
    assert found.chosen.divergence < 0.9 * found.evaluations[0].divergence


def test_the_same_search_finds_the_same_plan(model: Any, statistics: Any, known: Any) -> None:
    one, other = (
        found_for(build(SHAPE), statistics, known, 0.25, evaluations=50) for _ in range(2)
    )
    assert one.plan == other.plan
    assert [vars(e) for e in one.evaluations] == [vars(e) for e in other.evaluations]


def test_the_hand_made_plan_for_a_quarter_is_half_and_half(
    model: Any, statistics: Any, known: Any
) -> None:
    plan = found_for(model, statistics, known, 0.25, mass="drop", evaluations=1).evaluations[0].plan
    assert (plan.layer_cut, plan.window, plan.window_causal) == (2, 5, True)
    # Two layers of all heads, as the released rule has it, are over the budget here; one is not.
    ratios = statistics.ratios[:, :2]
    alpha = solve_alpha(ratios, 0.5, keep_first=1)
    assert torch.equal(plan.head_keep[:2], released_head_keep(ratios, alpha, keep_first=1))
    # A little less than half the neurons: attention to the text before is FLOPs as well.
    assert plan.head_keep.sum() == 4 and 18 <= plan.ffn_neurons(48)[0] <= 24


def test_moves_are_one_thing_cheaper_or_dearer(model: Any, statistics: Any, known: Any) -> None:
    cost = VisualCost(SHAPE.config(), [reference.prompt for reference in known])
    maker = PlanMaker(statistics, cost, SearchConfig(budget=0.5, mass="drop"))
    point, seen = maker.dense, set()
    assert divergence(model, maker.plan(point), known).kl.max() < 1e-6
    while removals := list(maker.removals(point)):
        for move, to in removals:
            assert maker.share(to) <= maker.share(point) and any(to.reads) and to != point
            seen.add(move[0])
        point = removals[len(seen) % len(removals)][1]
        for _, to in maker.additions(point):
            assert maker.share(to) >= maker.share(point)
    assert seen == {"reads", "attends", "neurons", "window"}
    assert maker.plan(point).head_keep.sum() == 1  # the least there is
    assert maker.share(point) < 0.03


def test_heads_that_share_keys_and_values_go_together() -> None:
    shape = Shape(layers=3, heads=4, kv_heads=2, intermediate=48)
    model = build(shape)
    statistics = collect(model, [sample(seed, shape) for seed in range(3)], influence=False)
    known = references(model, [sample(5, shape)], 3)
    found = found_for(model, statistics, known, 0.2, mass="drop", evaluations=60)
    for tried in found.evaluations[1:]:
        first, second = tried.plan.head_keep.unflatten(1, (2, 2)).unbind(2)
        assert torch.equal(first, second)


def test_a_search_that_was_stopped_goes_on(
    model: Any, statistics: Any, known: Any, tmp_path: Path
) -> None:
    def run(path: Path | None, budget: float, ran: list[Any]) -> Found:
        told = {"path": path, "log": ran.append, "mass": "drop", "evaluations": 40}
        return found_for(model, statistics, known, budget, **told)

    class Stopped(Exception):
        pass

    class Stopping(list[Any]):
        def append(self, tried: Any) -> None:
            super().append(tried)
            if len(self) == 12:
                raise Stopped

    path, whole = tmp_path / "search.jsonl", run(None, 0.2, [])
    with pytest.raises(Stopped):
        run(path, 0.2, Stopping())
    assert len(path.read_text().splitlines()) == 13
    with open(path, "a") as file:
        file.write('{"plan": "cut o')
    calls = count_forwards(model)
    again = run(path, 0.2, [])
    assert again.plan == whole.plan
    assert [vars(e) for e in again.evaluations] == [vars(e) for e in whole.evaluations]
    with calls:
        assert run(path, 0.2, []).plan == whole.plan
        assert calls.number == 0  # nothing is run again
    lines = path.read_text().splitlines()
    run(path, 0.4, [])  # another budget takes over what it can
    assert path.read_text().splitlines()[: len(lines)] == lines
    with pytest.raises(CannotGoOn, match="another model or other samples"):
        search(model, known[:1], statistics, SearchConfig(budget=0.2, mass="drop"), path=path)
    path.write_text("[]\n")
    with pytest.raises(CannotGoOn, match="no file of a search"):
        run(path, 0.2, [])


class count_forwards:
    """How often the model runs within the block."""

    def __init__(self, model: Any) -> None:
        self._model, self.number = model, 0

    def __enter__(self) -> None:
        self.number = 0
        self._hook = self._model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.number += 1

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


def test_plans_to_start_from_are_tried_and_never_lost_to(
    model: Any, statistics: Any, known: Any
) -> None:
    start = PruningPlan(ODD, window=3, layer_cut=3, ffn_ratio=4)
    found = found_for(model, statistics, known, 0.3, start=[start], mass="drop", evaluations=7)
    given = found.evaluations[1]
    assert given.why == "given" and torch.equal(given.plan.head_keep, start.head_keep)
    assert given.plan.head_mass == "drop"
    assert found.chosen.divergence <= given.divergence
    assert found.evaluations[0].why == "hand-made"


def test_a_plan_beyond_the_budget_is_pruned_further_in_the_dense_model_s_place(
    model: Any, statistics: Any, known: Any
) -> None:
    start = PruningPlan(ODD, window=3, layer_cut=3, ffn_ratio=4)
    found = found_for(model, statistics, known, 0.1, start=[start], mass="drop", evaluations=30)
    assert found.chosen.visual_flops <= 0.1 < visual_flops(start, known) / visual_flops(None, known)
    dense = visual_flops(None, known)
    came = [e for e in found.evaluations if e.why != "hand-made"]
    assert max(visual_flops(e.plan, known) for e in came) < 0.5 * dense
    assert not any(bool((e.plan.head_keep & ~start.head_keep).any()) for e in came[:5])


def test_the_point_of_a_plan_prunes_what_it_does(statistics: Any, known: Any, model: Any) -> None:
    cost = VisualCost(model.config, [reference.prompt for reference in known])
    maker = PlanMaker(statistics, cost, SearchConfig(budget=0.3, mass="drop"))
    point = maker.dense
    for _ in range(12):  # every point that a descent comes by is its plan's
        assert maker.point(maker.plan(point)) == point
        point = list(maker.removals(point))[-1][1]
    plan = PruningPlan(ODD, window=7, layer_cut=3, ffn_ratio=3, cut_mass="drop")
    point = maker.point(plan)
    assert point.reads == ((0, 3), (1,), (0, 2, 3), ())
    assert point.window == 9 and point.neurons == (24, 24, 0, 0)


def test_no_more_plans_are_tried_than_allowed_and_each_is_told_of(
    model: Any, statistics: Any, known: Any
) -> None:
    told: list[Any] = []
    found = found_for(model, statistics, known, 0.25, evaluations=9, log=told.append)
    assert tuple(told) == found.evaluations and len(told) <= 9
    plans = [e.plan for e in told]
    assert len(plans) == len(set(plans))


def test_the_front_holds_what_nothing_beats(model: Any, statistics: Any, known: Any) -> None:
    found = found_for(model, statistics, known, 0.25, evaluations=40)
    front = found.front()
    for tried in found.evaluations:
        beaten = [
            e
            for e in found.evaluations
            if e.visual_flops <= tried.visual_flops and e.divergence < tried.divergence
        ]
        on_front = any(e is tried for e in front)
        assert not (on_front and beaten)
        assert on_front or beaten or any(e.divergence == tried.divergence for e in front)


def test_ffn_neurons_take_what_the_budget_leaves() -> None:
    config = SHAPE.config()
    cost = VisualCost(config, [Prompt(2, ((3, 4),), 4), Prompt(5, ((6, 6), (2, 3)), 1)])
    assert cost.share(PruningPlan.dense(config)) == pytest.approx(1)
    keep = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    plan = PruningPlan(keep, window=3, layer_cut=2, head_mass="drop", cut_mass="drop")
    for budget in (0.2, 0.25, 0.3):
        ratio = cost.ffn_ratio_within(plan, budget)
        neurons = replace(plan, ffn_ratio=ratio).ffn_neurons(48)[0]
        assert cost.share(replace(plan, ffn_ratio=ratio)) <= budget
        assert cost.share(replace(plan, ffn_ratio=48 / (neurons + 2))) > budget
    assert cost.ffn_ratio_within(plan, 1) == 1
    assert cost.ffn_ratio_within(plan, 0.01) is None


# -------------------------------------------------------------------------------------- bad input


def test_a_budget_that_no_plan_reaches_says_the_least(
    model: Any, statistics: Any, known: Any
) -> None:
    with pytest.raises(ValueError, match=r"is 0\.1, .*exact/exact.* its least is (0\.\d+)") as e:
        found_for(model, statistics, known, 0.1, mass="exact")
    least = float(str(e.value).split("least is ")[1].split()[0])
    enough = found_for(model, statistics, known, least + 1e-4, mass="exact", evaluations=60)
    assert enough.plan.cut_mass == "exact" and enough.chosen.visual_flops <= least + 1e-4
    with pytest.raises(ValueError, match="no plan with mass"):
        found_for(model, statistics, known, least - 1e-3, mass="exact")


@pytest.mark.parametrize("budget", [0, -0.1, 1.1, 25, float("nan"), True])
def test_what_is_no_budget_is_refused(
    model: Any, statistics: Any, known: Any, budget: float
) -> None:
    with pytest.raises(ValueError, match="budget is .*; allowed: above 0"):
        found_for(model, statistics, known, budget)


def test_statistics_of_another_model_are_refused(statistics: Any, known: Any) -> None:
    other = build(SHAPE)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="of another model"):
        found_for(other, statistics, known, 0.25)


def test_too_few_samples_to_hold_any_out_are_refused() -> None:
    assert split(list(range(5))) == ([0, 2, 4], [1, 3])
    with pytest.raises(ValueError, match="1 samples"):
        split([1])


def test_not_more_plans_are_tried_than_told(model: Any, statistics: Any, known: Any) -> None:
    start = [PruningPlan(torch.zeros(4, 4), layer_cut=1, ffn_ratio=4)]
    for most in (1, 2, 3):
        found = found_for(model, statistics, known, 0.5, mass="drop", start=start, evaluations=most)
        assert 1 <= len(found.evaluations) <= most


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_small_budget_is_kept_with_few_plans_tried(
    model: Any, statistics: Any, known: Any, most: int
) -> None:
    found = found_for(model, statistics, known, 0.03, mass="drop", evaluations=most)
    assert found.chosen.visual_flops <= 0.03 and len(found.evaluations) <= most


def test_a_file_that_is_none_of_a_search_is_refused_by_name(
    model: Any, statistics: Any, known: Any, tmp_path: Path
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\n")
    for path in (tmp_path, tmp_path / "binary"):
        with pytest.raises(CannotGoOn, match=f"{path} is no file of a search"):
            found_for(model, statistics, known, 0.5, path=path)


def test_a_search_of_nothing_is_refused(model: Any, statistics: Any, known: Any) -> None:
    with pytest.raises(ValueError, match="evaluations is 0; allowed: whole numbers from 1"):
        found_for(model, statistics, known, 0.5, evaluations=0)
    with pytest.raises(ValueError, match="a search takes at least one"):
        found_for(model, statistics, [], 0.5)
