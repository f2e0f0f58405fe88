"""FFN neurons in the order of their use: those that visual tokens use most come first, so that "the
first I / r" of a plan are the right ones. The model's function stays what it was, up to rounding.

Ranks come from `Statistics`; a live model is put in an order and back. What an order is, and
checkpoints on disk, are checkpoint's (neuron_order.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from yopo.calibration.sample_statistics import Statistics, fingerprint
from yopo.checkpoint.neuron_order import check_order, checksum, permuted
from yopo.models.attach import ffn_order_of
from yopo.models.parts import plan_of
from yopo.models.trial import config_of, decoder_of


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
    decoder = decoder_of(model)
    here = ffn_order_of(model)
    if here is not None:
        raise ValueError(
            f"the FFN neurons of this model are in the order {here} already: undo "
            "it first (yopo.calibration.neurons.undo), or take the checkpoint as it was trained"
        )
    _permute(decoder.layers, order)
    decoder.yopo_ffn_order = config_of(model).yopo_ffn_order = checksum(order)


def undo(model: nn.Module, order: Tensor) -> None:
    """Takes back `put(model, order)`, also for a model that was loaded so; `load_order` reads the
    order beside its checkpoint. The plan for that order must be off (yopo.remove)."""
    decoder = decoder_of(model)
    here = ffn_order_of(model)
    plan = plan_of(model)
    if plan is not None and plan.ffn_order is not None:
        raise ValueError("the model's plan is for this order of FFN neurons: yopo.remove it first")
    if here != checksum(order):
        raise ValueError(f"the FFN neurons of this model are in the order {here}, not this one")
    _permute(decoder.layers, order.argsort(dim=1))
    decoder.yopo_ffn_order = None
    vars(config_of(model)).pop("yopo_ffn_order", None)


@torch.no_grad()
def _permute(layers: nn.ModuleList, order: Tensor) -> None:
    check_order(order, len(layers), layers[0].mlp.down_proj.weight.shape[1])
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
                    tensor.copy_(permuted(tensor, name, kind, places.to(tensor.device)))
