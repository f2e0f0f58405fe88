"""Self-attention of one decoder layer on packed rows, and what a layer is called with.

The layer's own modules are called by models/layers.py, its FFN is in weights.py; masks and index
tensors come from forward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from yopo.engine.layer_plan import LayerPlan, SinkWeights
from yopo.engine.packing import Packing
from yopo.engine.text_attention import Sight, TextSight, text_attention
from yopo.engine.visual_attention import Blocks, ImageGroup, visual_attention
from yopo.engine.visual_cache import HeadStore
from yopo.engine.weights import (
    Attention,
    project_from_heads,
    project_to_heads,
    to_heads,
    to_qkv,
)

Stores = tuple[HeadStore, HeadStore]


@dataclass(frozen=True)
class Pass:
    """Who is where and sees whom in one forward, the same for every layer; all on one device.

    text, visual: packings of its rows. rows: (Nt + Nv,) int64, their places in the flattened
    (B·n) batch, text first.
    text_sight, visual_sight: see text_attention.py and visual_attention.py; visual_sight has one
        for each of the plan's `windows`, none where no row is visual.
    """

    text: Packing
    visual: Packing
    rows: Tensor
    text_sight: TextSight
    visual_sight: tuple[tuple[ImageGroup, ...] | Blocks, ...]


@dataclass(frozen=True)
class Shared:
    """What the layers of one forward share, on one device.

    cos, sin: (Nt + Nv, 1, D), text rows first.
    in_place: the stores are the cache's own, with room for later tokens; else each layer fills
        copies, so that it can be run again (gradients, checkpointing).
    observer: see forward.OBSERVER.
    """

    index: Pass
    cos: Tensor
    sin: Tensor
    head_dim: int
    scale: float
    dropout: float
    ffn_size: int
    in_place: bool
    observer: Callable[..., None] | None = None


class Reached:
    """By what a call was answered last. An object of its own: of a dataclass among the arguments of
    a layer FSDP makes a copy."""

    by: Any = None


@dataclass
class LayerCall:
    """What one layer is called with beside its rows.

    stores: what is cached so far. into: the cache's stores, which get what the layer adds to copies
    of `stores`; None: nobody needs it, or it is added in place. reached: by it who calls a layer or
    a part of one sees that the pruned forward was run, and not something else that took its place.
    """

    plan: LayerPlan
    shared: Shared
    stores: Stores
    into: Stores | None
    reached: Reached = field(default_factory=Reached)

    @property
    def slices_ffn(self) -> bool:
        """Whether some rows use a part of the FFN only; those that use nothing are not given."""
        return bool(self.plan.neurons) and self.changes_visual

    @property
    def changes_visual(self) -> bool:
        """Whether there are visual rows that leave the layer other than they came; else the layer
        gives back text rows alone."""
        return self.plan.changes_visual and len(self.shared.index.visual) > 0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (N, H, D) by cos, sin (N, 1, R), of its first R features; x's
    dtype, also in autocast (which leaves x in half precision and the angles in float32)."""
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.tensor_split([cos.shape[-1]], dim=-1)
        return torch.cat([rotate(turned, cos, sin), rest], dim=-1)
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    if x.dtype == cos.dtype:
        return torch.addcmul(x * cos, swapped, sin)
    return (x * cos + swapped * sin).to(x.dtype)


def attend_layer(attn: Attention, x: Tensor, call: LayerCall) -> Tensor:
    """Self-attention on normed rows x (N, d), text first → (N, d), or of text rows alone where the
    plan has visual rows not attend. Fills the stores."""
    plan, shared = call.plan, call.shared
    n_text, head_dim = len(shared.index.text), shared.head_dim
    n_q, n_kv = plan.heads, sum(map(len, plan.kv))
    cos, sin = shared.cos[: len(x)], shared.sin[: len(x)]
    stores = call.stores
    if not shared.in_place:
        stores = stores[0].fork(), stores[1].fork()

    def turned(text: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(text, cos[:n_text], sin[:n_text]), rotate(visual, cos[n_text:], sin[n_text:])

    sliced = n_text < len(x)
    q_proj, k_proj, v_proj = to_qkv(attn, x, sliced)
    visual_q: Tensor | None
    visual_k: Tensor | None
    visual_v: Tensor | None
    if sliced:
        q, visual_q = project_to_heads(q_proj, x, n_text, plan.visual_heads, n_q, head_dim)
        k, visual_k = project_to_heads(k_proj, x, n_text, plan.visual_key_heads, n_kv, head_dim)
        v, visual_v = project_to_heads(v_proj, x, n_text, plan.visual_value_heads, n_kv, head_dim)
        logits, still = _sink_logits(q, plan.sink, shared.index), q
        q, visual_q = turned(q, visual_q)
        k, visual_k = turned(k, visual_k)
    else:
        q, k = to_heads(q_proj(x), n_q, head_dim), to_heads(k_proj(x), n_kv, head_dim)
        logits = _sink_logits(q, plan.sink, shared.index)
        q, k = rotate(torch.cat([q, k], dim=1), cos, sin).split([n_q, n_kv], dim=1)
        v = to_heads(v_proj(x), n_kv, head_dim)
        visual_q = visual_k = visual_v = None
    _fill(stores, plan, shared.index, (k, v), (visual_k, visual_v), shared.in_place)
    if call.into is not None:
        for mine, of_cache in zip(stores, call.into, strict=True):
            of_cache.take(mine)
    out = _text_queries(q, logits, plan, shared, stores) if n_text else q
    if visual_q is not None:
        if shared.observer is not None:
            shared.observer(call, still, q, visual_q, stores)
        visual_q = _visual_queries(visual_q, plan, shared, stores) if plan.attends_visual else None
    return project_from_heads(attn.o_proj, out, visual_q, plan.visual_heads)


def _fill(
    stores: Stores,
    plan: LayerPlan,
    index: Pass,
    text: tuple[Tensor, Tensor],
    visual: tuple[Tensor | None, Tensor | None],
    in_place: bool,
) -> None:
    """Adds keys and values: `text` (Nt, H, D) of all heads, `visual` (Nv, H', D) of the heads that
    the plan's visual_key_heads and visual_value_heads name."""
    every_key = all(plan.visual_keys)
    for number, (store, kv) in enumerate(zip(stores, plan.kv, strict=True)):
        if len(kv) == 0:
            continue
        heads = None if len(kv) == text[0].shape[1] else kv
        k, v = (index.text.pad(x if heads is None else x.index_select(1, heads)) for x in text)
        visual_k, visual_v = visual
        if visual_k is not None and plan.visual_keys[number]:
            if every_key and heads is not None:
                visual_k = visual_k.index_select(1, heads)
            visual_k = index.visual.pad(visual_k)
        else:
            visual_k = None
        if visual_v is not None and plan.visual_values[number]:
            visual_v = index.visual.pad(visual_v)
        else:
            visual_v = None
        store.append(k, v, visual_k, visual_v, spare=in_place)


def _sink_logits(q: Tensor, sink: SinkWeights | None, index: Pass) -> Tensor | None:
    """The sinks' logits (B, H, W, 1) float32 of text queries q (Nt, H, D) before their rotation."""
    shift = index.text_sight.sink_shift
    if sink is None or shift is None or not len(q):
        return None
    logits = sink.a.expand(-1, len(q), 1)  # (H, Nt, 1)
    if sink.b is not None:
        logits = torch.baddbmm(sink.a, q.transpose(0, 1).to(sink.b.dtype), sink.b)
    return index.text.pad(logits.transpose(0, 1)) + shift


def _text_queries(
    q: Tensor, logits: Tensor | None, plan: LayerPlan, shared: Shared, stores: Stores
) -> Tensor:
    """Text queries q (Nt, H, D) of all heads → (Nt, H, D); logits: of sinks (B, H, W, 1)."""
    outs, index = [], shared.index
    for group in plan.text:
        mine = index.text.pad(q if group.q is None else q.index_select(1, group.q))
        sink = None
        if group.sight is Sight.SINK and logits is not None:
            sink = logits if group.q is None else logits.index_select(1, group.q)
        sight, store = index.text_sight, stores[group.store]
        out = text_attention(
            mine, store, group.kv, group.sight, sight, shared.scale, shared.dropout, sink
        )
        outs.append(index.text.unpad(out))
    if plan.text_order is None:
        return outs[0]
    return torch.cat(outs, dim=1).index_select(1, plan.text_order)


def _visual_queries(q: Tensor, plan: LayerPlan, shared: Shared, stores: Stores) -> Tensor:
    """Visual queries q (Nv, H', D) of the plan's visual_heads → (Nv, H', D)."""
    outs, at, index = [q[:, :0]], 0, shared.index
    for group in plan.visual:
        count = q.shape[1] if group.q is None else len(group.q)
        out = visual_attention(
            q[:, at : at + count],
            index.visual,
            stores[group.store],
            group.kv,
            group.sight,
            index.visual_sight[plan.window],
            shared.scale,
            shared.dropout,
        )
        outs.append(out)
        at += count
    return torch.cat(outs, dim=1)
