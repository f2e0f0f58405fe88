"""PruningPlan.summary: right words for every plan."""

from __future__ import annotations

import pytest
import torch
from small_plans import DECIDED, HEADS, LAYERS, SHARES, plan

from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

ALL, NONE = torch.ones(LAYERS, HEADS), torch.zeros(LAYERS, HEADS)
GIVE_NOTHING = "To visual tokens pruned heads give nothing."


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"head_keep": ALL}, "Nothing is pruned."),
        ({"head_keep": ALL, "window_causal": True, "head_mass": "drop"}, "Nothing is pruned."),
        (
            {"head_keep": ALL, "layer_cut": 3, "cut_mass": "drop"},
            "All 10 heads of layers 0–2 read visual tokens, none from layer 3 of 4 on. Mass on "
            "visual keys: drop from layer 3 on.",
        ),
        (
            {"head_keep": ALL, "layer_cut": 1},
            "All 10 heads of layer 0 read visual tokens, none from layer 1 of 4 on. Mass on visual "
            "keys: exact from layer 1 on.",
        ),
        (
            {"head_keep": ALL, "layer_cut": 0, "cut_mass": "drop"},
            "No head reads visual tokens. Mass on visual keys: drop from layer 0 on.",
        ),
        (
            {"head_keep": NONE, "layer_cut": LAYERS, "head_mass": "drop"},
            f"No head reads visual tokens. {GIVE_NOTHING} Mass on visual keys: drop in pruned "
            "heads.",
        ),
        (
            {"head_keep": ALL, "window": 5},
            "Visual tokens see neighbours within 2 rows and columns (window 5). All 10 heads of "
            "layers 0–3 read visual tokens.",
        ),
        (
            {"head_keep": ALL, "window": 4, "window_causal": True, "ffn_ratio": 4 / 3},
            "Visual tokens see earlier neighbours within 1 row and column (window 4) and use the "
            "first 75 % of the FFN neurons. All 10 heads of layers 0–3 read visual tokens.",
        ),
        (
            {"head_keep": ALL, "window": 2, "window_causal": True},
            "Visual tokens see no other visual token (window 2). All 10 heads of layers 0–3 read "
            "visual tokens.",
        ),
        (
            {"layer_cut": 2, "cut_mass": "drop"},
            f"7 of 20 heads of layers 0–1 read visual tokens, none from layer 2 of 4 on. "
            f"{GIVE_NOTHING} Mass on visual keys: exact in pruned heads, drop from layer 2 on.",
        ),
        (
            {"layer_cut": 2, "prune_visual_queries": False},
            "7 of 20 heads of layers 0–1 read visual tokens, none from layer 2 of 4 on. To visual "
            "tokens pruned heads give what text says. Mass on visual keys: exact in pruned heads "
            "and from layer 2 on.",
        ),
        (
            DECIDED,
            "Visual tokens see earlier neighbours within 1 row and column (window 4) and use the "
            "first 40 % of the FFN neurons in their new order. 7 of 20 heads of layers 0–1 read "
            "visual tokens, none from layer 2 of 4 on. To visual tokens pruned heads give what "
            "text says. Mass on visual keys: sink in pruned heads, drop from layer 2 on.",
        ),
        (
            {"head_mass": "sink", "sinks": Sinks(SHARES)},
            f"14 of 40 heads of layers 0–3 read visual tokens. {GIVE_NOTHING} Mass on visual keys: "
            "sink in pruned heads.",
        ),
        (
            {"visual_attention": False, "ffn": 0, "head_mass": "drop"},
            "Visual tokens do not attend and pass no FFN. 14 of 40 heads of layers 0–3 read visual "
            "tokens. Mass on visual keys: drop in pruned heads.",
        ),
        (
            {
                "head_keep": ALL,
                "window": [None, 3, 3, 1],
                "visual_attention": [True, False, True, False],
                "ffn": [None, 0, 7, 7],
            },
            "Visual tokens see neighbours within 1 row and column (window 3) in layers 1–2 and see "
            "no other visual token (window 1) in layer 3 and do not attend in layers 1, 3 and pass "
            "no FFN in layer 1 and use the first 7 FFN neurons in layers 2–3. All 10 heads of "
            "layers 0–3 read visual tokens.",
        ),
        (
            {"layer_cut": 2, "cut_mass": "drop", "visual_attention": [False, False, True, True]},
            "Visual tokens do not attend in layers 0–1. 7 of 20 heads of layers 0–1 read visual "
            "tokens, none from layer 2 of 4 on. Mass on visual keys: exact in pruned heads, drop "
            "from layer 2 on.",
        ),
    ],
)
def test_the_summary_says_what_is_pruned_and_nothing_else(values, words):
    assert plan(**values).summary() == words


def test_heads_pruned_only_above_the_cut_matter_to_visual_tokens_that_go_on():
    keep = torch.ones(LAYERS, HEADS)
    keep[3, 0] = 0
    exact = PruningPlan(keep, layer_cut=2)
    assert GIVE_NOTHING in exact.summary() and "in pruned heads" not in exact.summary()
    assert GIVE_NOTHING not in PruningPlan(keep, layer_cut=2, cut_mass="drop").summary()
