"""A twin of a decoder: as many layers of its classes and settings, small, with random weights. Says
by how much the pruned pass, under a plan that prunes nothing, computes otherwise than each of its
layers, at several sizes of values and places in the sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from yopo.engine.layer_plan import LayerPlans
from yopo.models.exchange import derive, original_of, put
from yopo.models.functions import Functions, attention_function, is_plain
from yopo.plan.config_fields import head_sizes
from yopo.plan.pruning_plan import RELEASED_FIELDS, PruningPlan
from yopo.versions import takes_any_position

TOLERANCE = 1e-3  # of the largest value, in float32; other arithmetic differs by 0.01 and more
TOLERANCE_OF_HALF = 0.05
_GRID = (2, 3)
_TEXT_BEFORE, _TEXT_AFTER = 3, 4
_LENGTH = _TEXT_BEFORE + _GRID[0] * _GRID[1] + _TEXT_AFTER
_NEURONS = 24
# How much larger than usual projections are in each run: what is clipped or capped is so beyond
# some value. Of queries and keys, which are multiplied, one is as much smaller.
_RUNS: tuple[Mapping[str, float], ...] = (
    {},
    {"q": 8, "k": 8, "v": 8},
    {"q": 1e3, "k": 1e-3, "v": 1e3, "gate": 1e3},
    {"q": 1e-3, "k": 1e3, "v": 1e3, "up": 1e3},
)
_EARLY = 2  # so many runs are at the first positions, the others at later ones


@dataclass(frozen=True)
class Ran:
    """difference: between pass and layers, of the largest value; or, where the pass failed, how.
    returns_tuple: whether its layers do."""

    difference: float | str
    returns_tuple: bool


def run_twin(twin: Any, decoder: Any, mixin: type) -> Ran:
    """Raises what the twin's own modules raise where they cannot run on their device."""
    stock, weight = type(twin), next(twin.parameters())
    device, dtype = weight.device, weight.dtype
    pruned, worst, watch = derive(mixin, stock), 0.0, _Watch(twin)
    for number, sizes in enumerate(_RUNS if dtype == torch.float32 else _RUNS[:1]):
        _fill_with_noise(twin, sizes)
        places = None if number < _EARLY else later_places(decoder, _LENGTH)
        count = 2 if places is None else len(places)
        rows = torch.randn(count, _LENGTH, twin.config.hidden_size, generator=generator(1))
        given = {"inputs_embeds": rows.to(device, dtype), "use_cache": False}
        if places is not None:
            given["position_ids"] = places.to(device)
        expected = watch.stock(twin, given)
        visual = torch.zeros(count, _LENGTH, dtype=torch.bool)
        visual[:, _TEXT_BEFORE:-_TEXT_AFTER] = True
        put(twin, pruned)
        twin.set_plan(PruningPlan.dense(twin.config))
        twin._yopo_layer_plans = slicing(twin._yopo_layer_plans, twin.config)
        twin._yopo_known = Functions(twin)
        try:
            found = watch.pruned(twin, given, visual)
        except Exception as error:  # the layers lack what the pass calls
            words = f"the pruned pass fails on them ({type(error).__name__}: {error})"
            return Ran(words, False)
        finally:
            twin.set_plan(None)
            put(twin, stock)
        worst = max(worst, watch.worst, difference(found, expected, expected))
    return Ran(worst, watch.returns_tuple)


class _Watch:
    """Takes down what the twin's layers are given by its own forward, and gives them the same in a
    pruned pass, so that differences do not grow from layer to layer."""

    def __init__(self, twin: Any) -> None:
        self._rows: list[Tensor] = []
        self._at, self._is_stock = 0, True
        self.worst, self.returns_tuple = 0.0, False
        for layer in twin.layers:
            layer.register_forward_pre_hook(self._before, with_kwargs=True)
        twin.layers[0].register_forward_hook(self._after)

    def stock(self, twin: Any, given: Mapping[str, Any]) -> Tensor:
        self._rows, self._is_stock = [], True
        return twin(**given)[0]

    def pruned(self, twin: Any, given: Mapping[str, Any], visual: Tensor) -> Tensor:
        self._at, self._is_stock, self.worst = 0, False, 0.0
        grids = [[_GRID]] * len(visual)
        return twin(**given, visual_mask=visual, visual_grids=grids)[0]

    def _before(self, layer: Any, args: Any, named: dict[str, Any]) -> Any:
        rows = args[0] if args else named["hidden_states"]
        if self._is_stock:
            self._rows.append(rows)
            return None
        expected = self._rows[self._at]
        added = expected - self._rows[self._at - 1] if self._at else expected
        self._at += 1
        index = named["pruned"].shared.index.rows
        expected = expected.flatten(0, 1)[index]
        self.worst = max(self.worst, difference(rows, expected, added))
        return (expected,), named

    def _after(self, layer: Any, args: Any, out: Any) -> None:
        if self._is_stock:
            self.returns_tuple = isinstance(out, tuple)


def slicing(plans: LayerPlans, config: Any) -> LayerPlans:
    """A plan that prunes nothing, but has the FFN sliced all the same: after its last neuron."""
    size = config.intermediate_size
    return replace(plans, plans=[replace(plan, neurons=size) for plan in plans.plans])


def build_twin(decoder: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A twin as its class builds it, of its stock class."""
    small = _shrunk(decoder.config)
    # A user's attention is tried as it is. In place of kernels of transformers' own, which want a
    # GPU and half precision (flash, flex), stands what they must equal.
    attention = attention_function(decoder)
    known = attention is None or is_plain(attention)
    if known and small._attn_implementation not in ("sdpa", "eager"):
        small._attn_implementation = "eager"
    with device:
        twin = original_of(type(decoder))(small)
    if any(parameter.is_meta for parameter in twin.parameters()):
        twin = twin.to_empty(device=device)
    return twin.to(dtype).eval().requires_grad_(False)


def _shrunk(config: Any) -> Any:
    """The config of the twin: all layers, few heads of the true size."""
    small = copy.deepcopy(config)
    heads, kv_heads, head_dim = head_sizes(config)
    few_kv = 2 if kv_heads > 1 else 1
    few = few_kv * min(heads // kv_heads, 2)
    small.num_attention_heads, small.num_key_value_heads = few, few_kv
    # Where the config has no head_dim, models divide.
    small.hidden_size = few * head_dim
    small.intermediate_size = _NEURONS
    small.vocab_size, small.pad_token_id = 8, 0
    for name in ("yopo", *RELEASED_FIELDS, "quantization_config"):
        vars(small).pop(name, None)
    return small


def sizes_of(config: Any) -> list[int]:
    """Sizes that a layer's attributes may name: in the same order for a decoder and its twin."""
    heads, kv_heads, head_dim = head_sizes(config)
    both = heads + 2 * kv_heads
    sizes = [config.hidden_size, config.intermediate_size, heads, kv_heads, heads // kv_heads]
    return [*sizes, heads * head_dim, kv_heads * head_dim, both * head_dim]


def later_places(decoder: Any, length: int) -> Tensor | None:
    """Positions (B, length) about each number in the config, which something may depend on, and
    about the longest that it allows; None where there are none, or rotary tables end with the row.
    """
    end = getattr(decoder.config, "max_position_embeddings", None) or 0
    if end <= length or not takes_any_position(decoder):
        return None
    named = {64, 1024, 16384, *_numbers_in(decoder.config.to_dict())}
    starts = {n - length // 2 for n in named if length < n < end} | {end - length}
    return torch.tensor(sorted(starts))[:, None] + torch.arange(length)


def _numbers_in(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers_in(inner)
    elif isinstance(value, int | float) and value == value and abs(value) < 1e9:
        yield int(value)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fill_with_noise(twin: Any, sizes: Mapping[str, float]) -> None:
    """Weights under which attention is neither flat nor one-hot, but for `sizes` of projections."""
    noises = generator(0)
    heads, kv_heads, head_dim = head_sizes(twin.config)
    fused = {
        "qkv": {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim},
        "gate_up": {"gate": _NEURONS, "up": _NEURONS},
    }
    for name, parameter in twin.named_parameters():
        noise = torch.randn(parameter.shape, generator=noises)
        if parameter.dim() > 1:
            noise = noise / parameter.shape[-1] ** 0.5
        else:
            noise = (1.0 if "norm" in name and "bias" not in name else 0.0) + 0.3 * noise
        for part in name.split("."):
            kind = part.removesuffix("_proj")
            if kind in fused:
                each = [torch.full((n,), sizes.get(k, 1.0)) for k, n in fused[kind].items()]
                noise = (noise.T * torch.cat(each)).T
            elif part != kind:
                noise = noise * sizes.get(kind, 1.0)
        parameter.data = noise.to(parameter)


def difference(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """How much they differ, of the largest value in `scale`."""
    worst = float((found - expected).abs().max() / scale.abs().max().clamp(min=1e-30))
    return worst if isfinite(worst) else inf


@contextmanager
def undisturbed() -> Iterator[None]:
    """Nothing of the caller's reaches a try, and it changes nothing of the caller's."""
    default = torch.get_default_dtype()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
