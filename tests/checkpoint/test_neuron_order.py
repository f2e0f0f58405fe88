"""The order of FFN neurons on files: tensors put in it, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import Shape, build
from safetensors.torch import save_file
from torch import Tensor, nn

from yopo.calibration import neurons
from yopo.checkpoint import neuron_order

BIASED = Shape(layers=2, attention_bias=True)


def some_order(layers: int = 3, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(24, generator=generator) for _ in range(layers)])


def test_a_checkpoint_s_tensors_are_put_in_order_as_a_model_s_are() -> None:
    order, model = some_order(2), build(BIASED)
    with torch.no_grad():
        for layer in model.model.layers:  # as with mlp_bias
            for name in ("gate_proj", "up_proj", "down_proj"):
                module = getattr(layer.mlp, name)
                module.bias = nn.Parameter(torch.randn(module.out_features))
    vision = {"vision_tower.layers.0.mlp.gate_proj.weight": torch.randn(24, 3)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors, changed = neuron_order.permute_tensors(before | vision, order)
    neurons.put(model, order)
    assert changed == 2 * 5
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(tensors[name], value) for name, value in vision.items())


def test_an_order_in_a_file_is_checked(tmp_path: Path) -> None:
    path, order = tmp_path / neuron_order.FILE, some_order()
    neuron_order.save_order(path, order)
    assert torch.equal(neuron_order.load_order(path), order)
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="corrupt"):
        neuron_order.load_order(path)


def test_an_order_that_is_cut_off_or_is_none_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / neuron_order.FILE
    neuron_order.save_order(path, some_order())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"ffn_order\.safetensors is cut off"):
        neuron_order.load_order(path)
    save_file({"other": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"ffn_order\.safetensors .*holds no order"):
        neuron_order.load_order(path)
    with pytest.raises(FileNotFoundError):
        neuron_order.load_order(tmp_path / "nowhere")
