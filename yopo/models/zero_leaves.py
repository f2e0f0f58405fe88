"""DeepSpeed's ZeRO-3 gathers weights where modules are called, or, of those that are its leaf
modules, for all that is inside at once. Layers under a plan are made such: within, weights are then
whole and nobody watches, so that they are sliced as without DeepSpeed, and it does not matter which
of a layer's modules a process calls.

Nothing of DeepSpeed is imported: it asks modules for the attribute that its own
set_z3_leaf_modules sets. What a user has set by that stays.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from yopo.models.layers import layer_in

_NAME = "_z3_leaf"


class _AsksForLeaves:
    """Of a decoder, which is no leaf: DeepSpeed asks it before its layers, while it puts its hooks
    on, and then numbers these."""

    def __get__(self, decoder: Any, owner: type) -> bool:
        if decoder is not None and "ds_id" in vars(decoder):
            layers = decoder.layers
            if "ds_id" not in vars(layers):
                _mark(layers)
        return False


def _mark(layers: nn.ModuleList) -> None:
    """Not a trained layer whose input may need no gradient: DeepSpeed takes a leaf's gradients when
    it has that of its input, or, where there will be none, before there are any."""
    any_trained = False
    for layer in map(layer_in, layers):
        trained = any(parameter.requires_grad for parameter in layer.parameters())
        if any_trained or not trained:
            vars(layer).setdefault(_NAME, True)
        any_trained |= trained


class ZeroLeaves:
    """Base of the decoder's mixin."""

    _z3_leaf = _AsksForLeaves()
