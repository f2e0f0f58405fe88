"""Whether the engine computes what a decoder's layers compute: found out, not guessed from names.

A twin of the decoder, of the same classes and settings but a few small layers with random weights,
runs a few rows by its own forward and by the pruned pass under a plan that prunes nothing. Where
the live modules are not of the twin's classes (replaced after building), the live layer itself is
compared. What differs is refused by name.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from yopo.engine.forward import Run, prepare, run
from yopo.engine.layer_plan import LayerPlans
from yopo.engine.layout import VisualLayout
from yopo.engine.visual_cache import VisualCache
from yopo.models.exchange import derive, original_of, parameters_of, put
from yopo.models.layers import PrunedLayer, call_layer, layer_in, stock_forward
from yopo.plan.pruning_plan import RELEASED_FIELDS, PruningPlan
from yopo.versions import newer_than_tested, rope

TOLERANCE = 1e-3  # of the largest value, in float32; other arithmetic differs by 0.01 and more
_FIRST_LAYERS = 4  # some decoders treat every second or fourth layer otherwise
_GRID = (2, 3)
_TEXT_BEFORE, _TEXT_AFTER = 3, 4


@dataclass(frozen=True)
class _Verdict:
    """What came of a twin.

    difference: in words; None: none. failed: why it could not be run; None: it could.
    returns_tuple: whether its layers do. classes: of what its layers are made.
    """

    difference: str | None
    failed: str | None
    returns_tuple: bool
    classes: frozenset[tuple[Any, ...]]


_VERDICTS: dict[Any, _Verdict] = {}


def probe(decoder: Any, mixin: type) -> None:
    """Marks the decoder, a stock class with `mixin`, as probed.

    Raises TypeError, naming its class, where the pruned pass does not compute what its layers do,
    or that cannot be found out."""
    stock = original_of(type(decoder))
    layers = {classes_of(layer): layer for layer in map(layer_in, decoder.layers)}
    key = (stock, _settings(decoder.config), frozenset(layers))
    if key not in _VERDICTS:
        _VERDICTS[key] = _verdict(stock, decoder, mixin)
    verdict = _VERDICTS[key]
    if verdict.difference is not None:
        raise _not_computed(stock, verdict.difference)
    for classes, layer in layers.items():
        if verdict.failed is not None or classes not in verdict.classes:
            _compare_live(decoder, layer, verdict.failed)
        type(layer).yopo_returns_tuple = verdict.returns_tuple
    if (version := newer_than_tested()) is not None:
        warnings.warn(
            f"transformers {version} is newer than any that yopo was tested with; the layers of "
            f"this {stock.__name__} were probed and compute what yopo computes: going on",
            stacklevel=2,
        )
    decoder.yopo_probed = True


def classes_of(layer: nn.Module) -> tuple[Any, ...]:
    """What tells kinds of layers apart: classes and forwards of the layer, its attention and its
    FFN, and the names of what the layer is made of."""
    stocks = [original_of(type(part)) for part in (layer, layer.self_attn, layer.mlp)]
    return (*stocks, *(stock.forward for stock in stocks), *sorted(layer._modules))


def _not_computed(stock: type, difference: str) -> TypeError:
    return TypeError(
        f"yopo does not compute what the layers of {stock.__name__} do: {difference}. This model "
        "cannot be pruned; see docs/adding-a-family.md"
    )


def _settings(config: Any) -> str:
    implementation = getattr(config, "_attn_implementation", None)
    return f"{config.to_json_string(use_diff=False)} {implementation}"


def _verdict(stock: type, decoder: Any, mixin: type) -> _Verdict:
    """Of a twin on the CPU; where it cannot run there (kernels of a device), on the decoder's."""
    devices = [torch.device("cpu")]
    devices += [p.device for p in decoder.parameters() if p.device.type not in ("cpu", "meta")][:1]
    for device in devices:
        try:
            with _undisturbed():
                return _run_twin(stock, decoder.config, device, mixin)
        except Exception as error:  # whatever modules raise: then the live ones are asked
            failed = f"{type(error).__name__}: {error}"
    return _Verdict(None, failed, PrunedLayer.yopo_returns_tuple, frozenset())


def _run_twin(stock: type, config: Any, device: torch.device, mixin: type) -> _Verdict:
    twin = _twin_of(stock, config, device)
    visual = torch.zeros(2, _TEXT_BEFORE + _GRID[0] * _GRID[1] + _TEXT_AFTER, dtype=torch.bool)
    visual[:, _TEXT_BEFORE:-_TEXT_AFTER] = True
    returned: list[Any] = []
    hook = twin.layers[0].register_forward_hook(lambda module, args, out: returned.append(out))
    worst = 0.0
    classes = frozenset(classes_of(layer) for layer in twin.layers)
    for scale in (1.0, 8.0):  # the second for what is clipped or capped
        _fill_with_noise(twin, scale)
        rows = torch.randn(*visual.shape, twin.config.hidden_size, generator=_generator(1))
        rows = rows.to(device)
        put(twin, stock)
        expected = twin(inputs_embeds=rows, use_cache=False)[0]
        hook.remove()
        put(twin, derive(mixin, stock))
        twin.set_plan(PruningPlan.dense(twin.config))
        twin._yopo_layer_plans = _slicing(twin._yopo_layer_plans, twin.config)
        twin.yopo_probed = True
        told = {"visual_mask": visual, "visual_grids": [[_GRID]] * len(rows)}
        try:
            found = twin(inputs_embeds=rows, use_cache=False, **told)[0]
        except Exception as error:  # the layers lack what the pass calls
            words = f"the pruned pass fails on them ({type(error).__name__}: {error})"
            return _Verdict(words, None, False, classes)
        twin.set_plan(None)
        worst = max(worst, _difference(found, expected))
    words = f"on random rows the outputs differ by {worst:.2g} of the largest value"
    return _Verdict(
        words if not worst <= TOLERANCE else None, None, isinstance(returned[0], tuple), classes
    )


def _slicing(plans: LayerPlans, config: Any) -> LayerPlans:
    """A plan that prunes nothing, but has the FFN sliced all the same: after its last neuron."""
    size = config.intermediate_size
    return replace(plans, plans=[replace(plan, neurons=size) for plan in plans.plans])


def _twin_of(stock: type, config: Any, device: torch.device) -> Any:
    with device:
        twin = stock(_shrunk(config))
    if any(parameter.is_meta for parameter in twin.parameters()):
        twin = twin.to_empty(device=device)
    return twin.float().eval().requires_grad_(False)


def _shrunk(config: Any) -> Any:
    """The config of the twin: every kind of layer once or twice, few heads of the true size."""
    small = copy.deepcopy(config)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    few_kv = 2 if kv_heads > 1 else 1
    few = few_kv * min(heads // kv_heads, 2)
    small.num_attention_heads, small.num_key_value_heads = few, few_kv
    # Where the config has no head_dim, models divide.
    small.hidden_size = few * head_dim
    small.intermediate_size = 24
    chosen, lists = _kinds_of_layers(config, layers)
    for name in lists:
        setattr(small, name, [getattr(config, name)[i] for i in chosen])
    small.num_hidden_layers = len(chosen)
    small.vocab_size, small.pad_token_id = 8, 0
    for name in ("yopo", *RELEASED_FIELDS, "quantization_config"):
        vars(small).pop(name, None)
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        small._attn_implementation = "sdpa"
    return small


def _kinds_of_layers(config: Any, layers: int) -> tuple[list[int], list[str]]:
    """The first layers, and one of each further kind that the config's lists of a value for each
    layer tell apart; the names of these lists."""
    lists = [
        name
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == layers and "layer" in name
    ]
    seen: dict[tuple[Any, ...], int] = {}
    for index in range(layers):
        seen.setdefault(tuple(str(getattr(config, name)[index]) for name in lists), index)
    return sorted({*range(min(layers, _FIRST_LAYERS)), *seen.values()}), lists


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fill_with_noise(twin: nn.Module, scale: float) -> None:
    """Weights under which attention is neither flat nor one-hot; `scale` times larger queries, keys
    and values."""
    generator = _generator(0)
    for name, parameter in twin.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = (1.0 if "norm" in name and "bias" not in name else 0.0) + 0.3 * noise
            continue
        noise = noise / parameter.shape[-1] ** 0.5
        large = any(part in name for part in ("q_proj", "k_proj", "v_proj", "qkv_proj"))
        parameter.data = noise * (scale if large else 1.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Nothing of the caller's reaches the twin, and the twin changes nothing of the caller's."""
    default = torch.get_default_dtype()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _compare_live(decoder: Any, layer: nn.Module, failed: str | None) -> None:
    """Compares one live layer, put together otherwise than its decoder builds it, by its own
    weights. Raises TypeError where the two differ or it cannot be run."""
    stock = original_of(type(decoder))
    weight = next(layer.parameters())
    made = ", ".join(cls.__name__ for cls in classes_of(layer)[:3])
    if weight.is_meta or type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        why = f" (a small twin of it failed: {failed})" if failed else ""
        raise TypeError(
            f"a layer of this {stock.__name__} is made of {made}, which is not what it builds, and "
            f"its weights are not here to be tried{why}: apply the plan before weights are sharded "
            "or offloaded"
        )
    length, half = 7, weight.dtype in (torch.float16, torch.bfloat16)
    rows = torch.randn(1, length, decoder.config.hidden_size, generator=_generator(1))
    rows = rows.to(weight)
    places = torch.arange(length, device=rows.device)[None]
    with _undisturbed():
        cos, sin = rope(decoder, rows, places, length)
        try:
            expected = _own_output(layer, rows, places, (cos, sin))
            found = _pruned_output(decoder, layer, rows, (cos, sin))
        except Exception as error:  # whatever somebody's modules raise
            words = f"one that is made of {made} could not be tried: {error}"
            raise _not_computed(stock, words) from error
    differs = _difference(found - rows, expected - rows)
    if not differs <= (0.05 if half else TOLERANCE):
        words = f"one that is made of {made} gives outputs that differ by {differs:.2g}"
        raise _not_computed(stock, words)


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
    plans = _slicing(LayerPlans.build(config, plan), config)
    valid = torch.ones(rows.shape[:2], dtype=torch.bool)
    visual = torch.zeros_like(valid)
    visual[:, 2:6] = True
    cache = VisualCache.adopt(None, plan, 1, valid[:, :0], plans.kv_heads())
    index = prepare(VisualLayout.from_mask(visual), valid, cache, plan)
    layers = nn.ModuleList([layer])
    return run(layers, plans, index, rows, *angles, cache, Run(call_layer, keep_cache=False))
