"""The decoder layer, its attention and its FFN while a plan is put on a model: mixins before the
stock classes. With a LayerCall they compute a pruned pass over packed rows (N, d), text first; with
anything else they are stock's.

What a module returns has stock's form, so hooks find what they expect; only the rows are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from yopo.engine.layer import LayerCall, attend_layer
from yopo.engine.weights import gated_ffn
from yopo.models.exchange import Exchanged, derive, original_of, put, stock_of
from yopo.models.replaced import refuse_replaced, set_aside, settle, take_back
from yopo.versions import attention_output, layer_returns_tuple


class PrunedLayer(Exchanged):
    """A pre-norm decoder layer: rows + attention, rows + FFN."""

    yopo_returns_tuple = layer_returns_tuple()  # set on the class by probe.py, which sees stock's

    def forward(self, *args: Any, pruned: LayerCall | None = None, **kwargs: Any) -> Any:
        if pruned is None:
            return set_aside(self, super().forward)(*args, **kwargs)
        for part in (self.self_attn, self.mlp):
            if "forward" in vars(part):
                settle(part)
        (rows,) = args
        n_text = len(pruned.shared.index.text)
        attended = self.self_attn(hidden_states=self.input_layernorm(rows), pruned=pruned)[0]
        rows = _add(rows if pruned.changes_visual else rows[:n_text], attended)
        normed = self.post_attention_layernorm(rows[:n_text] if pruned.plan.neurons == 0 else rows)
        fed = self.mlp(normed, pruned=pruned) if pruned.slices_ffn else self.mlp(normed)
        rows = _add(rows, fed)
        return (rows,) if self.yopo_returns_tuple else rows


def _add(rows: Tensor, given: Tensor) -> Tensor:
    """rows (N, d) with what attention or FFN gave them; or gave text rows alone, the first."""
    if len(given) == len(rows):
        return rows + given
    return torch.cat([rows[: len(given)] + given, rows[len(given) :]])


class PrunedAttention(Exchanged):
    """Self-attention with q, k, v and o projections and rotary angles."""

    def forward(self, *args: Any, pruned: LayerCall | None = None, **kwargs: Any) -> Any:
        if pruned is None:
            return set_aside(self, super().forward)(*args, **kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        return attention_output(attend_layer(self, x, pruned))


class PrunedFFN(Exchanged):
    """A gated FFN of which visual rows use the first neurons."""

    def forward(self, *args: Any, pruned: LayerCall | None = None, **kwargs: Any) -> Any:
        if pruned is None:
            return set_aside(self, super().forward)(*args, **kwargs)
        shared = pruned.shared
        n_text = len(shared.index.text)
        return gated_ffn(self, args[0], n_text, pruned.plan.neurons, shared.ffn_size)


def call_layer(layer: nn.Module, rows: Tensor, pruned: LayerCall) -> Tensor:
    """The layer, or what somebody wrapped it in, called with packed rows (N, d)."""
    out = layer(rows, pruned=pruned)
    return out[0] if isinstance(out, tuple) else out


def layer_in(wrapped: nn.Module) -> nn.Module:
    """The decoder layer in an entry of `decoder.layers`: itself, or what wrappers (of activation
    checkpointing, FSDP, torch.compile) have inside.

    Raises TypeError if there is none."""
    for module in wrapped.modules():
        if {"self_attn", "mlp"} <= set(module._modules):
            return module
    raise TypeError(
        f"a layer of the model is a {type(wrapped).__name__} without self_attn and mlp, which a "
        "pruned pass does not compute"
    )


def stock_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the class that the module had before a plan."""
    return original_of(type(module)).forward


def parts_in(wrapped: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    """The layer, its attention and its FFN, each with the mixin that it gets."""
    layer = layer_in(wrapped)
    yield layer, PrunedLayer
    yield layer.self_attn, PrunedAttention
    yield layer.mlp, PrunedFFN


def exchange_layers(layers: nn.ModuleList) -> None:
    """Gives every layer the classes that compute a pruned pass.

    Raises ValueError where somebody replaced a forward on the module itself, which would go on
    running in place of ours."""
    for wrapped in layers:
        for module, mixin in parts_in(wrapped):
            refuse_replaced(module)
            put(module, derive(mixin, type(module)))


def restore_layers(layers: nn.ModuleList) -> None:
    """Gives every layer its stock classes back.

    Raises ValueError for a layer whose class somebody derived of ours meanwhile (FSDP2 does)."""
    for wrapped in layers:
        for module, mixin in parts_in(wrapped):
            stock = stock_of(type(module))
            if issubclass(stock, mixin):
                raise ValueError(
                    f"the class of a {stock.__name__} was derived from the pruned one meanwhile "
                    "(as FSDP2's fully_shard does), and cannot be taken back: remove the plan "
                    "before that"
                )
            put(module, stock)
            take_back(module)
