"""PruningPlan in itself: what it accepts, what it refuses in which words, copies, masses."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from small_plans import DECIDED, HEADS, KEEP, LAYERS, NEURONS, RELEASED, SHARES, config, plan

from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

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
    assert (made.window_causal, made.prune_visual_queries, made.sinks) == (False, True, None)
    assert (made.ffn, made.visual_attention) == (None, True)


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
    for tensor in (made.head_keep, made.sinks.a, read.head_keep, read.sinks.a, released.head_keep):
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
    *(("window", v, "whole numbers from 1") for v in (0, -3, 2.5, 5.0, True, "5")),
    *(("ffn", v, "whole numbers from 0") for v in (-3, 2.5, 5.0, True, "5")),
    *(("visual_attention", v, "True, False") for v in (1, 0, None, "false")),
    ("sinks", SHARES, "None, Sinks"),
    *(("layer_cut", v, "0 to 4") for v in (-1, 5, 1.0, True, False, "2")),
    *(("ffn_ratio", v, "from 1") for v in (0, 0.99, -2, True, "2", None)),
    *(("ffn_ratio", v, "finite") for v in (float("inf"), float("nan"), 10**400)),
    *(("head_mass", v, "exact, drop, sink") for v in ("Exact", "calibrated", "", None, 1, [])),
    *(("cut_mass", v, "exact, drop, sink") for v in ("dropped", "exact/drop", True)),
    *(("window_causal", v, "True, False") for v in (1, 0, None, "false")),
    *(("prune_visual_queries", v, "True, False") for v in (1, 0, None, "true")),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_VALUES, ids=repr)
def test_a_bad_value_is_refused_with_field_value_and_range(field, value, allowed):
    with pytest.raises(ValueError) as caught:
        plan(**{field: value})
    text = str(caught.value)
    assert field in text and allowed in text
    assert repr(value)[:50] in text or field == "sinks"


@pytest.mark.parametrize(
    ("field", "value"), [("layer_cut", 0), ("layer_cut", LAYERS), ("window", 1), ("ffn", 0)]
)
def test_the_ends_of_the_ranges_are_allowed(field, value):
    assert getattr(plan(**{field: value}), field) == value


def test_without_a_layer_cut_it_is_the_layer_after_the_last_that_reads():
    keep = torch.tensor(KEEP)
    keep[2:] = 0
    assert plan(head_keep=keep).layer_cut == 2
    assert plan(head_keep=torch.zeros(LAYERS, HEADS)).layer_cut == 0
    assert plan(head_keep=keep, layer_cut=None).layer_cut == 2
    assert plan(head_keep=keep, layer_cut=LAYERS).layer_cut == LAYERS
    assert replace(plan(head_keep=keep), head_keep=KEEP).layer_cut == 2, "found once, then a value"


# --- per layer ---------------------------------------------------------------------------------

EACH = {
    "window": [None, 5, 1, None],
    "ffn": [None, 0, 7, NEURONS],
    "visual_attention": [True, False, False, True],
}


@pytest.mark.parametrize("field", EACH)
@pytest.mark.parametrize("make", [list, tuple])
def test_one_value_for_each_layer_is_kept_as_a_tuple(field, make):
    made = plan(**{field: make(EACH[field])})
    assert getattr(made, field) == tuple(EACH[field])
    assert made == plan(**{field: EACH[field]}) and hash(made) == hash(plan(**{field: EACH[field]}))
    assert made != plan()


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_tensors_and_arrays_of_values_become_python_numbers(kind):
    made = plan(
        window=kind([5, 3, 3, 1]),
        ffn=kind([0, 1, 2, 3]),
        visual_attention=kind([True, False, True, True]),
    )
    assert (made.window, made.ffn) == ((5, 3, 3, 1), (0, 1, 2, 3))
    assert made.visual_attention == (True, False, True, True)
    assert plan(window=kind(5)) == plan(window=5)


@pytest.mark.parametrize(
    ("field", "value"), [("window", None), ("window", 3), ("ffn", 0), ("visual_attention", False)]
)
def test_equal_values_of_all_layers_are_one_value(field, value):
    made = plan(**{field: [value] * LAYERS})
    assert getattr(made, field) == value and made == plan(**{field: value})
    assert hash(made) == hash(plan(**{field: value}))


@pytest.mark.parametrize("field", EACH)
@pytest.mark.parametrize("count", [0, 1, LAYERS - 1, LAYERS + 1])
def test_values_of_another_number_of_layers_are_refused(field, count):
    with pytest.raises(ValueError, match=f"{field} has {count} values; allowed: .* or 4, one each"):
        plan(**{field: EACH[field][:1] * count})


@pytest.mark.parametrize(
    ("field", "bad"),
    [("window", 0), ("window", True), ("ffn", -1), ("ffn", 1.5), ("visual_attention", 1)],
)
def test_a_bad_value_among_those_of_the_layers_is_named_with_its_place(field, bad):
    with pytest.raises(ValueError, match=rf"{field}\[2\] is {bad!r}"):
        plan(**{field: [*EACH[field][:2], bad, EACH[field][3]]})


def test_windows_and_who_attends_are_told_for_each_layer():
    assert plan(window=5).windows == (5,) * LAYERS and plan().visual_attends == (True,) * LAYERS
    made = plan(**EACH)
    assert made.windows == tuple(EACH["window"])
    assert made.visual_attends == tuple(EACH["visual_attention"])


# --- sinks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["head_mass", "cut_mass"])
def test_the_mass_sink_without_sinks_is_refused_naming_the_command(field):
    with pytest.raises(ValueError, match=f"{field} .*'sink'.*no sinks; .*python -m yopo sinks"):
        plan(**{field: "sink"})
    assert plan(**{field: "sink"}, sinks=Sinks(SHARES)).sinks == Sinks(SHARES)


def test_sinks_may_be_there_though_no_mass_uses_them():
    assert plan(sinks=Sinks(SHARES)).head_mass == "exact"


@pytest.mark.parametrize("a", [SHARES[:-1], [row[:-1] for row in SHARES], [[0.0]]])
def test_sinks_of_another_model_are_refused_naming_both_shapes(a):
    with pytest.raises(ValueError, match=r"sinks\.a has shape .*\(4, 10\).*of another model"):
        plan(sinks=Sinks(a))


def test_sinks_with_heads_of_another_size_are_refused_for_the_model():
    a = torch.zeros(LAYERS, HEADS)
    plan(sinks=Sinks(a, torch.zeros(LAYERS, HEADS, 4))).validate(config())
    with pytest.raises(ValueError, match=r"sinks\.b has shape \(4, 10, 5\).*heads have 4 features"):
        plan(sinks=Sinks(a, torch.zeros(LAYERS, HEADS, 5))).validate(config())


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
    assert plan(ffn_ratio=ratio).ffn_neurons(size) == (neurons,) * LAYERS


def test_neurons_of_each_layer_are_those_given_and_never_more_than_there_are():
    assert plan(**EACH).ffn_neurons(NEURONS) == (NEURONS, 0, 7, NEURONS)
    assert plan(ffn=0).ffn_neurons(NEURONS) == (0,) * LAYERS
    plan(**EACH).validate(config())
    for ffn in (NEURONS + 1, [0, 0, 0, NEURONS + 1]):
        with pytest.raises(ValueError, match="ffn is 49; allowed: 0 to intermediate_size, 48"):
            plan(ffn=ffn).validate(config())
        with pytest.raises(ValueError, match="ffn is 49"):
            plan(ffn=ffn).save_to(config())


@pytest.mark.parametrize("ffn", [0, NEURONS, EACH["ffn"]])
def test_neurons_and_a_ratio_at_once_are_refused(ffn):
    with pytest.raises(ValueError, match="ffn is .* and ffn_ratio 2: give one of them"):
        plan(ffn=ffn, ffn_ratio=2)
    assert plan(ffn=ffn, ffn_ratio=1).ffn_ratio == 1


def test_a_config_of_no_language_model_is_refused_by_name():
    with pytest.raises(ValueError, match="config.num_hidden_layers is None"):
        plan().validate({})


# --- with_mass ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "masses"),
    [("exact", ("exact", "exact")), ("drop", ("drop", "drop")), ("exact/drop", ("exact", "drop"))],
)
def test_with_mass_changes_the_masses_and_nothing_else(setting, masses):
    made = plan(**DECIDED)
    changed = made.with_mass(setting)
    assert (changed.head_mass, changed.cut_mass) == masses
    assert changed == replace(made, head_mass=masses[0], cut_mass=masses[1])
    assert changed.sinks == made.sinks, "to be asked for again"
    assert made == plan(**DECIDED)


def test_with_mass_refuses_sink_without_sinks_and_names_the_remedy():
    with pytest.raises(ValueError, match=r"--mass is 'drop/sink'.*no sinks; .*yopo sinks"):
        plan().with_mass("drop/sink", name="--mass")


@pytest.mark.parametrize(
    "setting", ["", "calibrated", "exact/", "/drop", "drop/drop/drop", None, 1]
)
def test_with_mass_refuses_other_words_calling_the_setting_by_its_name(setting):
    with pytest.raises(ValueError, match="mass is .*allowed: HEAD or HEAD/CUT.*exact, drop, sink"):
        plan().with_mass(setting)


# --- equality and copies -------------------------------------------------------------------------


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
        {"sinks": Sinks(SHARES)},
        {"ffn": [None, None, None, 0]},
        {"visual_attention": [True, True, True, False]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_plans_that_differ_in_one_field_are_not_equal(change):
    assert plan(**change) != plan()


def test_equal_plans_have_one_hash_and_plans_equal_nothing_else():
    assert len({plan(**DECIDED), plan(**DECIDED)}) == 1
    other = torch.tensor(SHARES)
    other[0, 0] = 0.9
    assert plan(**{**DECIDED, "sinks": Sinks(other)}) != plan(**DECIDED)
    assert plan() != KEEP
    assert replace(plan(), window=3).window == 3


def stored(made: PruningPlan, weights_only: bool) -> PruningPlan:
    file = io.BytesIO()
    torch.save({"plan": made}, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)["plan"]


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda made, protocol=protocol: pickle.loads(
            pickle.dumps(made, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "torch.save": lambda made: stored(made, False),
}


@pytest.mark.parametrize(
    "values",
    [{}, DECIDED, EACH | {"sinks": Sinks(SHARES, torch.ones(LAYERS, HEADS, 3), None)}],
    ids=["defaults", "all set", "per layer"],
)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_equal_field_by_field_and_found_in_a_dictionary(how, values):
    made = plan(**values)
    again = COPIES[how](made)
    assert again == made and {made: "here"}[again] == "here"
    for field in fields(PruningPlan):
        ours, theirs = getattr(again, field.name), getattr(made, field.name)
        assert type(ours) is type(theirs)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_a_deep_copy_does_not_share_its_mask():
    made = plan()
    copy.deepcopy(made).head_keep.logical_not_()
    assert made == plan()


def test_a_plan_that_torch_is_told_to_trust_loads_as_weights():
    if not hasattr(torch.serialization, "safe_globals"):
        pytest.skip("this torch cannot be told")
    with torch.serialization.safe_globals([PruningPlan, Sinks]):
        assert stored(plan(**DECIDED), True) == plan(**DECIDED)
