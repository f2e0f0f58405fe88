"""The masked simulation, which benchmarks compare with, computes what the engine computes."""

from __future__ import annotations

import pytest
import torch
from layouts import Shape, build, make_case

from yopo.bench.simulation import simulate
from yopo.plan.pruning_plan import PruningPlan


@pytest.mark.parametrize("window", [None, 1, 3, 4])
@pytest.mark.parametrize("window_causal", [False, True])
def test_simulation_is_the_engine(window: int | None, window_causal: bool) -> None:
    shape = Shape(kv_heads=2)
    keep = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
    plan = PruningPlan(keep, window, layer_cut=2, ffn_ratio=2, window_causal=window_causal)
    rows = [
        [("text", 2), ("image", 3, 2, False), ("text", 3)],
        [("image", 2, 2, False), ("text", 5), ("image", 1, 2, False)],
    ]
    case = make_case(rows, shape.heads * 8)
    model = build(shape, plan)
    with torch.no_grad():
        ours = model.model(**case.kwargs(), use_cache=False).last_hidden_state
    theirs = simulate(model.model, plan, case.layout, case.inputs_embeds)
    assert (ours - theirs).abs().max() < 1e-5


def test_simulation_refuses_what_the_released_code_does_not_know() -> None:
    shape = Shape()
    case = make_case([[("text", 2), ("image", 2, 2, False)]], shape.heads * 8)
    each = {"window": [None, 3, 3], "ffn": [None, 7, 7], "visual_attention": [True, False, True]}
    plans = [{"head_mass": "drop"}, {"prune_visual_queries": False}, {"visual_attention": False}]
    for changes in [*plans, *({name: value} for name, value in each.items())]:
        plan = PruningPlan(torch.ones(3, 4), **changes)
        with pytest.raises(ValueError, match="exact/exact.* one window and one number of neurons"):
            simulate(build(shape, plan).model, plan, case.layout, case.inputs_embeds)
