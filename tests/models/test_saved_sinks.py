"""Sinks as files: they go with every checkpoint that names them, and damage to them is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import a_plan, mixed
from layouts import KEEP, SHAPE, build, left_padded
from random_families import HERE, KINDS, make
from random_families import build as build_family
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PretrainedConfig

import yopo
from yopo.plan import sinks as plan_sinks
from yopo.plan.config_fields import head_dim
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import FILE, Sinks, unread

COMMAND = "python -m yopo sinks CHECKPOINT --data FILE"


def some_sinks(seed: int = 0, dim: int = 8) -> Sinks:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((3, 4), (3, 4, dim)))
    return Sinks(a + 3, b, 12)


def sink_plan(seed: int = 0, **changes: Any) -> PruningPlan:
    values = dict(window=3, layer_cut=2, ffn_ratio=2, head_mass="sink", cut_mass="sink")
    return PruningPlan(KEEP, **(values | {"sinks": some_sinks(seed)} | changes))


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    """Transformers is patched."""
    import yopo.patch

    with yopo.patch.patched():
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    yopo.apply(build(SHAPE), sink_plan()).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_saved_model_comes_back_with_its_sinks(tmp_path: Path, shard: str) -> None:
    model = yopo.apply(build(SHAPE), sink_plan())
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("model-*"))) > 1 or shard == "5GB"
    block = json.loads((tmp_path / "config.json").read_text())["yopo"]
    assert block["sinks"]["file"] == FILE and set(load_file(tmp_path / FILE)) == {"a", "b"}
    assert (tmp_path / FILE).stat().st_mode & 0o077 == (
        (tmp_path / "config.json").stat().st_mode & 0o077
    )
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert yopo.plan_of(again) == sink_plan()
    given = left_padded().kwargs()
    with torch.no_grad():
        fused, live = again(**given).logits, model(**given).logits
        assert torch.allclose(fused, live, atol=1e-5)
    # And on: what was loaded saves them, too, whatever became of the folder.
    (tmp_path / FILE).unlink()
    again.save_pretrained(tmp_path / "second")
    assert PruningPlan.load(tmp_path / "second") == sink_plan()


@pytest.mark.parametrize("name", HERE)
def test_models_of_families_save_their_sinks(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    model = build_family(kind)
    sinks = some_sinks(1, head_dim(model.config))
    plan = a_plan(head_mass="sink", cut_mass="sink", sinks=sinks)
    yopo.apply(model, plan).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert yopo.plan_of(again) == plan
    given = make(kind, mixed(kind)).inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(again(**given).logits, model(**given).logits)


def test_a_file_of_another_name_keeps_it(saved: Path, tmp_path: Path) -> None:
    (saved / FILE).rename(saved / "mine.safetensors")
    config = json.loads((saved / "config.json").read_text())
    config["yopo"]["sinks"]["file"] = "mine.safetensors"
    (saved / "config.json").write_text(json.dumps(config))
    LlamaForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "second")
    assert PruningPlan.load(tmp_path / "second") == sink_plan()


def test_they_are_found_in_a_subfolder(saved: Path, tmp_path: Path) -> None:
    again = LlamaForCausalLM.from_pretrained(saved.parent, subfolder=saved.name)
    assert yopo.plan_of(again) == sink_plan()
    again.save_pretrained(tmp_path / "second")
    assert PruningPlan.load(tmp_path / "second") == sink_plan()


def test_in_a_repository_they_are_looked_for_as_the_rest_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def download(*arguments: Any, **named: Any) -> str:
        asked.update(named, given=arguments)
        raise OSError("offline")

    monkeypatch.setattr(plan_sinks, "hf_hub_download", download)
    config = yopo.apply(build(SHAPE), sink_plan()).config.to_dict() | {"_name_or_path": "some/one"}
    block = json.loads(json.dumps(config["yopo"]))  # as it is read from a file
    place = {"subfolder": "sub", "cache_dir": "there", "dtype": "auto"}
    with plan_sinks.looked_for(place), pytest.raises(FileNotFoundError, match="offline"):
        PruningPlan.from_config(config | {"yopo": block})
    given = ("some/one", FILE)
    assert asked == {"given": given, "revision": None, "subfolder": "sub", "cache_dir": "there"}


def test_a_config_alone_takes_them_along(tmp_path: Path) -> None:
    yopo.apply(build(SHAPE), sink_plan()).config.save_pretrained(tmp_path)
    assert PruningPlan.load(tmp_path) == sink_plan()


def test_they_are_there_as_soon_as_the_config_is(tmp_path: Path) -> None:
    """What pushes a config to the Hub looks for new files before save_pretrained is done."""
    yopo.apply(build(SHAPE), sink_plan()).config.to_json_file(tmp_path / "config.json")
    assert PruningPlan.load(tmp_path) == sink_plan()


def test_nothing_is_written_for_a_plan_without(tmp_path: Path) -> None:
    for number, model in enumerate((build(SHAPE), yopo.apply(build(SHAPE), PruningPlan(KEEP)))):
        model.save_pretrained(tmp_path / str(number))
        assert not (tmp_path / str(number) / FILE).exists()


def test_transformers_has_its_own_method_back() -> None:
    import yopo.patch

    yopo.patch.undo()
    stock = vars(PretrainedConfig)["to_json_file"]
    yopo.patch.enable()
    wrapped = vars(PretrainedConfig)["to_json_file"]
    assert stock.__module__.startswith("transformers") and wrapped is not stock
    yopo.patch.undo()
    assert vars(PretrainedConfig)["to_json_file"] is stock
    yopo.patch.enable()


def test_a_plan_file_has_its_sinks_beside_it(tmp_path: Path) -> None:
    sink_plan().save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == sink_plan()


def test_constants_need_no_file(tmp_path: Path) -> None:
    plan = sink_plan(sinks=Sinks(some_sinks().a, None, 12))
    yopo.apply(build(SHAPE), plan).save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists() and PruningPlan.load(tmp_path) == plan


# ------------------------------------------------------------------------------------------ damage


def lost(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def other(file: Path) -> None:
    some_sinks(7).save(file.parent)


def not_a_number(file: Path) -> None:
    tensors = load_file(file)
    tensors["b"][1, 2, 3] = float("nan")
    save_file(tensors, file)


def of_another_shape(file: Path) -> None:
    tensors = load_file(file)
    save_file({"a": tensors["a"][:2].clone(), "b": tensors["b"][:2].clone()}, file)


def one_missing(file: Path) -> None:
    save_file({"a": load_file(file)["a"]}, file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lost, "which is not there"),
        (cut, "no safetensors file"),
        (other, "its checksum is"),
        (not_a_number, r"sinks\.b\[1, 2, 3\] is nan"),
        (of_another_shape, "its checksum is"),
        (one_missing, "the sinks of a plan are a and b"),
    ],
)
def test_damaged_sinks_are_refused_and_the_remedy_named(
    saved: Path, damage: Any, words: str
) -> None:
    damage(saved / FILE)
    for load in (LlamaForCausalLM.from_pretrained, PruningPlan.load):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            load(saved)
        assert COMMAND in str(caught.value) and FILE in str(caught.value)
    with unread():  # what fits others must be able to load it
        assert yopo.plan_of(LlamaForCausalLM.from_pretrained(saved)) is not None


@pytest.mark.parametrize("sinks", [some_sinks(0, 4), Sinks(torch.zeros(2, 4))])
def test_sinks_of_another_model_are_refused(sinks: Sinks) -> None:
    with pytest.raises(ValueError, match="of another model") as caught:
        yopo.apply(build(SHAPE), sink_plan(sinks=sinks))
    assert COMMAND in str(caught.value)


def test_sink_asked_for_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has no sinks") as caught:
        PruningPlan(KEEP).with_mass("drop/sink")
    assert COMMAND in str(caught.value)
    config = yopo.apply(build(SHAPE), PruningPlan(KEEP)).config
    monkeypatch.setenv("YOPO_MASS", "sink")
    with pytest.raises(ValueError, match="YOPO_MASS is 'sink'") as caught:
        LlamaForCausalLM(config)
    assert COMMAND in str(caught.value)


def test_a_cache_filled_under_other_sinks_is_refused() -> None:
    model, case = yopo.apply(build(SHAPE), sink_plan()), left_padded()
    with torch.no_grad():
        cache = model(**case.kwargs(), use_cache=True).past_key_values
        more = torch.ones(len(case.visual), 1, dtype=torch.long)
        yopo.apply(model, sink_plan(1))
        with pytest.raises(ValueError, match="was filled under another plan"):
            model(input_ids=more, past_key_values=cache, use_cache=True)
