"""PruningPlan's way through a model's config: block, released fields, YOPO_MASS."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from small_plans import DECIDED, HEADS, KEEP, LAYERS, RELEASED, SHARES, config, plan
from transformers import LlamaConfig

from yopo.plan import head_mask
from yopo.plan.config_fields import RELEASED_FIELDS
from yopo.plan.pruning_plan import PruningPlan


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


def test_a_config_without_a_plan_gives_none(monkeypatch):
    assert PruningPlan.from_config(config()) is None
    assert PruningPlan.from_config(config().to_dict()) is None
    monkeypatch.setenv("YOPO_MASS", "drop")
    assert PruningPlan.from_config(config()) is None


@pytest.mark.parametrize("sizes", [{}, {"num_attention_heads": 0}, {"intermediate_size": [8, 16]}])
def test_the_sizes_of_a_model_without_a_plan_are_not_judged(sizes):
    """Some families give one for each layer."""
    whole = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    assert PruningPlan.from_config(sizes and whole | sizes) is None


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


@pytest.mark.parametrize("where", ["dict", "object"])
def test_blocks_at_the_top_and_in_text_config_that_differ_are_refused_naming_both(where):
    inner = config()
    plan(window=3).save_to(inner)
    outer = {"text_config": inner.to_dict(), "yopo": inner.yopo}
    made = outer if where == "dict" else SimpleNamespace(text_config=inner, yopo=inner.yopo)
    assert PruningPlan.from_config(made) == plan(window=3)
    other = {**inner.yopo, "window": 5}
    made = {**outer, "yopo": other}
    if where == "object":
        made = SimpleNamespace(text_config=inner, yopo=other)
    with pytest.raises(
        ValueError, match=r"of the config and the config's text_config hold different"
    ):
        PruningPlan.from_config(made)


@pytest.mark.parametrize("where", ["dict", "object"])
def test_a_saved_plan_replaces_the_block_in_text_config(where):
    inner = config()
    plan(window=3).save_to(inner)
    outer = SimpleNamespace(text_config=inner)
    target = {"text_config": inner.to_dict()} if where == "dict" else outer
    plan(window=5).save_to(target)
    assert PruningPlan.from_config(target) == plan(window=5)


def test_a_corrupt_block_in_text_config_is_named_though_the_one_at_the_top_is_good():
    inner = config()
    plan().save_to(inner)
    made = {"text_config": inner.to_dict() | {"yopo": {}}, "yopo": inner.yopo}
    with pytest.raises(ValueError, match="'yopo' block of the config's text_config is corrupt"):
        PruningPlan.from_config(made)


@pytest.mark.llava
def test_the_config_of_the_original_llava_package_carries_a_plan(tmp_path, mask_file):
    language_model = pytest.importorskip("llava.model.language_model.llava_llama")
    target = config(language_model.LlavaConfig)
    plan(**DECIDED).save_to(target)
    target.save_pretrained(tmp_path)
    read = language_model.LlavaConfig.from_pretrained(tmp_path)
    assert PruningPlan.from_config(read) == plan(**DECIDED)
    assert PruningPlan.from_config(config(language_model.LlavaConfig, **RELEASED)) is not None


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


BAD_RELEASED = [
    *(("attncut_w", v) for v in (0, -1, "5", True, 2.5)),
    *(("layercut_num", v) for v in (-1, LAYERS + 1, "2", False)),
    *(("headcut_num", v) for v in (-1, HEADS + 1, "3", True, "../3")),
    *(("mlpcut_ratio", v) for v in (0, 0.5, "2", True)),
    *(("sprompt_len", v) for v in (-1, "35", "x", True, 3.5, [35])),
]


@pytest.mark.parametrize(("field", "value"), BAD_RELEASED, ids=repr)
def test_a_bad_released_value_is_named_before_a_mask_is_looked_for(field, value, monkeypatch):
    def searched(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the mask was looked for")

    monkeypatch.setattr(head_mask, "find", searched)
    with pytest.raises(ValueError, match=field) as caught:
        PruningPlan.from_config(config(**{**RELEASED, field: value}))
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("place", ["top", "text_config"])
@pytest.mark.parametrize("others", [{}, RELEASED], ids=["alone", "with the others"])
@pytest.mark.parametrize(("field", "value"), BAD_RELEASED, ids=repr)
def test_a_bad_released_value_beside_a_block_is_refused_too(field, value, others, place):
    made = config().to_dict()
    plan().save_to(made)
    bad = {**others, field: value}
    if place == "top":
        made |= bad
    else:
        made = {"text_config": {**config().to_dict(), **bad}, "yopo": made["yopo"]}
    with pytest.raises(ValueError, match=rf"{field} is .*allowed") as caught:
        PruningPlan.from_config(made)
    assert repr(value) in str(caught.value) and ("text_config" in str(caught.value)) == (
        place == "text_config"
    )


def test_one_good_released_field_may_stand_beside_a_block():
    made = config(sprompt_len=35)
    plan(window=3).save_to(made)
    assert PruningPlan.from_config(made) == plan(window=3)


@pytest.mark.parametrize("with_a_block", [False, True])
@pytest.mark.parametrize("field", RELEASED_FIELDS)
def test_released_fields_that_contradict_each_other_are_refused_naming_both(
    field, with_a_block, mask_file
):
    inner = config(**RELEASED).to_dict()
    outer = {"text_config": inner, **RELEASED}
    assert PruningPlan.from_config(outer) == PruningPlan.from_config(inner)
    if with_a_block:
        plan().save_to(outer)
    outer[field] = RELEASED[field] - 1
    with pytest.raises(ValueError, match=rf"config\.{field} is .*config\.text_config\.{field} is"):
        PruningPlan.from_config(outer)


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


def test_yopo_mass_overrides_a_plan_with_sinks_and_can_ask_for_them(monkeypatch):
    target = config()
    plan(**DECIDED).save_to(target)
    for setting, masses in (("exact", ("exact", "exact")), ("drop/sink", ("drop", "sink"))):
        monkeypatch.setenv("YOPO_MASS", setting)
        read = PruningPlan.from_config(target)
        assert (read.head_mass, read.cut_mass) == masses
        assert torch.equal(read.sinks.a, torch.tensor(SHARES))


@pytest.mark.parametrize(
    "setting",
    [
        "Exact",
        "none",
        "exact/",
        "/drop",
        "exact/drop/drop",
        "exact,drop",
        " ",
        "calibrated",
        "sink",
    ],
)
def test_a_bad_yopo_mass_is_refused_not_ignored(setting, monkeypatch):
    target = config()
    plan().save_to(target)
    monkeypatch.setenv("YOPO_MASS", setting)
    with pytest.raises(ValueError, match=f"YOPO_MASS is {setting!r}"):
        PruningPlan.from_config(target)
