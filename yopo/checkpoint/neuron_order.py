"""The order of FFN neurons as numbers and on files: its checksum, its file beside a checkpoint, and
tensors put in it. Which order is best, and a live model put in it, is calibration's (neurons.py).

A neuron is a row of gate_proj and of up_proj (and their biases; gate_up_proj is the two in one) and
a column of down_proj. order[l, i] is the neuron of layer l that comes to place i.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from yopo.files import write_whole

FILE = "ffn_order.safetensors"  # beside a checkpoint whose neurons were put in another order
_NAME = re.compile(r"layers\.(\d+)\.mlp\.(gate|up|gate_up|down)_proj\.(weight|bias)$")


def checksum(order: Tensor) -> str:
    """What a plan records of an order (`ffn_order`)."""
    return "sha256:" + hashlib.sha256(order.to(torch.int64).numpy().tobytes()).hexdigest()


def save_order(path: Path, order: Tensor) -> None:
    tensors, metadata = {"order": order.to(torch.int32)}, {"checksum": checksum(order)}
    with write_whole(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def load_order(path: str | Path) -> Tensor:
    """(L, I) int64. Raises ValueError unless it holds the order whose checksum it states,
    FileNotFoundError where there is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            order, stated = file.get_tensor("order").long(), (file.metadata() or {}).get("checksum")
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off, or holds no order of FFN neurons: {error}") from error
    if stated != checksum(order):
        raise ValueError(f"{path} is corrupt: its order is not the one of its checksum")
    return order


def permute_tensors(tensors: Mapping[str, Tensor], order: Tensor) -> tuple[dict[str, Tensor], int]:
    """A checkpoint's tensors by name with the neurons in that order, and how many were changed."""
    changed = dict(tensors)
    count = 0
    for name, tensor in tensors.items():
        found = None if "vis" in name else _NAME.search(name)  # a vision tower's are not meant
        neurons = order.shape[1] * (2 if found and found[2] == "gate_up" else 1)
        if found and int(found[1]) < len(order) and neurons in tensor.shape:
            changed[name] = permuted(tensor, found[2], found[3], order[int(found[1])])
            count += changed[name] is not tensor
    return changed, count


def permuted(tensor: Tensor, name: str, kind: str, places: Tensor) -> Tensor:
    """The `kind` ("weight" or "bias") of `name`_proj with neuron places[i] in place i."""
    if name == "down":
        return tensor if kind == "bias" else tensor.index_select(1, places)
    if name == "gate_up":
        places = torch.cat([places, places + len(places)])
    return tensor.index_select(0, places)


def check_order(order: Tensor, layers: int, neurons: int) -> None:
    """Raises ValueError unless `order` names each of so many neurons once, for each layer."""
    if tuple(order.shape) != (layers, neurons):
        raise ValueError(
            f"the order has shape {tuple(order.shape)}, the model (layers, FFN neurons) = "
            f"({layers}, {neurons})"
        )
    if not torch.equal(order.sort(1).values, torch.arange(neurons).expand(layers, -1)):
        raise ValueError("the order does not name each neuron of each layer once")
