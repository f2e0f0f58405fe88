"""Statistics as numbers and as a file: what is made of them by hand, and whose they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import SHAPE, Shape, build
from made_up_statistics import made_up
from safetensors.torch import load_file, save_file

from yopo.calibration.sample_statistics import Statistics, digest_of, fingerprint


def same(one: Statistics, other: Statistics) -> bool:
    tensors = [k for k, v in vars(one).items() if isinstance(v, torch.Tensor)]
    equal = [torch.equal(getattr(one, name), getattr(other, name)) for name in tensors]
    return (one.model, one.samples) == (other.model, other.samples) and all(equal)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "statistics.safetensors"
    one = made_up()
    assert same(Statistics.load(one.save(path)), one)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_constant_sinks_are_weighted_means_over_the_samples() -> None:
    # Two samples: sums of w·x and of w. Head 0: (3·1 - 1·2) / 4.
    sums = torch.tensor([[[[3.0, 0]], [[3, 0.5]]], [[[-2, 1]], [[1, 0.5]]]])
    sinks = replace(made_up(2, 1, 2), sink_sums=sums).sinks()
    torch.testing.assert_close(sinks.a, torch.tensor([[0.25, 1.0]]))
    assert sinks.b is None and sinks.tokens == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "format"])
def test_a_file_that_is_no_statistics_is_refused(tmp_path: Path, damage: str) -> None:
    path = made_up().save(tmp_path / "statistics.safetensors")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    else:
        save_file(load_file(path), path, metadata={"format": "0", "model": "", "samples": "[]"})
    with pytest.raises(ValueError, match=r"statistics\.safetensors (is cut off|holds no stat)"):
        Statistics.load(path)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Statistics.load("nowhere.safetensors")


def test_a_model_is_known_again_in_a_wider_type_but_not_with_other_weights() -> None:
    model = build(SHAPE).half()
    narrow = fingerprint(model)
    assert fingerprint(model.float()) == narrow and narrow.startswith("3x4x2x24-")
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[0, 0] += 1
    assert fingerprint(model) != narrow
    assert fingerprint(build(Shape(layers=2))) != narrow


def test_statistics_are_checked_against_a_model() -> None:
    made_up().check(build(SHAPE))
    with pytest.raises(ValueError, match="of another model"):
        made_up().check(build(SHAPE).half())
    with pytest.raises(ValueError, match="no sample"):
        made_up(0).check(build(SHAPE))


def test_samples_are_told_apart_by_every_value() -> None:
    one = {"input_ids": torch.tensor([[1, 2]]), "grids": [[(2, 3)]]}
    marks = {
        digest_of(one),
        digest_of({**one, "input_ids": torch.tensor([[1, 3]])}),
        digest_of({**one, "input_ids": torch.tensor([[1], [2]])}),
        digest_of({**one, "input_ids": torch.tensor([[1, 2]], dtype=torch.int32)}),
        digest_of({**one, "grids": [[(3, 2)]]}),
        digest_of({**one, "images": [torch.zeros(1)]}),
    }
    assert len(marks) == 6
    assert digest_of({"grids": [[(2, 3)]], "input_ids": torch.tensor([[1, 2]])}) in marks


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "model.norm"])
def test_other_weights_around_the_layers_are_another_model(name: str) -> None:
    model = build(SHAPE)
    mark = fingerprint(model)
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(1.5)
    assert fingerprint(model) != mark


def test_adapters_are_another_model_once_they_change_it() -> None:
    peft = pytest.importorskip("peft")
    model = build(SHAPE)
    mark = fingerprint(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    assert fingerprint(adapted) == mark  # a new LoRA is zero
    with torch.no_grad():
        adapted.get_submodule(
            "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default"
        ).weight.fill_(0.1)
    assert fingerprint(adapted) != mark


@pytest.mark.parametrize("name", ["k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
def test_another_matrix_is_another_model(name: str) -> None:
    model = build(Shape())
    mark = fingerprint(model)
    layer = model.model.layers[1]
    weight = getattr(layer.self_attn if name[0] in "kvo" else layer.mlp, name).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    assert fingerprint(model) != mark
    with torch.no_grad():
        weight.copy_(kept)
    assert fingerprint(model) == mark
