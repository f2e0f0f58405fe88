"""fuse and unfuse: a loaded model's passes by fused weights, and by live ones again. What that is:
fused_weights.py."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from yopo.models.fused_weights import REMEDY, lay, shares_weights, unfuse_decoder, why_live
from yopo.models.parts import Parts

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model) -> Model:
    """Has passes over `model`, which has a plan, read queries', keys' and values' weights as one
    matrix, gate's and up's as another; returns it. For inference: with gradients, under autocast,
    and where somebody watches a projection later on, a pass reads them one by one, as before.

    Takes the memory of a layer's gate and up more while it works, and none afterwards. Parameters
    keep their names, values and bits.

    Raises ValueError, and leaves the model as it was, where it has no plan, is in training mode, or
    a layer's weights cannot be laid together: adapters, quantised or sharded weights, hooks on a
    projection, a layer of somebody's own.
    """
    decoder = Parts.of(model).decoder
    if getattr(decoder, "yopo_plan", None) is None:
        raise ValueError("the model has no plan, and only pruned passes go by fused weights: apply")
    if decoder.training:
        raise ValueError("the model is in training mode; fused weights are for inference: eval()")
    for number, layer in enumerate(decoder.layers):
        if why := why_live(decoder, layer):
            raise ValueError(f"layer {number} cannot be fused: {why}. {REMEDY}")
    if shares_weights(decoder):
        raise ValueError(f"two layers have a weight in common, which cannot be fused. {REMEDY}")
    for layer in decoder.layers:
        lay(layer)
    decoder.yopo_fused = True
    return model


def unfuse(model: Model) -> Model:
    """Gives every weight of `model` memory of its own again, and returns it. Passes go by live
    weights. Does nothing where none is fused."""
    unfuse_decoder(Parts.of(model).decoder)
    return model
