"""PruningPlan.save and .load: the same plan again, from every kind of file, or an error that names
the file and the remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_plans import DECIDED, KEEP, LAYERS, RELEASED, config, plan

from yopo.plan import head_mask
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks


@pytest.mark.parametrize("values", [{}, DECIDED], ids=["defaults", "all set"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_saved_plan_loads_equal_and_leaves_no_other_file(values, kind, tmp_path):
    file = tmp_path / "deep" / "plan.json"
    plan(**values).save(kind(file))
    assert PruningPlan.load(kind(file)) == plan(**values)
    plan(window=7).save(file)
    assert PruningPlan.load(file) == plan(window=7)
    assert list(file.parent.iterdir()) == [file]


@given(
    window=st.none() | st.integers(1, 99),
    ffn_ratio=st.floats(1, 1e6),
    logits=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=2),
)
def test_every_number_survives_the_file(window, ffn_ratio, logits, tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    made = PruningPlan(
        [[1, 0]],
        window=window,
        ffn_ratio=ffn_ratio,
        cut_mass="sink",
        sinks=Sinks([logits]),
    )
    made.save(file)
    assert PruningPlan.load(file) == made


def test_a_plan_in_a_file_is_what_the_file_says_whatever_yopo_mass(tmp_path, monkeypatch):
    plan(cut_mass="drop").save(tmp_path / "plan.json")
    monkeypatch.setenv("YOPO_MASS", "exact")
    assert PruningPlan.load(tmp_path / "plan.json").cut_mass == "drop"


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    plan().save(file)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plan(window=3).save(file)
    monkeypatch.undo()
    assert PruningPlan.load(file) == plan() and list(tmp_path.iterdir()) == [file]


def test_saving_onto_a_folder_or_a_config_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for target in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ValueError, match=r"a file of its own, such as plan\.json") as caught:
            plan().save(target)
        assert str(target) in str(caught.value)
    assert (tmp_path / "config.json").read_text() == "{}"


# --- the kinds of files ------------------------------------------------------------------------


def configs(made: PruningPlan) -> dict[str, dict]:
    """Configs with `made` in them, by what is special about them."""
    flat, inner = config().to_dict(), config().to_dict()
    made.save_to(flat)
    made.save_to(inner)
    return {
        "flat": flat,
        "composite, at the top": {"text_config": config().to_dict(), "yopo": flat["yopo"]},
        "composite, inside": {"text_config": inner},
        # Where a text_config is its class's default, transformers writes no sizes.
        "sizes left to the class": {"text_config": {"model_type": "llama"}, "yopo": flat["yopo"]},
    }


@pytest.mark.parametrize("how", ["file", "folder"])
@pytest.mark.parametrize("kind", configs(plan()))
def test_a_config_or_its_folder_gives_the_plan_in_it(kind, how, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configs(plan(**DECIDED))[kind]))
    assert PruningPlan.load(file if how == "file" else tmp_path) == plan(**DECIDED)


@pytest.mark.parametrize("nested", [False, True])
def test_released_fields_find_their_mask_beside_the_config(nested, tmp_path):
    head_mask.save(tmp_path / "headmask_mine_3.npy", KEEP)
    inner = config(**RELEASED).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": inner} if nested else inner))
    assert PruningPlan.load(tmp_path) == plan(window=5, layer_cut=2, ffn_ratio=2)


def test_released_fields_without_their_mask_are_an_error_that_says_where_it_was_looked_for(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config(**RELEASED).to_dict()))
    with pytest.raises(FileNotFoundError, match="no head mask") as caught:
        PruningPlan.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- what cannot be read -----------------------------------------------------------------------

REMEDY = r"give a file that PruningPlan\.save wrote, a config\.json with a plan in it, or the fold"


@pytest.mark.parametrize("what", ["nothing", "folder without a config", "in no folder"])
def test_a_file_that_is_not_there_is_named_with_the_remedy(what, tmp_path):
    given_path = tmp_path if what.startswith("folder") else tmp_path / "no" / "plan.json"
    if what == "nothing":
        given_path = tmp_path / "plan.json"
    with pytest.raises(FileNotFoundError, match=REMEDY) as caught:
        PruningPlan.load(given_path)
    assert str(given_path) in str(caught.value)


def bad_files() -> dict[str, tuple[bytes, str]]:
    flat = config().to_dict()
    plan().save_to(flat)
    block = flat["yopo"]

    def text(content: object) -> bytes:
        return json.dumps(content).encode()

    return {
        "empty": (b"", "not JSON"),
        "torn": (text(block)[:-20], "not JSON, perhaps cut off"),
        "a head mask": (b"\x93NUMPY\x01\x00", "not JSON"),
        "a list": (b"[]", "no JSON object"),
        "no plan": (text(config().to_dict()), "holds no plan"),
        "an empty object": (b"{}", "holds no plan"),
        "another format": (text({**block, "format": 3}), "format is 3; this yopo reads 1, 2"),
        "no format": (text({k: v for k, v in block.items() if k != "format"}), "format is None"),
        "a key less": (text({k: v for k, v in block.items() if k != "window"}), "keys: window"),
        "a bad value": (text({**block, "window": 0}), "window is 0"),
        "a corrupt block": (text({**flat, "yopo": {}}), "'yopo' block of the config is corrupt"),
        "a bad field": (text({**flat, "sprompt_len": "x"}), "sprompt_len is 'x'"),
        "a field alone": (text({**config().to_dict(), "attncut_w": 5}), "some released pruning"),
        "another model's": (text({**flat, "num_hidden_layers": LAYERS + 1}), "head_keep has shape"),
        "no sizes": (text(RELEASED), "config.num_hidden_layers is None"),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_a_file_without_a_plan_that_can_be_read_is_named_with_what_is_wrong(kind, tmp_path):
    data, words = bad_files()[kind]
    file = tmp_path / "some.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        PruningPlan.load(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    if words == "holds no plan":
        assert "give a file that PruningPlan.save wrote" in str(caught.value)


@given(data=st.data())
def test_a_damaged_plan_file_gives_a_plan_or_one_error_that_names_it(data, tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    plan(window=5).save(file)
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=3))
    file.write_bytes(content)
    try:
        assert isinstance(PruningPlan.load(file), PruningPlan)
    except ValueError as error:
        assert str(file) in str(error)
