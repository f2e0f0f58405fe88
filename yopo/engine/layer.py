"""Self-attention of one decoder layer on packed rows, between its projections, and what a layer is
called with.

Projections and FFN by live weights are in weights.py, by fused ones in fused.py; masks and index
tensors come from forward.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from yopo.engine.head_store import HeadStore
from yopo.engine.layer_plan import LayerPlan
from yopo.engine.packing import Packing
from yopo.engine.text_attention import Sight, TextSight, text_attention
from yopo.engine.visual_attention import Blocks, ImageGroup, visual_attention
from yopo.versions import is_compiling

if TYPE_CHECKING:
    from yopo.engine.fused import FusedLayer

Stores = tuple[HeadStore, HeadStore]
Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Pass:
    """Who is where and sees whom in one forward, the same for every layer; all on one device.

    text, visual: packings of its rows. rows: (Nt + Nv,) int64, their places in the flattened
    (B·n) batch, text first, B·n for those that stand for no token. is_whole: they are all of
    the batch, in order.
    text_sight, visual_sight: see text_attention.py and visual_attention.py; visual_sight has one
        for each of the plan's `windows`, none where no row is visual.
    """

    text: Packing
    visual: Packing
    rows: Tensor
    is_whole: bool
    text_sight: TextSight
    visual_sight: tuple[tuple[ImageGroup, ...] | Blocks, ...]


@dataclass(frozen=True)
class Shared:
    """What the layers of one forward share, on one device.

    text_angles, visual_angles: cos and sin (Nt or Nv, 1, R); of sin the first half is negated, so
        that R features x are rotated to x cos + (their halves exchanged) sin.
    in_place: the stores are the cache's own, with room for later tokens; else each layer fills
        copies, so that it can be run again (gradients, checkpointing).
    observer: see forward.OBSERVER.
    """

    index: Pass
    n_text: int
    n_visual: int
    text_angles: Angles
    visual_angles: Angles
    head_dim: int
    scale: float
    dropout: float
    ffn_size: int
    in_place: bool
    observer: Callable[..., None] | None = None

    @property
    def device(self) -> torch.device | None:
        """Where all of it is; None where it is in several places."""
        index, angles = self.index.rows.device, self.text_angles[0].device
        return index if index == angles else None


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
    fused: FusedLayer | None
    reached: Reached

    @property
    def slices_ffn(self) -> bool:
        """Whether some rows use a part of the FFN only; those that use nothing are not given."""
        return bool(self.plan.neurons) and self.changes_visual

    @property
    def changes_visual(self) -> bool:
        """Whether there are visual rows that leave the layer other than they came; else the layer
        gives back text rows alone."""
        return self.shared.n_visual > 0 and self.plan.changes_visual


def signed(sin: Tensor) -> Tensor:
    """Sines (…, R) as `turn` wants them."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def turn(x: Tensor, count: int, angles: Angles, in_place: bool) -> Tensor:
    """x (N, H, D) with rotary position embedding of its first `count` heads by cos, sin (N, 1, R),
    of their first R features; x's dtype, also in autocast (which leaves x in half precision and the
    angles in float32). `in_place`: nobody else holds x, and it has no gradient."""
    cos, sin = angles
    mine = x.narrow(1, 0, count)
    if cos.shape[-1] < x.shape[-1]:
        mine = mine.narrow(2, 0, cos.shape[-1])
    first, second = mine.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)  # roll() would copy what is not contiguous
    if x.dtype != cos.dtype:
        turned = (mine * cos + swapped * sin).to(x.dtype)
    elif in_place and not is_compiling():  # which would not write into a part of a tensor
        torch.addcmul(mine * cos, swapped, sin, out=mine)
        return x
    else:
        turned = torch.addcmul(mine * cos, swapped, sin)
    if cos.shape[-1] < x.shape[-1]:
        turned = torch.cat([turned, x[:, :count, cos.shape[-1] :]], dim=-1)
    return torch.cat([turned, x[:, count:]], dim=1) if count < x.shape[1] else turned


def attend(
    text: Tensor, visual: Tensor | None, call: LayerCall, in_place: bool
) -> tuple[Tensor, Tensor | None]:
    """Self-attention between the projections of a layer. Fills the stores.

    text: (Nt, H + 2 K, D), [queries | keys | values] of text rows in the layer's own order → their
    outputs (Nt, H, D) in that order. visual: (Nv, H', D), those that the plan's visual_order names,
    or None where no row is visual → the outputs (Nv, H'', D) of its visual_heads; None where visual
    rows do not attend. in_place: both may be written into.
    """
    plan, shared = call.plan, call.shared
    n_text, heads = shared.n_text, plan.heads
    turned = (heads + text.shape[1]) // 2  # queries and keys
    if plan.order is not None:
        text = text.index_select(1, plan.order)
    logits = _sink_logits(text, plan, shared.index)
    still = text[:, :heads].clone() if shared.observer is not None else text
    text = turn(text, turned, shared.text_angles, in_place)
    if visual is not None:
        of_visual = sum(plan.visual_counts[:2])
        visual = turn(visual, of_visual, shared.visual_angles, in_place)
    stores = call.stores
    if not shared.in_place:
        stores = stores[0].fork(), stores[1].fork()
    padded = shared.index.text.pad(text)  # (B, H + 2 K, W, D)
    _fill(stores, plan, shared, padded.narrow(1, heads, text.shape[1] - heads), visual)
    if call.into is not None:
        for mine, of_cache in zip(stores, call.into, strict=True):
            of_cache.take(mine)
    queries = None if visual is None else visual[:, : plan.visual_counts[0]]
    if shared.observer is not None and queries is not None:
        q = text[:, :heads]
        if plan.in_turn is not None:
            still, q = still.index_select(1, plan.in_turn), q.index_select(1, plan.in_turn)
        shared.observer(call, still, q, queries, stores)
    out = _text_queries(padded, logits, plan, shared, stores) if n_text else text[:, :heads]
    if n_text and plan.in_turn is not None:
        out = out.index_select(1, plan.in_turn)
    if queries is None or not plan.attends_visual:
        return out, None
    return out, _visual_queries(queries, plan, shared, stores)


def _fill(
    stores: Stores, plan: LayerPlan, shared: Shared, text: Tensor, visual: Tensor | None
) -> None:
    """Adds keys and values of text rows (B, 2 K, W, D), and of visual rows (Nv, H', D), which have
    those that the plan's visual_order names."""
    both, at = _in_two(text), 0  # (2, B, K, W, D)
    for number, (store, count) in enumerate(zip(stores, plan.kv_counts, strict=True)):
        if count == 0:
            continue
        given = None
        if visual is not None and plan.visual_values[number]:
            given = _in_two(shared.index.visual.pad(visual[:, -2 * count :]))
        elif visual is not None and plan.visual_keys[number]:
            keys = visual.narrow(1, plan.visual_counts[0], count)
            given = shared.index.visual.pad(keys)[None]
        mine = both if count == both.shape[2] else both.narrow(2, at, count)
        store.append(mine, given, spare=shared.in_place)
        at += count


def _in_two(rows: Tensor) -> Tensor:
    """Keys and values of rows (B, 2 K, W, D) → (2, B, K, W, D)."""
    return rows.unflatten(1, (2, -1)).transpose(0, 1)


def _sink_logits(text: Tensor, plan: LayerPlan, index: Pass) -> Tensor | None:
    """The logits (B, H', W, 1) float32 of the sinks of the plan's blind heads, of text rows (Nt, …,
    D) before their rotation."""
    sink, shift = plan.sink, index.text_sight.sink_shift
    if sink is None or shift is None or text.shape[0] == 0:
        return None
    count, n_text = sink.a.shape[0], text.shape[0]
    if sink.b is None:
        logits = sink.a.expand(-1, n_text, 1)  # (H', Nt, 1)
    else:
        q = text.narrow(1, plan.heads - count, count).transpose(0, 1)
        logits = torch.baddbmm(sink.a, q.to(sink.b.dtype), sink.b)
    return index.text.pad(logits.transpose(0, 1)) + shift


def _text_queries(
    q: Tensor, logits: Tensor | None, plan: LayerPlan, shared: Shared, stores: Stores
) -> Tensor:
    """Text queries q (B, H …, W, D), the first H heads → (Nt, H, D), in the plan's order; logits:
    of sinks (B, H', W, 1)."""
    outs, index = [], shared.index
    first = plan.heads - (0 if logits is None else logits.shape[1])  # that has a sink
    for group in plan.text:
        mine = q.narrow(1, group.at.start, group.count)
        sink = None
        if group.sight is Sight.SINK and logits is not None:
            sink = logits[:, group.at.start - first : group.at.stop - first]
        sight, store = index.text_sight, stores[group.store]
        out = text_attention(
            mine, store, group.kv, group.sight, sight, shared.scale, shared.dropout, sink
        )
        outs.append(out)  # (B, H', W, D)
    if index.text.width == 1:
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return index.text.unpad(out)
    # In memory a kernel's output has queries before heads: so nothing is copied twice.
    outs = [out.transpose(1, 2) for out in outs]
    return index.text.gathered(outs[0] if len(outs) == 1 else torch.cat(outs, dim=2))


def _visual_queries(q: Tensor, plan: LayerPlan, shared: Shared, stores: Stores) -> Tensor:
    """Visual queries q (Nv, H', D) of the plan's visual_heads → (Nv, H', D)."""
    outs, index = [q[:, :0]], shared.index
    for group in plan.visual:
        out = visual_attention(
            q[:, group.at],
            index.visual,
            stores[group.store],
            group.kv,
            group.sight,
            index.visual_sight[plan.window],
            shared.scale,
            shared.dropout,
        )
        outs.append(out)
    return outs[1] if len(outs) == 2 else torch.cat(outs, dim=1)
