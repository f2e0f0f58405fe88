"""The decoder layer, its attention and its FFN while a plan is put on a model: mixins before the
stock classes. With a LayerCall they compute a pruned pass over packed rows (N, d), text first; with
anything else they are stock's.

What a module returns has stock's form, so hooks find what they expect; only the rows are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yopo.engine.fused import run_fused
from yopo.engine.layer import LayerCall, attend
from yopo.engine.weights import gated_ffn, project_from_heads, project_qkv
from yopo.models.exchange import Exchanged, derive, original_of, put, stock_of
from yopo.models.replaced import own_forward, refuse_replaced, settle, take_back
from yopo.versions import attention_output, layer_returns_tuple

# What a layer's parts may have otherwise than built: a pass asks the live one, or needs it not.
# (max_position_embeddings: 4.36 keeps it in attention, where nothing goes by it.)
OF_NO_ACCOUNT = {
    "forward",
    "training",
    "layer_idx",
    "gradient_checkpointing",
    "max_position_embeddings",
}


class _Part(Exchanged):
    """A module that a pass computes by itself, and that may compute otherwise once something is set
    on it: `settings` counts that, of all parts of all models, and probe.py looks again. Integers
    are sizes, which cannot change, or count something; tensors are kept, not settings."""

    settings = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name[0] != "_" and name not in OF_NO_ACCOUNT and type(value) not in (int, Tensor):
            _Part.settings += getattr(self, name, None) is not value
        super().__setattr__(name, value)


def settings() -> int:
    """How often something was set on a part."""
    return _Part.settings


class PrunedLayer(_Part):
    """A pre-norm decoder layer: rows + attention, rows + FFN."""

    yopo_returns_tuple = layer_returns_tuple()  # set on the class by probe.py, which sees stock's

    def forward(self, *args: Any, pruned: LayerCall | None = None, **kwargs: Any) -> Any:
        if pruned is None:
            return own_forward(self, PrunedLayer)(*args, **kwargs)
        rows = _rows(args, kwargs)
        if pruned.fused is not None:
            rows = run_fused(pruned.fused, rows, pruned)
            pruned.reached.by = PrunedLayer
            return (rows,) if self.yopo_returns_tuple else rows
        n_text = pruned.shared.n_text
        attended = self.self_attn(hidden_states=self.input_layernorm(rows), pruned=pruned)[0]
        if pruned.reached.by is not PrunedAttention:
            raise _not_reached(self.self_attn)
        rows = _add(rows if pruned.changes_visual else rows[:n_text], attended)
        normed = self.post_attention_layernorm(rows[:n_text] if pruned.plan.neurons == 0 else rows)
        if pruned.slices_ffn:
            rows = _add(rows, self.mlp(normed, pruned=pruned))
            if pruned.reached.by is not PrunedFFN:
                raise _not_reached(self.mlp)
        else:
            rows = _add(rows, self.mlp(normed))
        pruned.reached.by = PrunedLayer
        return (rows,) if self.yopo_returns_tuple else rows


def _add(rows: Tensor, given: Tensor) -> Tensor:
    """rows (N, d) with what attention or FFN gave them; or gave text rows alone, the first."""
    if len(given) == len(rows):
        return rows + given
    return torch.cat([rows[: len(given)] + given, rows[len(given) :]])


class PrunedAttention(_Part):
    """Self-attention with q, k, v and o projections and rotary angles."""

    def forward(self, *args: Any, pruned: LayerCall | None = None, **kwargs: Any) -> Any:
        if pruned is None:
            return own_forward(self, PrunedAttention)(*args, **kwargs)
        rows, plan, shared = _rows(args, kwargs), pruned.plan, pruned.shared
        n_text = shared.n_text
        text, visual = project_qkv(self, rows, n_text, plan, shared.head_dim)
        text, visual = attend(text, visual, pruned, in_place=False)
        pruned.reached.by = PrunedAttention
        out = project_from_heads(self.o_proj, text, visual, plan.visual_heads)
        return attention_output(out)


class PrunedFFN(_Part):
    """A gated FFN of which visual rows use the first neurons."""

    def forward(self, *args: Any, pruned: LayerCall | None = None, **kwargs: Any) -> Any:
        if pruned is None:
            return own_forward(self, PrunedFFN)(*args, **kwargs)
        shared = pruned.shared
        n_text = shared.n_text
        own = pruned.plan.own_neurons
        out = gated_ffn(self, _rows(args, kwargs), n_text, own, shared.ffn_size)
        pruned.reached.by = PrunedFFN
        return out


def _rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))  # each stock class has its name for it


def call_layer(layer: nn.Module, rows: Tensor, pruned: LayerCall) -> Tensor:
    """The layer, or what somebody wrapped it in, called with packed rows (N, d).

    Raises ValueError where that does not come to the pruned forward."""
    if pruned.fused is not None and is_called_by_us_alone(vars(layer)):
        return run_fused(pruned.fused, rows, pruned)
    out = layer(rows, pruned=pruned)
    if pruned.reached.by is not PrunedLayer:
        raise _not_reached(layer)
    return out[0] if isinstance(out, tuple) else out


def is_called_by_us_alone(layer: Mapping[str, Any]) -> bool:
    """Whether nothing but its forward happens when a module of these attributes is called."""
    if layer["_forward_hooks"] or layer["_forward_pre_hooks"] or "forward" in layer:
        return False
    return not layer["_backward_hooks"] and layer.get("_compiled_call_impl") is None


def _not_reached(module: nn.Module) -> ValueError:
    return ValueError(
        f"a {type(module).__name__} was called for a pruned pass, but its pruned forward did not "
        "run: what stands in its place (a forward of somebody's, a wrapper) drops the argument "
        "`pruned`. Take **kwargs there and hand them on, or remove the plan (yopo.remove)"
    )


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
    """The layer, its attention and its FFN, each with the mixin that it gets; of one in a wrapper
    with several copies (peft's modules_to_save) each copy.

    Raises TypeError where one of them is not there."""
    layer = layer_in(wrapped)
    yield layer, PrunedLayer
    for name, mixin, last in _PARTS:
        part = layer.get_submodule(name)
        found = [module for module in part.modules() if last in module._modules]
        if not found:
            raise TypeError(
                f"the {name} of a {type(layer).__name__} is a {type(part).__name__} without "
                f"{last}, which a pruned pass does not compute"
            )
        yield from ((module, mixin) for module in found)


_PARTS = (("self_attn", PrunedAttention, "o_proj"), ("mlp", PrunedFFN, "down_proj"))


def exchange_layers(layers: nn.ModuleList) -> None:
    """Gives every layer the classes that compute a pruned pass; those that have them keep them.

    Raises ValueError where somebody replaced a forward on the module itself, which would go on
    running in place of ours, TypeError for layers of another kind."""
    for wrapped in layers:
        for module, mixin in parts_in(wrapped):
            if isinstance(module, mixin):
                settle(module)
                continue
            refuse_replaced(module)
            put(module, derive(mixin, type(module)))


def exchange_new(layers: nn.ModuleList) -> bool:
    """The same of what was put in since, if anything was, at every pruned pass: whether it was.

    Raises ValueError for a forward put on a layer or a part of one that cannot be called."""
    if all(_is_exchanged(wrapped) for wrapped in layers):
        return False
    exchange_layers(layers)
    return True


def _is_exchanged(wrapped: nn.Module) -> bool:
    layer = wrapped if isinstance(wrapped, PrunedLayer) else layer_in(wrapped)
    attn, ffn = layer._modules["self_attn"], layer._modules["mlp"]
    for module in (layer, attn, ffn):
        if "forward" in vars(module):
            settle(module)
    return isinstance(layer, PrunedLayer) and _has(attn, PrunedAttention) and _has(ffn, PrunedFFN)


def _has(part: nn.Module, mixin: type) -> bool:
    return isinstance(part, mixin) or any(isinstance(module, mixin) for module in part.modules())


def restore_layers(layers: nn.ModuleList) -> None:
    """Gives every layer its stock classes back.

    Raises ValueError for a layer whose class somebody derived of ours meanwhile (FSDP2 does)."""
    for module in layers.modules():
        if not isinstance(module, PrunedLayer | PrunedAttention | PrunedFFN):
            continue
        stock = stock_of(type(module))
        if issubclass(stock, Exchanged):
            raise ValueError(
                f"the class of a {stock.__name__} was derived from the pruned one meanwhile "
                "(as FSDP2's fully_shard does), and cannot be taken back: remove the plan "
                "before that"
            )
        put(module, stock)
        take_back(module)
