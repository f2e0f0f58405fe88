"""PruningPlan: what it accepts, what it refuses in which words, its way through a config."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from yopo.plan import head_mask
from yopo.plan.pruning_plan import RELEASED_FIELDS, PruningPlan

LAYERS, HEADS, NEURONS = 4, 10, 48
KEEP = [[(layer + head) % 3 == 0 for head in range(HEADS)] for layer in range(LAYERS)]
SHARES = [[(layer + head) / 16 for head in range(HEADS)] for layer in range(LAYERS)]
RELEASED = {
    "attncut_w": 5,
    "layercut_num": 2,
    "headcut_num": 3,
    "mlpcut_ratio": 2,
    "sprompt_len": 35,
}
DECIDED = {
    "window": 4,
    "layer_cut": 2,
    "ffn_ratio": 2.5,
    "head_mass": "calibrated",
    "cut_mass": "drop",
    "window_causal": True,
    "prune_visual_queries": False,
    "text_mass": SHARES,
}


def plan(**values: object) -> PruningPlan:
    return PruningPlan(**{"head_keep": KEEP, **values})


def config(cls: type = LlamaConfig, **values: object) -> LlamaConfig:
    return cls(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        hidden_size=HEADS * 4,
        intermediate_size=NEURONS,
        **values,
    )


def with_block(**changes: object) -> LlamaConfig:
    """A config whose block differs from a good one in the keys given."""
    made = config()
    plan(window=5).save_to(made)
    made.yopo = {**made.yopo, **changes}
    return made


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOPO_MASS", raising=False)


@pytest.fixture
def mask_file(tmp_path, monkeypatch):
    """The mask that RELEASED names, in the folder that is searched."""
    monkeypatch.setenv("YOPO_HEADMASK_DIR", str(tmp_path))
    return head_mask.save(tmp_path / "headmask_test_3.npy", KEEP)


# --- the constructor ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_mask",
    [
        KEEP,
        tuple(map(tuple, KEEP)),
        torch.tensor(KEEP),
        torch.tensor(KEEP).to(torch.bfloat16),
        torch.tensor(KEEP).long(),
        np.array(KEEP),
        np.array(KEEP, dtype=np.uint8),
        np.array(KEEP, dtype=np.float32),
        [np.array(row) for row in KEEP],
        [[float(cell) for cell in row] for row in KEEP],
    ],
    ids=lambda value: type(value).__name__ + str(getattr(value, "dtype", "")),
)
def test_every_kind_of_mask_of_0_and_1_gives_the_same_plan(given_mask):
    made = plan(head_keep=given_mask)
    assert made.head_keep.dtype == torch.bool and made.head_keep.device.type == "cpu"
    assert made == plan()
    assert (made.num_layers, made.num_heads) == (LAYERS, HEADS)


def test_defaults_prune_nothing_but_the_heads():
    made = plan()
    assert (made.window, made.layer_cut, made.ffn_ratio) == (None, LAYERS, 1)
    assert (made.head_mass, made.cut_mass) == ("exact", "exact")
    assert (made.window_causal, made.prune_visual_queries, made.text_mass) == (False, True, None)


def test_numpy_numbers_become_python_numbers():
    made = plan(
        window=np.int64(5), layer_cut=np.int8(2), ffn_ratio=np.float32(2), window_causal=np.True_
    )
    assert [type(v) for v in (made.window, made.layer_cut, made.ffn_ratio)] == [int, int, float]
    assert made.window_causal is True
    assert plan(ffn_ratio=Fraction(3, 2)).ffn_ratio == 1.5


def test_the_plan_does_not_share_memory_with_the_mask_it_was_given():
    given_mask = torch.tensor(KEEP)
    made = plan(head_keep=given_mask)
    given_mask.logical_not_()
    assert made == plan()


def test_tensors_are_on_the_cpu_even_while_models_are_built_on_meta(mask_file):
    with torch.device("meta"):
        made = plan(**DECIDED)
        target = config()
        made.save_to(target)
        read = PruningPlan.from_config(target)
        released = PruningPlan.from_config(config(**RELEASED))
    assert read == made and released.head_keep.tolist() == KEEP
    for tensor in (made.head_keep, made.text_mass, read.head_keep, released.head_keep):
        assert tensor.device.type == "cpu"


def test_a_plan_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        plan().window = 3


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan"), None, "1", 1 + 1e-9])
@pytest.mark.parametrize("make", [list, lambda rows: np.array(rows, dtype=object)])
def test_one_value_that_is_not_0_or_1_is_named_with_its_place(value, make):
    rows = copy.deepcopy(KEEP)
    rows[2][7] = value
    rows[3][1] = 9
    with pytest.raises(ValueError, match=r"head_keep\[2, 7\] is .*allowed: 0, 1"):
        plan(head_keep=make(rows))


def test_one_tensor_value_that_is_not_0_or_1_is_named_with_its_place():
    rows = torch.tensor(KEEP).float()
    rows[1, 3] = 0.25
    with pytest.raises(ValueError, match=r"head_keep\[1, 3\] is 0.25"):
        plan(head_keep=rows)


@pytest.mark.parametrize(
    "given_mask",
    [[1, 0], [[[1]]], [], [[]], [[1, 0], [1]], 1, None, "10", torch.ones(2, 0), {"0": [1]}],
    ids=repr,
)
def test_a_mask_that_is_not_two_dimensional_is_refused(given_mask):
    with pytest.raises(ValueError, match="head_keep"):
        plan(head_keep=given_mask)


def test_a_mask_without_values_is_refused():
    with pytest.raises(ValueError, match="head_keep is a meta tensor"):
        plan(head_keep=torch.ones(2, 2, device="meta"))


BAD_VALUES = [
    *(("window", v, "whole numbers from 1") for v in (0, -3, 2.5, 5.0, True, "5", [5])),
    *(("layer_cut", v, "0 to 4") for v in (-1, 5, 1.0, True, False, "2")),
    *(("ffn_ratio", v, "from 1") for v in (0, 0.99, -2, True, "2", None)),
    *(("ffn_ratio", v, "finite") for v in (float("inf"), float("nan"), 10**400)),
    *(("head_mass", v, "exact, drop, calibrated") for v in ("Exact", "", None, 1, [])),
    *(("cut_mass", v, "exact, drop, calibrated") for v in ("dropped", "exact/drop", True)),
    *(("window_causal", v, "True, False") for v in (1, 0, None, "false")),
    *(("prune_visual_queries", v, "True, False") for v in (1, 0, None, "true")),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_VALUES, ids=repr)
def test_a_bad_value_is_refused_with_field_value_and_range(field, value, allowed):
    with pytest.raises(ValueError) as caught:
        plan(**{field: value})
    text = str(caught.value)
    assert field in text and repr(value)[:50] in text and allowed in text


@pytest.mark.parametrize(
    ("field", "value"), [("layer_cut", 0), ("layer_cut", LAYERS), ("window", 1)]
)
def test_the_ends_of_the_ranges_are_allowed(field, value):
    assert getattr(plan(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"head_mass": "calibrated"}, "text_mass None"),
        ({"cut_mass": "calibrated"}, "text_mass None"),
        ({"text_mass": SHARES}, "text_mass given"),
        ({"cut_mass": "calibrated", "text_mass": SHARES[:-1]}, r"shape \(3, 10\).*\(4, 10\)"),
        ({"cut_mass": "calibrated", "text_mass": 0.5}, r"shape \(\)"),
        ({"cut_mass": "calibrated", "text_mass": [[1.5] * HEADS] * LAYERS}, r"\[0, 0\] is 1.5"),
        ({"cut_mass": "calibrated", "text_mass": [[-0.1] * HEADS] * LAYERS}, r"is -0.1"),
        ({"cut_mass": "calibrated", "text_mass": [[float("nan")] * HEADS] * LAYERS}, "is nan"),
        ({"cut_mass": "calibrated", "text_mass": [["1"] * HEADS] * LAYERS}, "is '1'"),
        ({"cut_mass": "calibrated", "text_mass": [[True] * HEADS] * LAYERS}, "is True"),
        ({"cut_mass": "calibrated", "text_mass": torch.ones(4, 10, device="meta")}, "meta"),
    ],
)
def test_constants_are_given_exactly_when_they_are_used_and_are_shares(values, words):
    with pytest.raises(ValueError, match=f"text_mass.*{words}|{words}"):
        plan(**values)


# --- against the model -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [("num_hidden_layers", 5), ("num_attention_heads", 20)])
def test_a_mask_of_another_model_is_refused_naming_both_shapes(size):
    target = config()
    setattr(target, *size)
    with pytest.raises(ValueError, match=r"head_keep has shape \(4, 10\).*\((5, 10|4, 20)\)"):
        plan().validate(target)


def test_a_ratio_above_the_ffn_size_is_refused():
    plan(ffn_ratio=NEURONS).validate(config())
    with pytest.raises(ValueError, match="ffn_ratio is 48.5.*allowed: 1 to 48"):
        plan(ffn_ratio=NEURONS + 0.5).validate(config())
    with pytest.raises(ValueError, match="ffn_ratio"):
        plan(ffn_ratio=NEURONS * 2).save_to(config())


@pytest.mark.parametrize(
    ("size", "ratio", "neurons"), [(11008, 2, 5504), (10, 3, 3), (48, 1, 48), (5, 5, 1)]
)
def test_neurons_are_the_whole_part_of_the_quotient(size, ratio, neurons):
    assert plan(ffn_ratio=ratio).ffn_neurons(size) == neurons


def test_a_config_of_no_language_model_is_refused_by_name():
    with pytest.raises(ValueError, match="config.num_hidden_layers is None"):
        plan().validate({})


# --- through a config --------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, DECIDED], ids=["defaults", "all set"])
def test_a_saved_plan_comes_back_equal(values, tmp_path):
    made, target = plan(**values), config()
    made.save_to(target)
    assert PruningPlan.from_config(target) == made
    assert PruningPlan.from_config(target.to_dict()) == made
    assert PruningPlan.from_config(LlamaConfig(**target.to_dict())) == made
    assert PruningPlan.from_config(copy.deepcopy(target)) == made
    target.save_pretrained(tmp_path)
    assert PruningPlan.from_config(LlamaConfig.from_pretrained(tmp_path)) == made
    assert PruningPlan.from_config(json.loads((tmp_path / "config.json").read_text())) == made


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


@pytest.mark.parametrize(
    "change",
    [
        {"window": 5},
        {"layer_cut": 1},
        {"ffn_ratio": 1.5},
        {"head_mass": "drop"},
        {"cut_mass": "drop"},
        {"window_causal": True},
        {"prune_visual_queries": False},
        {"head_keep": [[1] * HEADS] * LAYERS},
    ],
    ids=lambda change: next(iter(change)),
)
def test_plans_that_differ_in_one_field_are_not_equal(change):
    assert plan(**change) != plan()


def test_equal_plans_have_one_hash_and_plans_equal_nothing_else():
    assert len({plan(**DECIDED), plan(**DECIDED)}) == 1
    other = torch.tensor(SHARES)
    other[0, 0] = 0.9
    assert plan(**{**DECIDED, "text_mass": other}) != plan(**DECIDED)
    assert plan() != KEEP
    assert pickle.loads(pickle.dumps(plan(**DECIDED))) == plan(**DECIDED)
    assert replace(plan(), window=3).window == 3


def test_a_config_without_a_plan_gives_none(monkeypatch):
    assert PruningPlan.from_config(config()) is None
    assert PruningPlan.from_config(config().to_dict()) is None
    monkeypatch.setenv("YOPO_MASS", "drop")
    assert PruningPlan.from_config(config()) is None


def test_a_composite_config_is_read_through_its_language_model():
    class Composite:
        def __init__(self, text_config: object) -> None:
            self.text_config = text_config

    text = config()
    outer = Composite(text)
    made = plan(window=3)
    made.save_to(outer)
    assert PruningPlan.from_config(outer) == made and PruningPlan.from_config(text) is None
    inner = config()
    made.save_to(inner)
    assert PruningPlan.from_config(Composite(inner)) == made
    assert PruningPlan.from_config({"text_config": inner.to_dict()}) == made


@pytest.mark.llava
def test_the_config_of_the_original_llava_package_carries_a_plan(tmp_path, mask_file):
    language_model = pytest.importorskip("llava.model.language_model.llava_llama")
    target = config(language_model.LlavaConfig)
    plan(**DECIDED).save_to(target)
    target.save_pretrained(tmp_path)
    read = language_model.LlavaConfig.from_pretrained(tmp_path)
    assert PruningPlan.from_config(read) == plan(**DECIDED)
    assert PruningPlan.from_config(config(language_model.LlavaConfig, **RELEASED)) is not None


# --- a corrupt block ---------------------------------------------------------------------------

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


# --- released fields ---------------------------------------------------------------------------


def test_released_fields_are_read_as_they_stand(mask_file):
    read = PruningPlan.from_config(config(**RELEASED))
    assert read == plan(window=5, layer_cut=2, ffn_ratio=2, head_mass="exact", cut_mass="exact")
    assert PruningPlan.from_config(config(**RELEASED).to_dict()) == read


def test_released_fields_find_their_mask_in_the_checkpoint_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("YOPO_HEADMASK_DIR", raising=False)
    head_mask.save(tmp_path / "headmask_mine_3.npy", KEEP)
    target = config(**RELEASED)
    target._name_or_path = str(tmp_path)
    assert PruningPlan.from_config(target).head_keep.tolist() == KEEP


def test_released_fields_stay_when_a_plan_is_written_and_the_block_wins(mask_file, tmp_path):
    target = config(**RELEASED)
    plan(window=9, cut_mass="drop").save_to(target)
    target.save_pretrained(tmp_path)
    read = LlamaConfig.from_pretrained(tmp_path)
    assert {name: getattr(read, name) for name in RELEASED_FIELDS} == RELEASED
    assert PruningPlan.from_config(read) == plan(window=9, cut_mass="drop")


@pytest.mark.parametrize("gone", RELEASED_FIELDS)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_released_fields_that_are_not_all_there_are_named_with_the_remedy(gone, how, mask_file):
    target = config(**RELEASED)
    if how == "absent":
        delattr(target, gone)
    else:
        setattr(target, gone, None)
    with pytest.raises(ValueError, match=f"but not {gone}; add them"):
        PruningPlan.from_config(target)


def test_one_released_field_alone_names_the_other_four():
    with pytest.raises(ValueError, match="layercut_num, headcut_num, mlpcut_ratio, sprompt_len"):
        PruningPlan.from_config(config(attncut_w=5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("attncut_w", v) for v in (0, -1, "5", True, 2.5)),
        *(("layercut_num", v) for v in (-1, LAYERS + 1, "2", False)),
        *(("headcut_num", v) for v in (-1, HEADS + 1, "3", True, "../3")),
        *(("mlpcut_ratio", v) for v in (0, 0.5, "2", True)),
        *(("sprompt_len", v) for v in (-1, "35", True, 3.5)),
    ],
)
def test_a_bad_released_value_is_named_before_a_mask_is_looked_for(field, value, monkeypatch):
    def searched(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the mask was looked for")

    monkeypatch.setattr(head_mask, "find", searched)
    with pytest.raises(ValueError, match=field) as caught:
        PruningPlan.from_config(config(**{**RELEASED, field: value}))
    assert repr(value) in str(caught.value)


def test_a_released_ratio_above_the_ffn_size_is_refused(mask_file):
    with pytest.raises(ValueError, match="ffn_ratio is 49"):
        PruningPlan.from_config(config(**{**RELEASED, "mlpcut_ratio": 49}))


# --- YOPO_MASS ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "masses"),
    [
        ("exact", ("exact", "exact")),
        ("drop", ("drop", "drop")),
        ("exact/drop", ("exact", "drop")),
        ("drop/exact", ("drop", "exact")),
        ("", ("exact", "exact")),
    ],
)
def test_yopo_mass_overrides_what_a_config_says(setting, masses, monkeypatch, mask_file):
    block = config()
    plan().save_to(block)
    monkeypatch.setenv("YOPO_MASS", setting)
    for target in (block, config(**RELEASED)):
        read = PruningPlan.from_config(target)
        assert (read.head_mass, read.cut_mass) == masses
    assert plan().head_mass == "exact", "a plan made in code is what it says"


def test_yopo_mass_overrides_a_calibrated_plan_and_can_ask_for_its_constants(monkeypatch):
    target = config()
    plan(**DECIDED).save_to(target)
    monkeypatch.setenv("YOPO_MASS", "exact")
    assert PruningPlan.from_config(target).text_mass is None
    monkeypatch.setenv("YOPO_MASS", "drop/calibrated")
    read = PruningPlan.from_config(target)
    assert (read.head_mass, read.cut_mass) == ("drop", "calibrated")
    assert torch.equal(read.text_mass, torch.tensor(SHARES))


@pytest.mark.parametrize(
    "setting",
    ["Exact", "none", "exact/", "/drop", "exact/drop/drop", "exact,drop", " ", "calibrated"],
)
def test_a_bad_yopo_mass_is_refused_not_ignored(setting, monkeypatch):
    target = config()
    plan().save_to(target)
    monkeypatch.setenv("YOPO_MASS", setting)
    with pytest.raises(ValueError, match=f"YOPO_MASS is {setting!r}"):
        PruningPlan.from_config(target)


# --- with_mass ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "masses"),
    [("exact", ("exact", "exact")), ("drop", ("drop", "drop")), ("exact/drop", ("exact", "drop"))],
)
def test_with_mass_changes_the_masses_and_nothing_else(setting, masses):
    made = plan(**DECIDED)
    changed = made.with_mass(setting)
    assert (changed.head_mass, changed.cut_mass) == masses
    assert changed == replace(made, head_mass=masses[0], cut_mass=masses[1], text_mass=None)
    assert made == plan(**DECIDED)


def test_with_mass_keeps_the_constants_that_calibrated_uses():
    changed = plan(**DECIDED).with_mass("drop/calibrated", text_mass=torch.ones(LAYERS, HEADS))
    assert torch.equal(changed.text_mass, torch.tensor(SHARES)), "its own, not those offered"
    lacking = plan().with_mass("calibrated", text_mass=SHARES)
    assert torch.equal(lacking.text_mass, torch.tensor(SHARES))
    assert plan().with_mass("drop", text_mass=SHARES).text_mass is None


def test_with_mass_refuses_calibrated_without_constants_and_names_the_remedy():
    with pytest.raises(ValueError, match=r"--mass is 'drop/calibrated'.*no.*text_mass; use exact"):
        plan().with_mass("drop/calibrated", name="--mass")


@pytest.mark.parametrize("setting", ["", "Exact", "exact/", "/drop", "drop/drop/drop", None, 1, []])
def test_with_mass_refuses_other_words_calling_the_setting_by_its_name(setting):
    with pytest.raises(ValueError, match="mass is .*allowed: HEAD or HEAD/CUT.*exact, drop, cali"):
        plan().with_mass(setting)


# --- in words ----------------------------------------------------------------------------------


def test_the_summary_names_what_is_pruned():
    words = plan(window=5, layer_cut=2, ffn_ratio=2, cut_mass="drop").summary()
    for part in ("window 5", "7 of 20 heads", "1/2", "layer 2 of 4", "exact", "drop"):
        assert part in words
    nothing = PruningPlan(torch.ones(LAYERS, HEADS)).summary()
    assert "not restricted" in nothing and "40 of 40" in nothing and "none" not in nothing
