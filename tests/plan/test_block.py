"""The yopo block: its bits, and that a corrupt one is an error and never a dense model."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
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
    *(({"format": v}, "format is") for v in (0, 3, "2", True, None, 2.0)),
    *(({"layers": v}, "layers") for v in (0, 3, 5, "4", True, None)),
    *(({"heads": v}, "head") for v in (0, 9, 17, "10", None, 10**400)),
    *(({"head_keep": v}, "head_keep") for v in (None, {}, "9240", ROWS[:3], [*ROWS, "0000"])),
    *(
        ({"head_keep": [*ROWS[:3], v]}, r"head_keep\[3\]")
        for v in ("", "92", "924000", "924g", " 924", "92 4", "0x92", "924٠", "9241", "ffff", 9240)
    ),
    *(({"head_keep": [*ROWS[:3], v]}, r"head_keep\[3\]") for v in (None, [1], True)),
    *(({"window": v}, "window") for v in (0, "5", 5.5, True, [5], [5, 5, 5, 0], [[5]] * 4, {})),
    *(({"ffn": v}, "ffn") for v in (-1, "5", 5.5, True, [5] * 5, [None, 0, 1, True])),
    *(
        ({"visual_attention": v}, "visual_attention")
        for v in (None, 0, 1, [True] * 3, [True, False, None, True])
    ),
    *(({"sinks": v}, "sinks") for v in (0, [], SHARES, {}, "yopo_sinks.safetensors")),
    *(({"sinks": {"tokens": t, "a": SHARES}}, "sinks.tokens") for t in (0, -1, 1.5, True, "1")),
    *(
        ({"sinks": {"tokens": 1, "a": a}}, r"sinks\.a")
        for a in (None, 1.0, [], SHARES[:3], [row[1:] for row in SHARES], "abc", [["1"] * 10] * 4)
    ),
    *(
        ({"sinks": {"tokens": 1, "a": [*SHARES[:3], [*SHARES[3][:9], v]]}}, r"sinks\.a\[3, 9\]")
        for v in (float("nan"), float("inf"), 1e300, None, True, "1")
    ),
    ({"sinks": {"tokens": 1, "a": SHARES, "b": []}}, "sinks is"),
    *(
        ({"sinks": {"tokens": 1, "file": f, "checksum": "sha256:" + "0" * 64}}, r"sinks\.file")
        for f in (
            None,
            1,
            "",
            "sinks.npy",
            "../a.safetensors",
            "/a.safetensors",
            "a\\b.safetensors",
        )
    ),
    *(
        ({"sinks": {"tokens": 1, "file": "a.safetensors", "checksum": c}}, r"sinks\.checksum")
        for c in (None, 1, "", [], "sha256:", "sha256:" + "g" * 64)
    ),
    *(({"layer_cut": v}, "layer_cut") for v in (None, -1, 5, "2", True)),
    *(({"ffn_ratio": v}, "ffn_ratio") for v in (None, 0, "2", True, float("nan"))),
    *(({"head_mass": v}, "head_mass") for v in (None, "soft", "calibrated", [])),
    *(({"cut_mass": v}, "cut_mass") for v in (None, "soft", "calibrated")),
    *(({"window_causal": v}, "window_causal") for v in (None, 0, "no")),
    *(({"prune_visual_queries": v}, "prune_visual_queries") for v in (None, 1, "yes")),
    ({"text_mass": None}, "unknown keys: text_mass"),
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
    with pytest.raises(ValueError, match="format is 3; this yopo reads 1, 2: make the plan again"):
        PruningPlan.from_config(with_block(format=3))


# --- format 1 ----------------------------------------------------------------------------------

FIRST = {
    "format": 1,
    "layers": 2,
    "heads": 2,
    "head_keep": ["80", "00"],
    "window": 5,
    "layer_cut": 2,
    "ffn_ratio": 2.0,
    "head_mass": "exact",
    "cut_mass": "drop",
    "window_causal": False,
    "prune_visual_queries": True,
    "text_mass": None,
}
CALIBRATED = FIRST | {"head_mass": "calibrated", "text_mass": [[1, 0.25], [0.5, 0]]}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


def read(block: dict) -> PruningPlan:
    return PruningPlan.from_config(SIZES | {"yopo": block})


def test_format_1_is_read_as_it_was_meant_and_written_as_format_2():
    made = read(FIRST)
    assert made == PruningPlan([[1, 0], [0, 0]], 5, 2, 2, cut_mass="drop")
    assert made.layer_cut == 2, "format 1 says the cut: it is not found anew"
    again = dict(SIZES)
    made.save_to(again)
    assert again["yopo"]["format"] == 2 and PruningPlan.from_config(again) == made


def test_calibrated_constants_of_format_1_become_sinks_that_give_them_and_it_is_said_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        made, again = (read(CALIBRATED) for _ in range(2))
    assert made == again and (made.head_mass, made.cut_mass) == ("sink", "drop")
    assert len(said) == 1 and "python -m yopo sinks" in str(said[0].message)
    sinks = made.sinks
    assert (sinks.b, sinks.tokens) == (None, None)
    m = (math.log(60) - sinks.a).sigmoid()  # behind 60 text tokens of equal logits
    assert torch.allclose(m, torch.tensor(CALIBRATED["text_mass"]), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_mass": None}, "text_mass is given exactly when"),
        ({"head_mass": "exact"}, "text_mass is given exactly when"),
        ({"text_mass": [[0.5, 0.5]]}, "text_mass must be 2 rows of 2 numbers from 0 to 1"),
        ({"text_mass": [[0.5, 1.5], [0, 0]]}, "numbers from 0 to 1"),
        ({"text_mass": [[0.5, -0.1], [0, 0]]}, "numbers from 0 to 1"),
        ({"text_mass": [[0.5, float("nan")], [0, 0]]}, r"text_mass\[0, 1\] is nan"),
        ({"text_mass": [[0.5, True], [0, 0]]}, r"text_mass\[0, 1\] is True"),
        ({"text_mass": 0.5}, "text_mass"),
        ({"head_mass": "sink"}, "text_mass is given exactly when"),
        ({"head_mass": "sink", "text_mass": None}, "has no sinks"),
        ({"sinks": None}, "unknown keys: sinks"),
        ({"ffn": 1}, "unknown keys: ffn"),
        ({"layer_cut": None}, "layer_cut is None"),
    ],
)
@pytest.mark.filterwarnings("ignore:a plan has mass 'calibrated'")
def test_a_corrupt_block_of_format_1_is_an_error(changes, words):
    with pytest.raises(ValueError, match=words):
        read(CALIBRATED | changes)


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
        fits = ("head_keep has shape", "leaves no neuron", "ffn is")  # a plan of another model
        assert any(words in str(error) for words in ("'yopo' block", *fits))
