"""Counted FLOPs: the paper's table, and limits in which the count is known."""

from __future__ import annotations

import pytest
import torch

from yopo.flops import Prompt, paper_tflops, prefill_flops
from yopo.plan import PruningPlan
from yopo.presets import PRESETS, named_plan

PROMPT = Prompt(35, ((24, 24),), 25)


@pytest.mark.parametrize(
    ("preset", "dense", "quarter"), [("llava-1.5-7b", 7.63, 1.91), ("llava-1.5-13b", 14.89, 3.72)]
)
def test_paper_table(preset: str, dense: float, quarter: float) -> None:
    shape = PRESETS[preset]
    assert round(paper_tflops(shape, 576), 2) == dense
    assert round(paper_tflops(shape, 576, named_plan("25", shape)), 2) == quarter


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mass", ["exact", "drop"])
def test_a_plan_that_prunes_nothing_counts_as_dense(preset: str, mass: str) -> None:
    shape = PRESETS[preset]
    keep = torch.ones(shape.num_hidden_layers, shape.num_attention_heads, dtype=torch.bool)
    nothing = PruningPlan(keep, head_mass=mass, cut_mass=mass)
    assert prefill_flops(shape, PROMPT, nothing) == prefill_flops(shape, PROMPT)


def test_everything_cut_and_dropped_counts_the_text_alone() -> None:
    shape = PRESETS["llava-1.5-7b"]
    keep = torch.zeros(32, 32, dtype=torch.bool)
    plan = PruningPlan(keep, layer_cut=0, head_mass="drop", cut_mass="drop")
    assert prefill_flops(shape, PROMPT, plan) == prefill_flops(shape, Prompt(35, (), 25))


def test_window_counts_the_pairs_that_see_each_other() -> None:
    """By hand on a 2 × 3 grid, window 3: every row pair, and 7 of 9 column pairs."""
    shape = PRESETS["llava-1.5-7b"]
    keep = torch.ones(32, 32, dtype=torch.bool)
    for causal, pairs in ((False, 4 * 7), (True, (4 * 7 + 6) / 2)):
        plan = PruningPlan(keep, window=3, window_causal=causal)
        layer = prefill_flops(shape, Prompt(0, ((2, 3),), 1), plan)[0]
        assert layer.visual_attention == 4 * 4096 * pairs


def test_ideal_ratios_of_the_named_plans() -> None:
    shape = PRESETS["llava-1.5-7b"]
    dense = sum(layer.total for layer in prefill_flops(shape, PROMPT))
    for name, head, cut, ratio in (
        ("25", "drop", "drop", 3.15),
        ("12", "drop", "drop", 4.87),
        ("25", "exact", "exact", 1.91),
        ("25", "exact", "drop", 2.97),
    ):
        plan = named_plan(name, shape, head, cut)
        pruned = sum(layer.total for layer in prefill_flops(shape, PROMPT, plan))
        assert dense / pruned == pytest.approx(ratio, abs=0.01)
