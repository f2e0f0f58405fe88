"""Writing a checkpoint with a plan: files taken over, neurons reordered, the source untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import KEEP, SHAPE, build
from safetensors.torch import load_file, save_file

from yopo.calibration import neurons
from yopo.checkpoint import neuron_order
from yopo.checkpoint.pruned_folder import write
from yopo.checkpoint.shards import weight_files
from yopo.errors import BadInput
from yopo.plan.pruning_plan import PruningPlan

ORDER = torch.stack(
    [torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in (0, 1, 2)]
)
PLAN = PruningPlan(KEEP, window=5, layer_cut=2, ffn_ratio=2, ffn_order=neuron_order.checksum(ORDER))
KINDS = ("safetensors", "bin", "shards", "bin shards")


def source(folder: Path, kind: str) -> Path:
    """A checkpoint with its weights in one file or two."""
    folder.mkdir()
    config = {k: v for k, v in SHAPE.config().to_dict().items() if isinstance(v, int | str)}
    (folder / "config.json").write_text(json.dumps(config | {"title": "größer"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "more").mkdir()
    weights = {n: t.clone() for n, t in build(SHAPE).state_dict().items() if "inv_freq" not in n}
    names = sorted(weights)
    parts = [names[::2], names[1::2]] if "shards" in kind else [names]
    stem, end = ("pytorch_model", ".bin") if "bin" in kind else ("model", ".safetensors")
    files = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}-{i:05d}-of-00002{end}" if len(parts) == 2 else f"{stem}{end}"
        tensors = {name: weights[name] for name in part}
        if end == ".bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    if len(parts) == 2:
        index = {"metadata": {}, "weight_map": files}
        (folder / f"{stem}{end}.index.json").write_text(json.dumps(index))
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    found = {}
    for file in weight_files(folder):
        found |= load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_are_reordered_in_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    given, target = source(tmp_path / "dense", kind), tmp_path / "pruned"
    before = bytes_of(given)
    write(given, target, PLAN, ORDER)
    assert bytes_of(given) == before
    model = build(SHAPE)
    neurons.put(model, ORDER)
    made = tensors_of(target)
    expected = {n: t for n, t in model.state_dict().items() if "inv_freq" not in n}
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], value) for name, value in expected.items())
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert PruningPlan.from_config(config) == PLAN and config["title"] == "größer"
    assert torch.equal(neuron_order.load_order(target / neuron_order.FILE), ORDER)
    names = {file.name for file in weight_files(given)}
    assert {"tokenizer.json", *names} <= {file.name for file in target.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_stay_are_files_of_their_own(tmp_path: Path, kind: str) -> None:
    """A model saved into the new folder must not write through a link, onto the source."""
    given, target = source(tmp_path / "dense", kind), tmp_path / "pruned"
    write(given, target, PruningPlan(KEEP), None)
    for file in weight_files(given):
        assert not (target / file.name).samefile(file)
        assert (target / file.name).read_bytes() == file.read_bytes()
    assert not (target / neuron_order.FILE).exists()


def test_ffn_weights_under_other_names_are_refused(tmp_path: Path) -> None:
    given = source(tmp_path / "dense", "safetensors")
    tensors = load_file(given / "model.safetensors")
    tensors["model.layers.0.mlp.w1.weight"] = tensors.pop("model.layers.0.mlp.gate_proj.weight")
    save_file(tensors, given / "model.safetensors")
    with pytest.raises(BadInput, match="8 FFN tensors of 24 neurons.*--first-neurons"):
        write(given, tmp_path / "pruned", PLAN, ORDER)


def test_results_and_weights_of_another_order_are_not_taken_over(tmp_path: Path) -> None:
    given, target = source(tmp_path / "dense", "safetensors"), tmp_path / "pruned"
    torch.save(load_file(given / "model.safetensors"), given / "pytorch_model.bin")
    results = ("headmask_3x4_7.npy", "search.csv", "pareto.png", "statistics.safetensors")
    for name in (*results, "pytorch_model.bin.index.json"):
        (given / name).write_text("{}")
    write(given, target, PLAN, ORDER)
    names = {file.name for file in target.iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors", neuron_order.FILE}
