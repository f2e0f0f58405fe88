"""One pruned pass over a stack of decoder layers: prefill, a later chunk, decode, training.

Text rows and visual rows go through the stack packed, text first (see packing.py): kept heads and
the first FFN neurons see all rows, the rest text rows only. Which heads do what in a layer is
`LayerPlan`; no mask, cache or model class is made here. The layers are Llama-shaped modules: their
norms are called, their projections sliced (projections.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yopo.engine.layout import VisualLayout
from yopo.engine.packing import Packing, to_device
from yopo.engine.projections import gated_ffn, project_from_heads, project_to_heads, to_qkv
from yopo.engine.text_attention import Sight, TextSight, text_attention
from yopo.engine.visual_attention import Blocks, ImageGroup, visual_attention, visual_sight
from yopo.engine.visual_cache import HeadStore, VisualCache
from yopo.plan.pruning_plan import PruningPlan

# The two stores of a layer: key/value heads that some text queries see visual tokens through, and
# the others.
SEEN, BLIND = 0, 1

# Who looks on at the attention of each layer with an image (collect.py): it is given the Pass, the
# rotated queries of text and of visual rows, and the layer's two stores. Nobody: None.
OBSERVER: ContextVar[Callable[..., None] | None] = ContextVar("yopo_observer", default=None)


@dataclass(frozen=True)
class HeadGroup:
    """Query heads treated alike.

    q: (H',) query heads; None: all.
    store: SEEN or BLIND, which keys and values they read.
    kv: (H',) their place among the store's key/value heads; None: one to one.
    sight: what they get from visual keys.
    text_mass: (H',) constants m for queries with an image before them; None: 1.
    """

    q: Tensor | None
    store: int
    kv: Tensor | None
    sight: Sight
    text_mass: Tensor | None


@dataclass(frozen=True)
class LayerPlan:
    """What one layer computes under a plan.

    kv: for each store the key/value heads it holds.
    visual_keys, visual_values: whether a store holds those of visual tokens too.
    text, visual: head groups of text and of visual queries (heads in no group give zero).
    text_order: (H,) puts the concatenated outputs of `text` back in head order; None if they are.
    visual_heads: the query heads of `visual` in that order; None: all in order.
    runs_visual: visual rows pass this layer.
    """

    kv: tuple[Tensor, Tensor]
    visual_keys: tuple[bool, bool]
    visual_values: tuple[bool, bool]
    text: tuple[HeadGroup, ...]
    visual: tuple[HeadGroup, ...]
    text_order: Tensor | None
    visual_heads: Tensor | None
    runs_visual: bool

    @classmethod
    def build(cls, plan: PruningPlan, layer: int, kv_heads: int) -> LayerPlan:
        per_kv = plan.num_heads // kv_heads
        keep = plan.head_keep[layer]
        below_cut = layer < plan.layer_cut
        seeing = keep if below_cut else torch.zeros_like(keep)
        mass = plan.head_mass if below_cut else plan.cut_mass
        blind_sight = Sight.MASS if mass == "exact" else Sight.NOTHING
        # Of query heads that share keys and values (GQA) some may see and some be blind: then the
        # blind ones read the text in the store of the others, and none is held twice.
        shared = seeing.unflatten(0, (-1, per_kv)).any(1).repeat_interleave(per_kv)
        kv = tuple((mask.nonzero().flatten() // per_kv).unique() for mask in (shared, ~shared))

        def groups(seeing: Tensor, blind: Tensor) -> tuple[HeadGroup, ...]:
            made = []
            for chosen, store, sight in (
                (seeing, SEEN, Sight.ALL),
                (blind & shared, SEEN, blind_sight),
                (blind & ~shared, BLIND, blind_sight),
            ):
                q = chosen.nonzero().flatten()
                if len(q) == 0:
                    continue
                place = torch.searchsorted(kv[store], q // per_kv)
                straight = torch.equal(place, torch.arange(len(kv[store]), device="cpu"))
                weighed = mass == "calibrated" and sight is not Sight.ALL
                constants = plan.text_mass[layer][q] if weighed else None
                every = None if len(q) == plan.num_heads else q
                made.append(HeadGroup(every, store, None if straight else place, sight, constants))
            return tuple(made)

        text = groups(seeing, ~seeing)
        # Blind visual queries: kept heads past the cut; pruned ones too if these are not zero.
        blind = ~seeing & keep if plan.prune_visual_queries else ~seeing
        runs_visual = below_cut or plan.cut_mass == "exact"
        visual = groups(seeing, blind) if runs_visual else ()
        whole = len(visual) == 1 and visual[0].q is None
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        return cls(
            kv=kv,
            visual_keys=(True, blind_sight is Sight.MASS),
            visual_values=(True, False),
            text=text,
            visual=visual,
            text_order=None if len(text) == 1 else torch.cat([group.q for group in text]).argsort(),
            visual_heads=None if whole else torch.cat([none, *(group.q for group in visual)]),
            runs_visual=runs_visual,
        )


@dataclass(frozen=True)
class Pass:
    """All that the layers of one forward share, on one device.

    text, visual: packings.
    cos, sin: (Nt + Nv, 1, D), text rows first.
    text_sight, visual_sight: see attention.py and neighbours.py.
    keep: the stores stay for the next forward; spare: with room for its tokens.
    observer: see OBSERVER.
    """

    text: Packing
    visual: Packing
    cos: Tensor
    sin: Tensor
    text_sight: TextSight
    visual_sight: tuple[ImageGroup, ...] | Blocks | None
    head_dim: int
    scale: float
    dropout: float
    keep: bool
    spare: bool
    observer: Callable[..., None] | None = None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (N, H, D) by cos, sin (N, 1, R), of its first R features; x's
    dtype, also in autocast (which leaves x in half precision and the angles in float32)."""
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.tensor_split([cos.shape[-1]], dim=-1)
        return torch.cat([rotate(turned, cos, sin), rest], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend_layer(
    attn: nn.Module, x: Tensor, plan: LayerPlan, p: Pass, stores: tuple[HeadStore, HeadStore]
) -> Tensor:
    """Self-attention of one layer on normed rows x (N, d), text first → (N, d). Fills `stores`."""
    n_text = len(p.text)
    text, visual = x[:n_text], x[n_text:]
    cos, sin = p.cos[:n_text], p.sin[:n_text]
    q_proj, k_proj, v_proj = to_qkv(attn)
    q = rotate(project_to_heads(q_proj, text, None, p.head_dim), cos, sin)
    v = project_to_heads(v_proj, text, None, p.head_dim)
    # Where the two stores together want the visual keys of all heads, one product makes them.
    every_key = all(plan.visual_keys)
    k = project_to_heads(k_proj, x if every_key else text, None, p.head_dim)
    k = rotate(k, p.cos[: len(k)], p.sin[: len(k)])
    k, visual_keys = k[:n_text], k[n_text:]
    cos, sin = p.cos[n_text:], p.sin[n_text:]
    for store, kv, keys, values in zip(
        stores, plan.kv, plan.visual_keys, plan.visual_values, strict=True
    ):
        if len(kv) == 0:
            continue
        heads = None if len(kv) == k.shape[1] else kv

        def mine(t: Tensor, heads: Tensor | None = heads) -> Tensor:
            return t if heads is None else t.index_select(1, heads)

        visual_k = visual_v = None
        if len(visual) and keys and every_key:
            visual_k = p.visual.pad(mine(visual_keys))
        elif len(visual) and keys:
            visual_k = rotate(project_to_heads(k_proj, visual, heads, p.head_dim), cos, sin)
            visual_k = p.visual.pad(visual_k)
        if len(visual) and values:
            visual_v = p.visual.pad(project_to_heads(v_proj, visual, heads, p.head_dim))
        text_k, text_v = p.text.pad(mine(k)), p.text.pad(mine(v))
        store.append(text_k, text_v, visual_k, visual_v, spare=p.spare)

    out = _text_queries(q, plan, p, stores) if n_text else q
    out = project_from_heads(attn.o_proj, out, None, q.shape[1])
    if not len(visual):
        return out
    visual_q = rotate(project_to_heads(q_proj, visual, plan.visual_heads, p.head_dim), cos, sin)
    if p.observer is not None:
        p.observer(p, q, visual_q, stores)
    visual_out = _visual_queries(visual_q, plan, p, stores)
    return torch.cat(
        [out, project_from_heads(attn.o_proj, visual_out, plan.visual_heads, q.shape[1])]
    )


def _text_queries(
    q: Tensor, plan: LayerPlan, p: Pass, stores: tuple[HeadStore, HeadStore]
) -> Tensor:
    outs = []
    for group in plan.text:
        mine = p.text.pad(q if group.q is None else q.index_select(1, group.q))
        store = stores[group.store]
        out = text_attention(mine, store, group.kv, group.sight, p.text_sight, p.scale, p.dropout)
        if group.text_mass is not None:
            mass = group.text_mass[:, None, None].to(out.dtype)
            out = torch.where(p.text_sight.image_before, out * mass, out)
        outs.append(p.text.unpad(out))
    return (
        outs[0]
        if plan.text_order is None
        else torch.cat(outs, dim=1).index_select(1, plan.text_order)
    )


def _visual_queries(
    q: Tensor, plan: LayerPlan, p: Pass, stores: tuple[HeadStore, HeadStore]
) -> Tensor:
    outs, at = [q[:, :0]], 0
    for group in plan.visual:
        count = q.shape[1] if group.q is None else len(group.q)
        mine = q[:, at : at + count]
        store = stores[group.store]
        out = visual_attention(
            mine, p.visual, store, group.kv, group.sight, p.visual_sight, p.scale, p.dropout
        )
        if (
            group.text_mass is not None
        ):  # a visual query sees itself: an image always comes before it
            out = out * group.text_mass[:, None].to(out.dtype)
        outs.append(out)
        at += count
    return torch.cat(outs, dim=1)


@dataclass(frozen=True)
class Stack:
    """A plan worked out for one model: each layer's part, how many FFN neurons visual rows use, and
    what attention needs of the config."""

    plans: list[LayerPlan]
    neurons: int | None  # None: all
    head_dim: int
    dropout: float

    @classmethod
    def build(cls, config: Any, plan: PruningPlan) -> Stack:
        heads = config.num_attention_heads
        neurons = plan.ffn_neurons(config.intermediate_size)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            plans=[LayerPlan.build(plan, layer, kv_heads) for layer in range(plan.num_layers)],
            neurons=None if neurons == config.intermediate_size else neurons,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dropout=getattr(config, "attention_dropout", 0.0) or 0.0,
        )

    def on(self, layer: int, device: torch.device) -> LayerPlan:
        """The plan of a layer with its index tensors where the layer computes, moved there once."""
        plan = self.plans[layer]
        if plan.kv[0].device != device:
            with torch.inference_mode(False):  # they outlive this call, and training may follow
                plan = to_device(plan, device)
            self.plans[layer] = plan  # not read back: replicas on other devices write here too
        return plan

    def kv_heads(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer the key/value heads of its two stores."""
        return [plan.kv for plan in self.plans]


def execution_device(layer: nn.Module) -> torch.device:
    """Where a layer computes; for one that accelerate offloads, the device that its hook names."""
    weight = next(layer.parameters())
    if not weight.is_meta:
        return weight.device
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), None)
    if found is None:
        raise RuntimeError(
            f"a {type(layer).__name__} has its weights on the meta device and no accelerate hook "
            "that would bring them: load the model's weights first"
        )
    return torch.device(found)


def run(
    layers: nn.ModuleList,
    stack: Stack,
    plan: PruningPlan,
    layout: VisualLayout,
    inputs_embeds: Tensor,
    cos: Tensor,
    sin: Tensor,
    valid: Tensor,
    cache: VisualCache,
    keep_cache: bool,
    training: bool,
    checkpoint: Callable[..., Tensor] | None = None,
    hidden_states: list[Tensor] | None = None,
) -> Tensor:
    """One forward of the layers, without the final norm: inputs_embeds (B, n, d) → (B, n, d); 0 at
    padding.

    layout: of these n columns. cos, sin: (B, n, D). valid: (B, past + n) bool on the CPU, False at
    padding. cache: filled; with keep_cache=False it is thrown away afterwards. checkpoint:
    torch.utils.checkpoint's function, where activations are to be computed again in backward.
    hidden_states: gets the (B, n, d) input of every layer.
    """
    batch, n, _ = inputs_embeds.shape
    past = cache.length
    fresh = valid[:, past:]
    # Next-token logits are read off the last column, padding or not (a batch padded on the right):
    # there a pad is computed as stock computes it, a query that no other token sees.
    queries = fresh.clone()
    queries[:, -1] |= valid.any(1)
    text = Packing.build(queries & ~layout.visual, past)
    visual = Packing.build(fresh & layout.visual, past)
    cache.extend(layout, valid, text.order, visual.order)
    rows_at = torch.cat([text.rows, visual.rows])
    angles = rows_at.to(cos.device)
    shared = Pass(
        text=text,
        visual=visual,
        cos=cos.flatten(0, 1)[angles].unsqueeze(1),
        sin=sin.flatten(0, 1)[angles].unsqueeze(1),
        text_sight=TextSight.build(text, cache, valid),
        visual_sight=visual_sight(layout, visual, cache, valid, plan.window, plan.window_causal)
        if len(visual)
        else None,
        head_dim=stack.head_dim,
        scale=stack.head_dim**-0.5,
        dropout=stack.dropout if training else 0.0,
        keep=keep_cache,
        spare=keep_cache and not torch.is_grad_enabled(),
        observer=OBSERVER.get(),
    )

    rows = inputs_embeds.flatten(0, 1)[rows_at.to(inputs_embeds.device)]
    stopped: Tensor | None = None  # visual rows that have come to their end

    def merge() -> Tensor:
        every = rows if stopped is None else torch.cat([rows, stopped.to(rows.device)])
        merged = every.new_zeros(batch * n, every.shape[1])
        return merged.index_copy(0, rows_at.to(every.device), every).unflatten(0, (batch, n))

    here: tuple[Pass, torch.device] | None = None
    for index, (layer, stores) in enumerate(zip(layers, cache.stores, strict=True)):
        device = execution_device(layer)
        layer_plan = stack.on(index, device)
        if hidden_states is not None:
            hidden_states.append(merge())
        if stopped is None and not layer_plan.runs_visual:
            rows, stopped = rows[: len(text)], rows[len(text) :]
        if here is None or here[1] != device:
            here = to_device(shared, device), device
        arguments = (
            layer,
            rows.to(device),
            layer_plan,
            here[0],
            stores,
            stack.neurons,
        )
        rows = checkpoint(_layer, *arguments) if checkpoint is not None else _layer(*arguments)
    cache.filling = False
    return merge()


def _layer(
    layer: nn.Module,
    rows: Tensor,
    plan: LayerPlan,
    p: Pass,
    stores: tuple[HeadStore, HeadStore],
    neurons: int | None,
) -> Tensor:
    """One decoder layer on packed rows (N, d), text first → (N, d)."""
    if not p.keep:
        # Keys and values then go with the layer, and a checkpointed layer can be run again.
        stores = stores[SEEN].fork(), stores[BLIND].fork()
    rows = rows + attend_layer(layer.self_attn, layer.input_layernorm(rows), plan, p, stores)
    return rows + gated_ffn(layer.mlp, layer.post_attention_layernorm(rows), len(p.text), neurons)
