"""What a conversion keeps: the plan, the order of FFN neurons, every tensor to the bit, whatever
files they came in; and the report says so with checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import random_internvl
import random_llava
import torch
import transformers
from conversions import TINY, convert, loaded, refused, resharded, sums, tensors
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from yopo.checkpoint import neuron_order
from yopo.models.attach import ffn_order_of
from yopo.plan import head_mask
from yopo.plan.pruning_plan import PruningPlan

if Version(transformers.__version__) < Version("4.45"):
    pytest.skip("converted checkpoints are for transformers 4.45 on", allow_module_level=True)


def test_a_yopo_block_is_kept(tmp_path: Path) -> None:
    source = TINY / "tiny-llava-v1-pruned"
    folder = convert(source, tmp_path / "new")
    before = PruningPlan.load(source)
    content = json.loads((folder / "config.json").read_text())
    assert PruningPlan.from_config(content) == before
    config = transformers.AutoConfig.from_pretrained(folder)
    assert PruningPlan.from_config(config) == before


def test_released_fields_become_a_block_with_the_mask_in_it(tmp_path: Path) -> None:
    released = {
        "attncut_w": 5, "layercut_num": 2, "headcut_num": 1, "mlpcut_ratio": 2, "sprompt_len": 35
    }  # fmt: skip
    source = random_llava.make(tmp_path, **released)
    keep = random_llava.a_plan().head_keep
    head_mask.save(source / "headmask_tiny_1.npy", keep)
    folder = convert(source, tmp_path / "new")
    plan = PruningPlan.load(folder)
    assert plan == PruningPlan(keep, window=5, layer_cut=2, ffn_ratio=2)
    assert (plan.head_mass, plan.cut_mass) == ("exact", "exact")


def test_the_environment_does_not_get_into_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("YOPO_MASS", "drop")
    refused(TINY / "tiny-llava-v1-pruned", tmp_path / "new", "YOPO_MASS is set", capsys)


@pytest.mark.parametrize("planned", [True, False])
def test_the_order_of_ffn_neurons_is_kept(tmp_path: Path, source: Path, planned: bool) -> None:
    """A calibrated checkpoint stays one whose neurons can be put back (neurons.undo)."""
    config = json.loads((source / "config.json").read_text())
    layers, size = config["num_hidden_layers"], config["intermediate_size"]
    order = torch.stack([torch.arange(size).flip(0)] * layers)
    neuron_order.save_order(source / neuron_order.FILE, order)
    if planned:
        keep = torch.ones(layers, config["num_attention_heads"])
        PruningPlan(keep, ffn_ratio=2, ffn_order=neuron_order.checksum(order)).save_to(config)
    else:
        config["yopo_ffn_order"] = neuron_order.checksum(order)
    (source / "config.json").write_text(json.dumps(config))
    made = convert(source, tmp_path / "new")
    assert torch.equal(neuron_order.load_order(made / neuron_order.FILE), order)
    assert ffn_order_of(loaded(made)) == neuron_order.checksum(order)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("count", [1, 3])
def test_all_kinds_of_shards_give_the_same_tensors(
    tmp_path: Path, source: Path, kind: str, count: int
) -> None:
    expected = tensors(convert(source, tmp_path / "expected"))
    got = tensors(convert(resharded(source, count, kind), tmp_path / "got"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    loaded(tmp_path / "got")


def test_bin_files_of_before_torch_1_6_are_read(tmp_path: Path, source: Path) -> None:
    expected = tensors(convert(source, tmp_path / "expected"))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    got = tensors(convert(source, tmp_path / "got"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_tensors_keep_their_dtype_and_bits(tmp_path: Path, source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights = {name: value.bfloat16() for name, value in weights.items()}
    random_internvl.save(source, weights, 2, "safetensors")
    new = tensors(convert(source, tmp_path / "new"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(new[f"language_model.{name}"], weights[name])
    assert new[f"language_model.{name}"].dtype == torch.bfloat16


def test_the_report_tells_the_checksum_of_every_file_and_tensor(
    tmp_path: Path, source: Path
) -> None:
    folder = convert(resharded(source, 2, "bin"), tmp_path / "new", "--shard-gb", "0.00001")
    report = json.loads((folder / "conversion.json").read_text())
    files = sums(folder)
    del files["conversion.json"]
    assert {name: entry["sha256"] for name, entry in report["files"].items()} == files
    assert len(report["sources"]) == 3  # two of the language model, one of the vision tower
    for file, entry in report["sources"].items():
        assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == entry["sha256"]
        assert Path(file).stat().st_size == entry["bytes"]
    new = tensors(folder)
    assert report["tensors"].keys() == new.keys()
    for name, entry in report["tensors"].items():
        assert entry["shape"] == list(new[name].shape)
        assert entry["sha256"] == hashlib.sha256(new[name].numpy().tobytes()).hexdigest()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    loaded(folder)


def test_a_vision_tower_elsewhere_can_be_given(tmp_path: Path, source: Path) -> None:
    (tmp_path / "clip").rename(tmp_path / "moved")
    folder = convert(source, tmp_path / "new", "--vision-tower", str(tmp_path / "moved"))
    loaded(folder)


def test_a_tower_trained_along_comes_from_the_checkpoint(tmp_path: Path, source: Path) -> None:
    """unfreeze_mm_vision_tower: LLaVA lets the checkpoint's weights overwrite the named tower's."""
    tower = load_file(tmp_path / "clip" / "model.safetensors")
    own = {f"model.vision_tower.vision_tower.{n}": w + 1 for n, w in tower.items()}
    weights = load_file(source / "model.safetensors")
    save_file({**weights, **own}, source / "model.safetensors")
    frozen = tensors(convert(source, tmp_path / "frozen"))
    file = source / "config.json"
    content = {**json.loads(file.read_text()), "unfreeze_mm_vision_tower": True}
    file.write_text(json.dumps(content))
    trained = tensors(convert(source, tmp_path / "trained"))
    for name, value in tower.items():
        assert torch.equal(frozen[f"vision_tower.{name}"], value)
        assert torch.equal(trained[f"vision_tower.{name}"], value + 1)
