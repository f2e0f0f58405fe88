"""One pruned pass over a decoder: prefill, a later chunk, decode, training.

`prepare` works out, on the CPU, who is where and sees whom; `run` splits the batch once into packed
text and visual rows, takes these through the layers, which it calls, and merges them at the end.
The arithmetic of a layer is in layer.py; no class of transformers is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from yopo.engine.fused import FusedLayer
from yopo.engine.layer import LayerCall, Pass, Reached, Shared, signed
from yopo.engine.layer_plan import LayerPlans, windows
from yopo.engine.layout import VisualLayout
from yopo.engine.packing import Packing, mapped, to_device
from yopo.engine.text_attention import TextSight, additive
from yopo.engine.visual_attention import Blocks, ImageGroup, visual_sight
from yopo.engine.visual_cache import VisualCache
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import is_compiling

# Who looks on at the attention of each layer with an image (calibration/collect.py): it is given
# the LayerCall, the queries of text rows before their rotation and after it, the rotated ones of
# visual rows, and the layer's two stores. Nobody: None.
OBSERVER: ContextVar[Callable[..., None] | None] = ContextVar("yopo_observer", default=None)

CallLayer = Callable[[nn.Module, Tensor, LayerCall], Tensor]


def prepare(
    layout: VisualLayout,
    valid: Tensor,
    cache: VisualCache,
    plan: PruningPlan,
    on_cpu: bool = True,
    text_width: int | None = None,
) -> Pass:
    """The index tensors and masks of a forward, on the CPU. `cache` gets the places of its tokens.

    layout: of this forward's n columns. valid: (B, past + n) bool, False at padding. on_cpu: layers
    compute there. text_width: how many text rows each row of the batch gets, at least; those beyond
    its tokens stand for none.
    """
    text, visual = packings(layout, valid, cache.length, text_width)
    cache.extend(layout, valid, text, visual)
    sight: tuple[tuple[ImageGroup, ...] | Blocks, ...] = ()
    if len(visual):
        sight = tuple(
            visual_sight(layout, visual, cache, valid, window, plan.window_causal, on_cpu)
            for window in windows(plan)
        )
    sinks = plan.sinks if "sink" in (plan.head_mass, plan.cut_mass) else None
    return Pass(
        text=text,
        visual=visual,
        rows=torch.cat([text.rows, visual.rows]),
        is_whole=not len(visual) and len(text) == layout.visual.numel(),
        text_sight=TextSight.build(text, cache, valid, sinks),
        visual_sight=sight,
    )


def packings(
    layout: VisualLayout, valid: Tensor, past: int, text_width: int | None = None
) -> tuple[Packing, Packing]:
    """Text and visual rows of a forward; arguments as of `prepare`."""
    fresh = valid[:, past:]
    # Next-token logits are read off the last column, padding or not (a batch padded on the right):
    # there a pad is computed as stock computes it, a query that no other token sees.
    queries = fresh.clone()
    queries[:, -1] |= valid.any(1)
    text = Packing.build(queries & ~layout.visual, past, text_width)
    return text, Packing.build(fresh & layout.visual, past)


@dataclass(frozen=True)
class Run:
    """How a pass is run.

    call: calls a layer with its rows. keep_cache: what is cached outlives the pass. dropout: of
    attention. hidden_states: gets the packed rows that go into every layer. fused: of each layer,
    its weights where they are fused; None: all are live. devices: that each layer computes on;
    None: to be found out.
    """

    call: CallLayer
    keep_cache: bool
    dropout: float = 0.0
    hidden_states: list[Tensor] | None = None
    fused: Sequence[FusedLayer | None] | None = None
    devices: Sequence[torch.device] | None = None


def run(
    layers: nn.ModuleList,
    plans: LayerPlans,
    index: Pass,
    inputs_embeds: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: VisualCache,
    how: Run,
) -> Tensor:
    """The layers of one forward, without the final norm: inputs_embeds (B, n, d) → (B, n, d); 0 at
    padding.

    index: what `prepare` made of it. cos, sin: (B, n, D). cache: filled.
    """
    shared = share(plans, index, pack(cos, index), pack(sin, index), how)
    rows = through(layers, plans, shared, pack(inputs_embeds, index), cache, how)
    return merge(rows, index, inputs_embeds.shape)


def through(
    layers: nn.ModuleList,
    plans: LayerPlans,
    shared: Shared,
    rows: Tensor,
    cache: VisualCache,
    how: Run,
) -> Tensor:
    """The layers on packed rows (Nt + Nv, d), text first → the same rows."""
    text, visual = rows.tensor_split([shared.n_text])
    both: Tensor | None = rows  # text and visual; None once text went on alone

    def every() -> Tensor:
        if both is not None:
            return both
        return torch.cat([text, visual.to(text.device)]) if shared.n_visual else text

    # What torch.compile traces is there, and with its masks.
    here, on = shared, shared.device if is_compiling() else None
    for number, (layer, stores) in enumerate(zip(layers, cache.stores, strict=True)):
        fused = None if how.fused is None else how.fused[number]
        if how.devices is not None:
            device = how.devices[number]
        elif fused is not None:
            device = fused.qkv.weight.device
        else:
            device = execution_device(layer, text.device)
        plan = plans.on(number, device)
        if how.hidden_states is not None:
            how.hidden_states.append(every())
        if on != device:
            here = to_device(shared, device)
            here, on = replace(here, index=with_masks(here.index, rows.dtype)), device
        before, into = stores, None
        if not shared.in_place:
            before = stores[0].fork(), stores[1].fork()
            into = stores if how.keep_cache else None
        call = LayerCall(plan, here, before, into, fused, Reached())
        if not shared.n_visual or not plan.takes_visual:
            text, both = how.call(layer, text.to(device), call), None
            continue
        out = how.call(layer, every().to(device), call)
        if call.changes_visual:
            both, (text, visual) = out, out.tensor_split([shared.n_text])
        else:
            both, text = None, out
    cache.filling = False
    return every()


def with_masks(index: Pass, dtype: torch.dtype) -> Pass:
    """The same with masks as attention takes them: made once, where the layers compute."""
    if index.text_sight.every is None and index.text_sight.text is None and not index.visual_sight:
        return index

    def ready(each: Tensor) -> Tensor:
        return additive(each, dtype) if each.dtype == torch.bool else each

    sights = mapped((index.text_sight, index.visual_sight), ready)
    return replace(index, text_sight=sights[0], visual_sight=sights[1])


def share(plans: LayerPlans, index: Pass, cos: Tensor, sin: Tensor, how: Run) -> Shared:
    """cos, sin: (Nt + Nv, D) of packed rows."""
    n_text = len(index.text)
    cos, sin = cos.unsqueeze(1), signed(sin.unsqueeze(1))
    return Shared(
        index=index,
        n_text=n_text,
        n_visual=len(index.visual),
        text_angles=(cos[:n_text], sin[:n_text]),
        visual_angles=(cos[n_text:], sin[n_text:]),
        head_dim=plans.head_dim,
        scale=plans.head_dim**-0.5,
        dropout=how.dropout,
        ffn_size=plans.ffn_size,
        in_place=how.keep_cache and not torch.is_grad_enabled(),
        observer=None if is_compiling() else OBSERVER.get(),
    )


def pack(x: Tensor, index: Pass) -> Tensor:
    """(B, n, D) → rows (Nt + Nv, D), text first; those that stand for no token repeat the last."""
    x = x.flatten(0, 1)
    if index.is_whole:
        return x
    return x[to_device(index.rows.clamp(max=x.shape[0] - 1), x.device)]


def merge(rows: Tensor, index: Pass, shape: Sequence[int]) -> Tensor:
    """Packed rows → (B, n, D); 0 at padding."""
    if index.is_whole:
        return rows.view(shape)
    batch, n = shape[:2]
    merged = rows.new_zeros(batch * n + 1, rows.shape[1])  # the last for what stands for no token
    merged = merged.index_copy(0, to_device(index.rows, rows.device), rows)
    return merged[:-1].unflatten(0, (batch, n))


def execution_device(layer: nn.Module, default: torch.device) -> torch.device:
    """Where a layer computes; for one that accelerate offloads, the device that its hook names; for
    one whose weights are in parts on several processes, `default`."""
    # A tensor subclass is quantised, and norms are plain; or sharded (FSDP2), as all are then.
    weight = next((each for each in layer.parameters() if type(each) is nn.Parameter), None)
    if weight is None or hasattr(weight, "ds_id"):  # DeepSpeed's
        return default
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
