"""Sinks in themselves and their file: what is checked, where it is looked for, what is refused."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_plans import HEADS, LAYERS, config, plan

from yopo.plan import sinks as sinks_module
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

A = torch.linspace(-3, 3, LAYERS * HEADS).view(LAYERS, HEADS)
B = torch.linspace(-1, 1, LAYERS * HEADS * 4).view(LAYERS, HEADS, 4)


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def with_sinks(**changes: object) -> PruningPlan:
    return plan(head_mass="sink", sinks=Sinks(**{"a": A, "b": B, "tokens": 9, **changes}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": A[0]}, r"sinks\.a has shape \(10,\); allowed: 2 dimensions"),
        ({"a": A[:0]}, r"sinks\.a has shape \(0, 10\)"),
        ({"a": None}, r"sinks\.a"),
        ({"a": [[1, 2], [3]]}, r"sinks\.a\[0\] is \[1, 2\]"),
        (
            {"a": A.masked_fill(A[2, 1] == A, torch.nan)},
            r"sinks\.a\[2, 1\] is nan; allowed",
        ),
        ({"a": A.bool()}, r"sinks\.a is of torch.bool"),
        ({"a": A.to(torch.complex64)}, r"sinks\.a is of torch.complex64"),
        ({"a": A.to("meta")}, r"sinks\.a must be numbers"),
        ({"a": A.double() * 1e300}, r"sinks\.a\[0, 0\] is -inf"),
        ({"b": B[0]}, r"sinks\.b has shape \(10, 4\)"),
        ({"b": B[1:]}, r"sinks\.b has shape \(3, 10, 4\); allowed: sinks\.a's, \(4, 10\)"),
        ({"b": B[..., :0]}, r"sinks\.b has shape \(4, 10, 0\)"),
        ({"a": A * 0 - 2e4}, r"sinks\.a\[0, 0\] is -20000; allowed: -1e4 to 1e4"),
        ({"b": B / 0}, r"sinks\.b\[0, 0, 0\] is -inf"),
        ({"tokens": 0}, r"sinks\.tokens is 0"),
        ({"tokens": 2.0}, r"sinks\.tokens is 2\.0"),
        ({"tokens": 10**30}, rf"sinks\.tokens is {10**30}; allowed: .* to {2**63 - 1}"),
    ],
)
def test_bad_sinks_are_refused_with_field_value_and_range(values, words):
    with pytest.raises(ValueError, match=words):
        Sinks(**{"a": A, "b": B, "tokens": 9, **values})


@pytest.mark.parametrize("change", [{"a": A + 1e-6}, {"b": B * 2}, {"b": None}, {"tokens": None}])
def test_sinks_that_differ_in_anything_are_not_equal(change):
    made = Sinks(A, B, 9)
    other = Sinks(**{"a": A, "b": B, "tokens": 9, **change})
    assert made != other and made.checksum != other.checksum and hash(made) == hash(Sinks(A, B, 9))
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made and again.checksum == made.checksum


def test_sinks_share_no_memory_with_what_they_were_given():
    given = A.clone()
    made = Sinks(given)
    given += 1
    assert torch.equal(made.a, A)


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan.json", "my plan (2).json", ".hidden.json", "plan"])
def test_a_plan_file_has_its_sinks_beside_it_and_finds_them_again(name, tmp_path):
    made = with_sinks(b=B.mT.contiguous().mT)  # in another order in memory
    made.save(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 2
    assert PruningPlan.load(tmp_path / name) == made


def test_plan_files_of_like_names_do_not_share_their_sinks(tmp_path):
    made = {name: with_sinks(a=A + number) for number, name in enumerate(("p", "p.json", "p.v2"))}
    for name, one in made.items():
        one.save(tmp_path / name)
    assert {name: PruningPlan.load(tmp_path / name) for name in made} == made


def test_sinks_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        made = Sinks(A * 1, B * 1)
    assert not (made.a.is_inference() or made.b.is_inference())


def test_sinks_without_b_need_no_file(tmp_path):
    made = with_sinks(b=None)
    made.save(tmp_path / "plan.json")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert PruningPlan.load(tmp_path / "plan.json") == made


def in_folder(folder) -> dict:
    """config.json of a checkpoint with sinks, whose file is in the folder too."""
    made, target = with_sinks(), config().to_dict()
    made.save_to(target)
    made.sinks.save(folder)
    (folder / "config.json").write_text(json.dumps(target))
    return json.loads(json.dumps(target))


def test_a_checkpoint_folder_has_the_sinks_that_its_config_names(tmp_path):
    target = in_folder(tmp_path)
    assert PruningPlan.load(tmp_path) == with_sinks()
    assert PruningPlan.from_config(target | {"_name_or_path": str(tmp_path)}) == with_sinks()


def test_a_config_copied_in_memory_needs_no_file():
    target = config()
    with_sinks().save_to(target)
    for copied in (copy.deepcopy(target), pickle.loads(pickle.dumps(target)), target.to_dict()):
        assert PruningPlan.from_config(copied) == with_sinks()
    as_json = json.dumps(target.to_dict())
    assert PruningPlan.from_config(json.loads(as_json)) == with_sinks()  # as long as target lives
    with pytest.raises(FileNotFoundError, match="some/where"):
        PruningPlan.from_config(json.loads(as_json) | {"_name_or_path": "some/where"})


@pytest.mark.parametrize("change", [{"tokens": 1}, {"checksum": f"sha256:{'1' * 64}"}])
def test_what_a_config_in_memory_says_of_its_sinks_must_be_true(change):
    target = config()
    with_sinks().save_to(target)
    target.yopo["sinks"].update(change)
    with pytest.raises(FileNotFoundError, match="yopo sinks"):
        PruningPlan.from_config(target)


@pytest.mark.parametrize("where", ["no/such/folder", "."])
def test_sinks_that_are_not_there_are_named_with_the_remedy(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = in_folder(tmp_path)
    (tmp_path / sinks_module.FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"yopo_sinks\.safetensors.*python -m yopo sinks"):
        PruningPlan.from_config(target | {"_name_or_path": where})


def test_sinks_of_another_plan_are_refused_by_their_checksum(tmp_path):
    in_folder(tmp_path)
    Sinks(A + 1, B, 9).save(tmp_path)
    with pytest.raises(ValueError, match=r"not the file that the plan was saved with.*yopo sinks"):
        PruningPlan.load(tmp_path)


def test_another_number_of_tokens_than_the_file_was_saved_with_is_refused(tmp_path):
    target = in_folder(tmp_path)
    target["yopo"]["sinks"]["tokens"] = 1
    with pytest.raises(ValueError, match="not the file that the plan was saved with"):
        PruningPlan.from_config(target | {"_name_or_path": str(tmp_path)})


@pytest.mark.parametrize("content", ["", "torn", "no safetensors", "nan", "a alone", "other shape"])
def test_a_file_that_holds_no_sinks_is_refused_by_name(content, tmp_path):
    in_folder(tmp_path)
    file = tmp_path / sinks_module.FILE
    held = load_file(file)
    if content in ("", "torn", "no safetensors"):
        whole = file.read_bytes()
        file.write_bytes({"": b"", "torn": whole[:-9]}.get(content, b"{}" * 99))
        words = "no safetensors file"
    elif content == "nan":
        held["b"][1, 2, 3] = torch.nan
        words = r"sinks\.b\[1, 2, 3\] is nan"
    elif content == "a alone":
        del held["b"]
        words = r"holds \['a'\]"
    else:
        held["a"] = held["a"][:2]
        words = r"sinks\.b has shape"
    if content in ("nan", "a alone", "other shape"):
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, file)
    with pytest.raises(ValueError, match=words):
        PruningPlan.load(tmp_path)
