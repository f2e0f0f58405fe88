"""A pass made ready: all that hangs on Python or on numbers in tensors is decided, and what is left
are operations on tensors, which torch.compile traces as one graph. Under it, `make_ready` is not
traced and `compute` is; without it they follow each other.

What a call means is arguments.py's; who makes passes ready is the decoder, or, ahead of it, whoever
is called around it (ahead.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from yopo.engine.forward import OBSERVER, Run, execution_device, merge, prepare, run, with_masks
from yopo.engine.fused import FusedLayer
from yopo.engine.layer import LayerCall, Pass
from yopo.engine.packing import to_device
from yopo.engine.visual_cache import VisualCache
from yopo.models.arguments import Resolved, cache_of
from yopo.models.layers import call_layer
from yopo.versions import CACHE_FIELD, checkpoints_itself, is_compiling, nothing_captured, rope


@dataclass(frozen=True)
class Ready:
    """A pass over rows (batch, n) after `past` cached ones.

    index: on the CPU, or where torch.compile traces on the first layer's device. fused: of each
    layer; None: all are live. devices: that the layers compute on. slots: (1, T, V), as many as
    the cache holds of text and of visual tokens; None: the stores are asked. The others: see
    Resolved.
    """

    batch: int
    n: int
    past: int
    index: Pass
    fused: Sequence[FusedLayer | None] | None
    devices: Sequence[torch.device]
    cache: VisualCache
    keep_cache: bool
    checkpointing: bool
    output_hidden_states: bool
    return_dict: bool
    slots: Tensor | None = None


def make_ready(
    decoder: Any, called: Resolved, fused: Sequence[FusedLayer | None] | None, device: torch.device
) -> Ready:
    """The pass over a call whose embeddings are on `device`. Its cache gets the places."""
    devices = [
        execution_device(layer, device) if weights is None else weights.qkv.weight.device
        for layer, weights in zip(
            decoder.layers, fused or [None] * len(decoder.layers), strict=True
        )
    ]
    # Bands keep keys and values twice for the backward.
    on_cpu = device.type == "cpu" and not torch.is_grad_enabled()
    index = prepare(called.layout, called.valid, called.cache, decoder.yopo_plan, on_cpu)
    batch, n = called.layout.shape
    return Ready(
        batch=batch,
        n=n,
        past=called.past,
        index=index,
        fused=fused,
        devices=devices,
        cache=called.cache,
        keep_cache=called.keep_cache,
        checkpointing=called.checkpointing,
        output_hidden_states=called.output_hidden_states,
        return_dict=called.return_dict,
    )


def for_tracing(decoder: Any, ready: Ready, dtype: torch.dtype) -> Ready:
    """The pass, with all done that it would do by itself, but not while it is traced."""
    plans = decoder._yopo_layer_plans
    for number, device in enumerate(ready.devices):
        plans.on(number, device)
    stores = [store for pair in ready.cache.stores for store in pair]
    for store in stores:
        store.make_room(ready.index.text.width)
        for buffer in store.buffers():
            torch._dynamo.maybe_mark_dynamic(buffer, 3)
    visual = max(max(store.visual_keys, store.visual_values) for store in stores)
    slots = torch.empty(1, max(store.text for store in stores), visual, device="meta")
    torch._dynamo.maybe_mark_dynamic(slots, 1)
    index = with_masks(to_device(ready.index, ready.devices[0]), dtype)
    return replace(ready, index=index, slots=slots)


def can_be_traced(decoder: Any, called: Resolved) -> bool:
    """Whether torch.compile may trace a pass; else it runs as if there were no torch.compile."""
    observed = OBSERVER.get() is not None or called.output_hidden_states
    return not (observed or called.checkpointing or decoder._yopo_graphs is not None)


def compute(decoder: Any, ready: Ready, embeds: Tensor, places: Tensor) -> Any:
    """What the decoder returns. embeds (B, n, d). places: their positions."""
    if tuple(embeds.shape[:2]) != (ready.batch, ready.n):
        raise ValueError(
            f"the decoder was called with {tuple(embeds.shape[:2])} tokens (batch, tokens), where "
            f"the model around it was with {(ready.batch, ready.n)}: what lies between has changed "
            "them, which torch.compile does not go along with. Run it without"
        )
    plans, index, cache = decoder._yopo_layer_plans, ready.index, ready.cache
    if ready.slots is not None:
        for store in (store for pair in cache.stores for store in pair):
            store.say(ready.slots.shape[2], ready.slots.shape[1])
    cos, sin = rope(decoder, embeds, places, ready.past + ready.n)
    hidden_states: list[Tensor] | None = [] if ready.output_hidden_states else None
    call = partial(_checkpointed, decoder) if ready.checkpointing else call_layer
    dropout = plans.dropout if decoder.training else 0.0
    how = Run(call, ready.keep_cache, dropout, hidden_states, ready.fused, ready.devices)
    with nullcontext() if is_compiling() else nothing_captured():
        out = run(decoder.layers, plans, index, embeds, cos, sin, cache, how)
    if hidden_states is not None:
        hidden_states = [merge(rows, index, embeds.shape) for rows in hidden_states]
    return answer(ready, decoder.norm(out), hidden_states)


def answer(called: Any, out: Tensor, hidden_states: list[Tensor] | None) -> Any:
    """What the decoder returns: `out` (B, n, d), normed, and the layers' inputs."""
    output = BaseModelOutputWithPast(
        last_hidden_state=out,
        hidden_states=None if hidden_states is None else (*hidden_states, out),
        **{CACHE_FIELD: called.cache if called.keep_cache else None},
    )
    return output if called.return_dict else output.to_tuple()


def _checkpointed(decoder: Any, layer: nn.Module, rows: Tensor, pruned: LayerCall) -> Tensor:
    """Calls a layer so that its activations are computed again in backward."""
    if checkpoints_itself(layer):
        return call_layer(layer, rows, pruned)
    return decoder._gradient_checkpointing_func(partial(call_layer, layer, pruned=pruned), rows)


def taken(given: Mapping[str, Any]) -> Ready | None:
    """The pass that was made ready ahead of this call, once."""
    cache = cache_of(given)
    ready = getattr(cache, "ready", None)
    if ready is not None:
        cache.ready = None
    return ready
