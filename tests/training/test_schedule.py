"""Plans that tighten: each prunes what the one before did and more, and the last is the plan."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from family_checks import a_plan
from random_families import KINDS, config

import yopo

pytestmark = pytest.mark.skipif(not KINDS["llava-llama"].exists, reason="no families")
CONFIG: Any = config(KINDS["llava-llama"]) if KINDS["llava-llama"].exists else None


@pytest.mark.parametrize("changes", [{}, {"ffn_ratio": 1, "ffn": [24, 6, 0]}, {"layer_cut": 0}])
def test_each_stage_prunes_more_and_the_last_is_the_plan(changes: dict[str, Any]) -> None:
    plan = a_plan(**changes)
    plans = yopo.tightening(plan, CONFIG, steps=40, stages=4)
    assert list(plans) == [0, 6, 13, 20] and plans[20] is plan
    found = list(plans.values())
    for looser, tighter in pairwise(found):
        assert looser.layer_cut >= tighter.layer_cut
        assert (looser.head_keep >= tighter.head_keep).all()
        wide, narrow = (each.ffn_neurons(24) for each in (looser, tighter))
        assert all(one >= other for one, other in zip(wide, narrow, strict=True))
    first = found[0]
    assert first.head_keep.sum() > plan.head_keep.sum() and first.window == plan.window
    assert sum(first.ffn_neurons(24)) > sum(plan.ffn_neurons(24))


def test_one_stage_is_the_plan_from_the_start() -> None:
    plan = a_plan()
    assert yopo.tightening(plan, CONFIG, steps=2, stages=1) == {0: plan}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="stages is 4, steps 7"):
        yopo.tightening(a_plan(), CONFIG, steps=7, stages=4)
    with pytest.raises(ValueError, match="give a plan made for this model"):
        yopo.tightening(yopo.PruningPlan(torch.ones(2, 2)), CONFIG, steps=40)
