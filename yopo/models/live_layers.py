"""The layers that a decoder has, against those that its class builds: attributes and buffers of
each are compared, and what is made of other modules, or of classes that are not transformers' own,
runs once by its own weights. Changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from yopo.engine.forward import Run, prepare, run
from yopo.engine.layer_plan import LayerPlans
from yopo.engine.layout import VisualLayout
from yopo.engine.visual_cache import VisualCache
from yopo.models.exchange import original_of, parameters_of
from yopo.models.functions import Functions, is_plain
from yopo.models.layers import OF_NO_ACCOUNT, call_layer, layer_in, stock_forward
from yopo.models.twin import (
    TOLERANCE,
    TOLERANCE_OF_HALF,
    difference,
    generator,
    later_places,
    sizes_of,
    slicing,
    undisturbed,
)
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import rope

_SIMPLE = (bool, int, float, str, tuple, list, type(None))
_LENGTH = 7
# Layers that ran, under all that their outcome hangs on: once, not again for each plan.
_TRIED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Built:
    """What a decoder builds as its layers, one entry a layer, found on a twin before it ran; and
    the twin's sizes."""

    classes: list[tuple[Any, ...]]
    attributes: list[dict[str, Any]]
    buffers: list[dict[str, Tensor]]
    of_decoder: dict[str, Any]
    sizes: list[int]

    @classmethod
    def of(cls, twin: Any) -> Built:
        layers = list(map(layer_in, twin.layers))
        return cls(
            classes=list(map(classes_of, layers)),
            attributes=[dict(_attributes(layer)) for layer in layers],
            buffers=[copy.deepcopy(_buffers(layer)) for layer in layers],
            of_decoder=copy.deepcopy(_of_decoder(twin)),
            sizes=sizes_of(twin.config),
        )


def classes_of(layer: nn.Module) -> tuple[Any, ...]:
    """What tells kinds of layers apart: classes and forwards of the layer, its attention and its
    FFN, and the names of what the layer is made of."""
    stocks = [original_of(type(part)) for part in (layer, layer.self_attn, layer.mlp)]
    return (*stocks, *(stock.forward for stock in stocks), *sorted(layer._modules))


def compare_layers(decoder: Any, functions: Functions, built: Built | None, failed: str) -> None:
    """Raises TypeError, naming what differs, unless every layer is what the twin had `built` and
    computes what the pass does. built: None where the twin `failed`."""
    of_twin = {} if built is None else built.of_decoder
    for name, value in _of_decoder(decoder).items():
        if name in of_twin and not _same(value, of_twin[name]):
            raise not_computed(decoder, f"its {name} is not as its class builds it")
    layers, sizes = list(map(layer_in, decoder.layers)), sizes_of(decoder.config)
    for number, layer in enumerate(layers):
        classes = classes_of(layer)
        if built is not None and [classes] == built.classes[number : number + 1]:
            words = _differs(layer, layers[0], built, number, sizes)
            # What a class of somebody's own keeps may be a mere note of it: trying tells, if not
            # of dropout.
            untried = all(map(is_plain, classes[:3])) or not _is_here(layer)
            if words and (untried or "dropout" in words):
                raise not_computed(decoder, f"in layer {number} {words}")
            if untried:
                continue
        settings = [(name, v) for name, v in _attributes(layer) if type(v) is not int]
        buffers = ((name, each) for name, each in _buffers(layer).items() if not each.is_meta)
        settings += [(name, float(each.sum())) for name, each in buffers]
        state = f"{list(map(id, (*classes, *functions.found)))} {settings}"
        if not _is_here(layer) or _TRIED.get(layer) != state:
            _run_layer(decoder, layer, failed)
            _TRIED[layer] = state


def not_computed(decoder: Any, difference: str) -> TypeError:
    name = original_of(type(decoder)).__name__
    return TypeError(
        f"yopo does not compute what the layers of {name} do: {difference}. This model cannot be "
        "pruned; see docs/adding-a-family.md"
    )


def _attributes(layer: Any) -> Iterator[tuple[str, Any]]:
    for prefix, part in (("", layer), ("self_attn.", layer.self_attn), ("mlp.", layer.mlp)):
        for name, value in vars(part).items():
            if isinstance(value, _SIMPLE) and name[0] != "_" and name not in OF_NO_ACCOUNT:
                yield prefix + name, value


def _of_decoder(decoder: Any) -> dict[str, Any]:
    """Numbers and buffers that a decoder of somebody's own class has beside its layers."""
    if is_plain(original_of(type(decoder))):
        return {}
    values = vars(decoder) | decoder._buffers
    return {name: value for name, value in values.items() if isinstance(value, float | Tensor)}


def _same(now: Any, built: Any) -> bool:
    now, built = torch.as_tensor(now), torch.as_tensor(built)
    if now.is_meta or built.is_meta or now.shape != built.shape:
        return True  # a size, or not to be known
    built = built.to(now)
    near = 1e-2 if now.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return torch.equal(now, built) or torch.allclose(now, built, near, near)


def _buffers(layer: nn.Module) -> dict[str, Tensor]:
    """Those outside projections, which a pass calls."""
    return {name: each for name, each in layer.named_buffers() if "_proj." not in name}


def _differs(
    layer: nn.Module, first: nn.Module, built: Built, number: int, sizes: list[int]
) -> str | None:
    """What of a layer, other than sizes, is not as built; of rotary angles, of which a pass asks
    the first layer (transformers up to 4.42), not as there."""
    pairs = set(zip(sizes, built.sizes, strict=True))
    for name, value in built.attributes[number].items():
        path, _, attribute = name.rpartition(".")
        now = getattr(layer.get_submodule(path), attribute, value)
        same = isinstance(now, _SIMPLE) and (now == value or (now, value) in pairs)
        if not same:
            return f"{name} is {now!r}, and {value!r} in one that its class builds"
    if not built.buffers[number]:
        return None
    live, others = _buffers(layer), _buffers(first)
    for name, buffer in built.buffers[number].items():
        expected = others.get(name, buffer) if "rotary_emb" in name else buffer
        if not _same(live.get(name, expected), expected):
            return f"the buffer {name} has other values than in one that its class builds"
    return None


def _is_here(layer: nn.Module) -> bool:
    """Whether the weights of a layer are here and whole."""
    weight = next(layer.parameters())
    return not (weight.is_meta or type(weight) is not nn.Parameter or hasattr(weight, "ds_id"))


def _run_layer(decoder: Any, layer: nn.Module, failed: str) -> None:
    """Runs a live layer, by its own weights. Raises TypeError where the pass differs from it or it
    cannot be run."""
    made = ", ".join(cls.__name__ for cls in classes_of(layer)[:3])
    if not _is_here(layer):
        name = original_of(type(decoder)).__name__
        why = f" (a small twin of it failed: {failed})" if failed else ""
        raise TypeError(
            f"a layer of this {name} is made of {made}, which is not what it builds, and "
            f"its weights are not here to be tried{why}: apply the plan before weights are sharded "
            "or offloaded"
        )
    weight = next(layer.parameters())
    half = weight.dtype in (torch.float16, torch.bfloat16)
    rows = torch.randn(1, _LENGTH, decoder.config.hidden_size, generator=generator(1)).to(weight)
    later = later_places(decoder, _LENGTH)
    starts = torch.arange(_LENGTH)[None]
    for places in starts if later is None else torch.cat([starts, later[-1:]]):
        at = places[None].to(rows.device)
        with undisturbed():
            angles = rope(decoder, rows, at, int(at.max()) + 1)
            try:
                expected = _own_output(layer, rows, at, angles) - rows
                found = _pruned_output(decoder, layer, rows, angles) - rows
            except Exception as error:  # whatever somebody's modules raise
                words = f"one that is made of {made} could not be tried: {error}"
                raise not_computed(decoder, words) from error
        differs = difference(found, expected, expected)
        if not differs <= (TOLERANCE_OF_HALF if half else TOLERANCE):
            words = f"one that is made of {made} gives outputs that differ by {differs:.2g}"
            raise not_computed(decoder, words)


def _own_output(
    layer: nn.Module, rows: Tensor, places: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """The layer's own forward over rows (1, n, d), causal."""
    n = rows.shape[1]
    bias = torch.full((n, n), torch.finfo(rows.dtype).min, device=rows.device).triu(1)
    named = {
        "attention_mask": bias.to(rows.dtype)[None, None],
        "position_ids": places,
        "position_embeddings": angles,
    }
    forward = stock_forward(layer)
    takes = parameters_of(forward)
    out = forward(layer, rows, **{k: v for k, v in named.items() if k in takes})
    return out[0] if isinstance(out, tuple) else out


def _pruned_output(
    decoder: Any, layer: nn.Module, rows: Tensor, angles: tuple[Tensor, Tensor]
) -> Tensor:
    """The engine's over the same, of which some are visual, under a plan that prunes nothing."""
    config = decoder.config
    plan = PruningPlan(torch.ones(1, config.num_attention_heads, dtype=torch.bool))
    plans = slicing(LayerPlans.build(config, plan), config)
    valid = torch.ones(rows.shape[:2], dtype=torch.bool)
    visual = torch.zeros_like(valid)
    visual[:, 2:6] = True
    cache = VisualCache.adopt(None, plan, 1, valid[:, :0], plans.stored)
    index = prepare(VisualLayout.from_mask(visual), valid, cache, plan)
    layers = nn.ModuleList([layer])
    return run(layers, plans, index, rows, *angles, cache, Run(call_layer, keep_cache=False))
