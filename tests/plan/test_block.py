"""The yopo block: its bits, and that a corrupt one is an error and never a dense model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_plans import DECIDED, LAYERS, RELEASED, SHARES, config, plan, with_block

from yopo.plan.pruning_plan import PruningPlan


@given(data=st.data(), heads=st.integers(1, 41), layers=st.integers(1, 5))
def test_any_mask_survives_its_hex_rows(data, heads, layers):
    row = st.lists(st.booleans(), min_size=heads, max_size=heads)
    rows = data.draw(st.lists(row, min_size=layers, max_size=layers))
    target = {"num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 8}
    made = PruningPlan(rows)
    made.save_to(target)
    assert PruningPlan.from_config(json.loads(json.dumps(target))) == made


def test_head_0_is_the_most_significant_bit_of_the_first_byte():
    target = config()
    plan(head_keep=[[1] + [0] * 9, [0] * 7 + [1, 1, 0], [0] * 10, [1] * 10]).save_to(target)
    assert target.yopo["head_keep"] == ["8000", "0180", "0000", "ffc0"]


ROWS = ["9240", "2480", "4900", "9240"]
BAD_BLOCKS = [
    *(({"format": v}, "format is") for v in (0, 2, "1", True, None, 1.0)),
    *(({"layers": v}, "layers") for v in (0, 3, 5, "4", True, None)),
    *(({"heads": v}, "head") for v in (0, 9, 17, "10", None, 10**400)),
    *(({"head_keep": v}, "head_keep") for v in (None, {}, "9240", ROWS[:3], [*ROWS, "0000"])),
    *(
        ({"head_keep": [*ROWS[:3], v]}, r"head_keep\[3\]")
        for v in ("", "92", "924000", "924g", " 924", "92 4", "0x92", "924٠", "9241", "ffff", 9240)
    ),
    *(({"head_keep": [*ROWS[:3], v]}, r"head_keep\[3\]") for v in (None, [1], True)),
    *(({"window": v}, "window") for v in (0, "5", 5.5, True)),
    *(({"layer_cut": v}, "layer_cut") for v in (None, -1, 5, "2", True)),
    *(({"ffn_ratio": v}, "ffn_ratio") for v in (None, 0, "2", True, float("nan"))),
    *(({"head_mass": v}, "head_mass") for v in (None, "soft", "calibrated", [])),
    *(({"cut_mass": v}, "cut_mass") for v in (None, "soft", "calibrated")),
    *(({"window_causal": v}, "window_causal") for v in (None, 0, "no")),
    *(({"prune_visual_queries": v}, "prune_visual_queries") for v in (None, 1, "yes")),
    *(({"text_mass": v}, "text_mass") for v in (0, [], SHARES)),
    ({"extra": 1}, "unknown keys: extra"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_BLOCKS, ids=lambda v: repr(v)[:60])
@pytest.mark.parametrize("released", [{}, RELEASED], ids=["alone", "with released fields"])
def test_a_corrupt_block_is_an_error_and_never_dense(changes, words, released, mask_file):
    target = with_block(**changes)
    for name, value in released.items():
        setattr(target, name, value)
    with pytest.raises(ValueError, match=words) as caught:
        PruningPlan.from_config(target)
    assert "'yopo' block" in str(caught.value) and "delete" in str(caught.value)


@pytest.mark.parametrize("key", list(with_block().yopo))
def test_a_block_that_lacks_a_key_is_an_error_naming_it(key):
    target = with_block()
    del target.yopo[key]
    with pytest.raises(ValueError, match=key):
        PruningPlan.from_config(target)


@pytest.mark.parametrize("block", [None, "", "abc", 1, True, [], [1], {}], ids=repr)
def test_a_block_of_another_type_is_an_error(block):
    target = config()
    target.yopo = block
    for read in (target, target.to_dict()):
        with pytest.raises(ValueError, match="'yopo' block"):
            PruningPlan.from_config(read)


def test_a_good_block_for_another_model_is_an_error():
    target = with_block()
    target.num_hidden_layers = LAYERS + 1
    with pytest.raises(ValueError, match="head_keep has shape"):
        PruningPlan.from_config(target)


def test_a_block_of_another_format_says_so_and_what_to_do():
    with pytest.raises(ValueError, match="format is 2; this yopo reads 1: make the plan again"):
        PruningPlan.from_config(with_block(format=2))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(with_block(**DECIDED).yopo)), value=JSON)
def test_any_value_in_a_block_gives_a_plan_or_an_error_that_names_the_block(key, value):
    target = config()
    plan(**DECIDED).save_to(target)
    target.yopo[key] = value
    try:
        assert isinstance(PruningPlan.from_config(target), PruningPlan)
    except ValueError as error:
        fits = ("head_keep has shape", "leaves no neuron")  # a plan, but not for this model
        assert any(words in str(error) for words in ("'yopo' block", *fits))
