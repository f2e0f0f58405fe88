"""FFN neurons in another order: those that visual tokens use most come first, so that "the first
I / r" of a plan are the right ones. The model's function stays what it was, up to rounding.

A neuron is a row of gate_proj and of up_proj (and their biases; gate_up_proj is the two in one) and
a column of down_proj. Ranks come from `Statistics`; checkpoints on disk are reordered here too,
tensor by tensor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from yopo.calibration.sample_statistics import Statistics, fingerprint
from yopo.models.attach import ffn_order_of, plan_of
from yopo.models.trial import config_of, stack_of

FILE = "ffn_order.safetensors"  # beside a checkpoint whose neurons were put in another order
_NAME = re.compile(r"layers\.(\d+)\.mlp\.(gate|up|gate_up|down)_proj\.(weight|bias)$")


def ranked(statistics: Statistics) -> Tensor:
    """(L, I) int64: for each layer its neurons, the one most used by visual tokens first; of equal
    ones, the first."""
    return statistics.ffn_use.sort(dim=1, descending=True, stable=True).indices


def reorder(model: nn.Module, statistics: Statistics) -> tuple[Tensor, Statistics]:
    """Puts the FFN neurons of `model` in the order `ranked(statistics)`, in place.

    Returns that order, and the statistics as they are of the model now. Raises ValueError for
    statistics of another model, TypeError where an FFN is not of plain nn.Linear (quantised, LoRA).
    """
    statistics.check(model)
    order = ranked(statistics)
    put(model, order)
    use = statistics.ffn_use.gather(1, order)
    return order, replace(statistics, model=fingerprint(model), ffn_use=use)


def put(model: nn.Module, order: Tensor) -> None:
    """Puts neuron order[l, i] of layer l in place i, in place. Plans with this `ffn_order` can then
    be applied. Raises as `reorder`; ValueError if the neurons are in another order already."""
    stack = stack_of(model)
    here = ffn_order_of(model)
    if here is not None:
        raise ValueError(
            f"the FFN neurons of this model are in the order {here} already: undo "
            "it first (yopo.calibration.neurons.undo), or take the checkpoint as it was trained"
        )
    _permute(stack.layers, order)
    stack.yopo_ffn_order = config_of(model).yopo_ffn_order = checksum(order)


def undo(model: nn.Module, order: Tensor) -> None:
    """Takes back `put(model, order)`, also for a model that was loaded so; `load_order` reads the
    order beside its checkpoint. The plan for that order must be off (yopo.remove)."""
    stack = stack_of(model)
    here = ffn_order_of(model)
    plan = plan_of(model)
    if plan is not None and plan.ffn_order is not None:
        raise ValueError("the model's plan is for this order of FFN neurons: yopo.remove it first")
    if here != checksum(order):
        raise ValueError(f"the FFN neurons of this model are in the order {here}, not this one")
    _permute(stack.layers, order.argsort(dim=1))
    stack.yopo_ffn_order = None
    vars(config_of(model)).pop("yopo_ffn_order", None)


@torch.no_grad()
def _permute(layers: nn.ModuleList, order: Tensor) -> None:
    _check_order(order, len(layers), layers[0].mlp.down_proj.weight.shape[1])
    split = ("gate", "up", "down")
    names = ("gate_up", "down") if hasattr(layers[0].mlp, "gate_up_proj") else split
    for index, layer in enumerate(layers):
        for name in names:
            module = getattr(layer.mlp, f"{name}_proj", None)
            if type(module) is not nn.Linear or module.weight.is_meta:
                raise TypeError(
                    f"{name}_proj of layer {index} is {type(module).__name__}, no plain nn.Linear "
                    "with its weights here: its neurons cannot be put in another order. Do it on "
                    "the model before it is quantised, wrapped by adapters or offloaded"
                )
    for layer, places in zip(layers, order, strict=True):
        for name in names:
            module = getattr(layer.mlp, f"{name}_proj")
            for kind in ("weight", "bias"):
                tensor = getattr(module, kind)
                if tensor is not None:
                    tensor.copy_(_permuted(tensor, name, kind, places.to(tensor.device)))


def permute_tensors(tensors: Mapping[str, Tensor], order: Tensor) -> tuple[dict[str, Tensor], int]:
    """A checkpoint's tensors by name with the neurons in that order, and how many were changed."""
    changed = dict(tensors)
    count = 0
    for name, tensor in tensors.items():
        found = None if "vis" in name else _NAME.search(name)  # a vision tower's are not meant
        neurons = order.shape[1] * (2 if found and found[2] == "gate_up" else 1)
        if found and int(found[1]) < len(order) and neurons in tensor.shape:
            changed[name] = _permuted(tensor, found[2], found[3], order[int(found[1])])
            count += changed[name] is not tensor
    return changed, count


def checksum(order: Tensor) -> str:
    """What a plan records of an order (`ffn_order`)."""
    return "sha256:" + hashlib.sha256(order.to(torch.int64).numpy().tobytes()).hexdigest()


def save_order(path: Path, order: Tensor) -> None:
    save_file({"order": order.to(torch.int32)}, path, metadata={"checksum": checksum(order)})


def load_order(path: str | Path) -> Tensor:
    """(L, I) int64. Raises ValueError unless it holds the order whose checksum it states."""
    with safe_open(path, framework="pt") as file:
        order, stated = file.get_tensor("order").long(), (file.metadata() or {}).get("checksum")
    if stated != checksum(order):
        raise ValueError(f"{path} is corrupt: its order is not the one of its checksum")
    return order


def _permuted(tensor: Tensor, name: str, kind: str, places: Tensor) -> Tensor:
    if name == "down":
        return tensor if kind == "bias" else tensor.index_select(1, places)
    if name == "gate_up":
        places = torch.cat([places, places + len(places)])
    return tensor.index_select(0, places)


def _check_order(order: Tensor, layers: int, neurons: int) -> None:
    if tuple(order.shape) != (layers, neurons):
        raise ValueError(
            f"the order has shape {tuple(order.shape)}, the model (layers, FFN neurons) = "
            f"({layers}, {neurons})"
        )
    if not torch.equal(order.sort(1).values, torch.arange(neurons).expand(layers, -1)):
        raise ValueError("the order does not name each neuron of each layer once")
