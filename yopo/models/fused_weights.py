"""Fused weights: lays weights that a pass multiplies together side by side in memory (q, k, v;
gate, up), so that one product does for them, and finds out before each pass whether they still lie
so and nobody watches.

The model's own parameters stay what they are, each in its place, shape and order: they are slices
of what lies together. So whatever reads, writes, saves or adapts them does not notice, and stock's
own forward computes with the same bits. A weight that was moved (by model.to, say) is laid with the
others again. The arithmetic is engine/fused.py's.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat
from operator import eq, is_
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yopo.engine.forward import OBSERVER
from yopo.engine.fused import FusedLayer, Product, RMSNorm
from yopo.engine.weights import HOOKS, activation, is_elementwise, is_plain, is_watched
from yopo.models.exchange import original_of
from yopo.models.layers import PrunedLayer
from yopo.plan.config_fields import head_sizes
from yopo.versions import has_rms_norm, is_any_module_hooked

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NORMS, _EPS = ("input_layernorm", "post_attention_layernorm"), "variance_epsilon"
_FUSED = "_yopo_laid"  # of a layer, and of a decoder all of whose layers have one: its _Held
_LAYING = threading.Lock()


def unfuse_decoder(decoder: Any) -> None:
    for name in ("yopo_fused", "_yopo_graphs"):
        vars(decoder).pop(name, None)
    for parameter, at in forget(decoder):
        if parameter.data_ptr() == at:  # not moved since
            with _as_made(parameter):
                parameter.data = parameter.data.clone()


@contextmanager
def _as_made(parameter: nn.Parameter) -> Iterator[None]:
    """In inference mode where the parameter was made there, and only there, whoever asks: what it
    is given must be of its kind, as autograd treats the kinds apart."""
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        yield


def forget(decoder: Any) -> list[tuple[nn.Parameter, int]]:
    """Lets go of what lies together: no memory is held but by the parameters. Those are given back,
    with the places that they had."""
    vars(decoder).pop(_FUSED, None)
    if decoder._yopo_graphs is not None:
        decoder._yopo_graphs.clear()
    held = [vars(module).pop(_FUSED, None) for module in decoder.layers.modules()]
    return [laid for one in held if one is not None for laid in one.laid]


def forget_moved(decoder: Any) -> None:
    """The same where a weight lies elsewhere by now: an engine that took it in parts is to have
    given up the whole."""
    held = [vars(module).get(_FUSED) for module in decoder.layers.modules()]
    if any(one is not None and not one.conditions.hold() for one in held):
        forget(decoder)


def fused_layers(decoder: Any, rows: Tensor) -> list[FusedLayer | None] | None:
    """Each layer's weights for a pass over `rows`; None in place of those, or of all, that are to
    be read live."""
    if not decoder.yopo_fused or torch.is_grad_enabled() or is_any_module_hooked():
        return None
    if OBSERVER.get() is not None:  # who looks on may have hooks on modules, which are not called
        return None
    if torch.is_autocast_enabled(rows.device.type):
        return None
    if torch._C._are_functorch_transforms_active():  # tensors without memory of their own
        return None
    layers = tuple(decoder.layers)
    whole = vars(decoder).get(_FUSED)
    if whole is None or whole.layers != layers or not whole.conditions.hold():
        each = [_held_by(decoder, layer) for layer in layers]
        if None in each:
            vars(decoder).pop(_FUSED, None)
            return [held and held.weights[0] for held in each]
        conditions = _Conditions.together([held.conditions for held in each])
        weights = [held.weights[0] for held in each]
        whole = vars(decoder)[_FUSED] = _Held(weights, (), conditions, layers)
    return whole.weights if whole.weights[0].qkv.weight.dtype == rows.dtype else None


def lay_all(decoder: Any) -> None:
    """Lays together what can be, of a decoder whose passes are to go by fused weights."""
    for layer in decoder.layers:
        _held_by(decoder, layer)


def _held_by(decoder: Any, layer: Any) -> _Held | None:
    """What a layer has laid together, again where its weights were moved or it was changed. Says
    once why one stays live."""
    held = vars(layer).get(_FUSED)
    if held is not None and held.conditions.hold():
        return held
    vars(layer).pop(_FUSED, None)
    why = "the model is in training mode" if decoder.training else why_live(decoder, layer)
    if why is None:
        return lay(layer)
    said = vars(decoder).setdefault("_yopo_said", set())
    if why not in said:
        said.add(why)
        warnings.warn(f"weights of a layer are not fused, but read live: {why}", stacklevel=6)
    return None


@dataclass(frozen=True)
class _Conditions:
    """What must be as it was when weights were laid together. Asked at every pass, so it must cost
    next to nothing.

    children: dicts of modules, and what is in them. weights: dicts of parameters, their names,
    where their memory is, and whether it is in order. settings: dicts, names and values.
    modules: and their classes. forwards: of classes. hooks: dicts that are empty while nobody looks
    on. attributes: of modules; a forward of their own is not among them.
    """

    children: tuple[list[dict[str, Any]], list[tuple[Any, ...]]]
    weights: tuple[list[dict[str, Any]], list[str], list[int], list[bool]]
    settings: tuple[list[dict[str, Any]], list[str], list[Any]]
    modules: tuple[list[nn.Module], list[type]]
    forwards: dict[type, Any]
    hooks: list[dict[int, Any]]
    attributes: list[dict[str, Any]]

    def hold(self) -> bool:
        holders, inside = self.children
        holding, names, at, in_order = self.weights
        where, settings, values = self.settings
        modules, classes = self.modules
        try:
            tensors = list(map(dict.__getitem__, holding, names))
            return (
                not any(self.hooks)
                and not any(map(dict.__contains__, self.attributes, repeat("forward")))
                and all(map(eq, map(tuple, map(dict.values, holders)), inside))
                and all(map(is_, map(type, modules), classes))
                and all(map(is_, map(dict.get, where, settings), values))
                and all(map(is_, map(type, tensors), repeat(nn.Parameter)))
                and all(map(eq, map(Tensor.data_ptr, tensors), at))
                and all(map(eq, map(Tensor.is_contiguous, tensors), in_order))
                and all(cls.forward is forward for cls, forward in self.forwards.items())
            )
        except (KeyError, TypeError):  # a weight was taken out
            return False

    @classmethod
    def together(cls, each: Sequence[_Conditions]) -> _Conditions:
        def chained(lists: Iterable[list[Any]]) -> list[Any]:
            return list(chain.from_iterable(lists))

        def columns(tables: Iterable[tuple[list[Any], ...]]) -> Any:
            return tuple(map(chained, zip(*tables, strict=True)))

        return cls(
            children=columns(one.children for one in each),
            weights=columns(one.weights for one in each),
            settings=columns(one.settings for one in each),
            modules=columns(one.modules for one in each),
            forwards={cls: forward for one in each for cls, forward in one.forwards.items()},
            hooks=chained(one.hooks for one in each),
            attributes=chained(one.attributes for one in each),
        )


@dataclass(frozen=True)
class _Held:
    """Fused weights: of a layer, or of each of a decoder's `layers`. laid: the parameters that lie
    together, and where. A copy of a model, or one from a pickle, has None in its place."""

    weights: Sequence[FusedLayer]
    laid: tuple[tuple[nn.Parameter, int], ...]
    conditions: _Conditions
    layers: tuple[nn.Module, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


REMEDY = (
    "Keep it live (YOPO_FUSE=0; fuse=False where it is loaded), or take that off before yopo.fuse"
)


def why_live(decoder: Any, layer: nn.Module) -> str | None:
    """Why a layer's weights cannot be fused; None: they can."""
    if not has_rms_norm():
        return "this torch is older than 2.4, and has no rms_norm"
    if not isinstance(layer, PrunedLayer):
        return f"it is in a {type(layer).__name__}"
    if decoder.yopo_part.count > 1:
        return "processes share its heads (tensor parallelism)"
    attn, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    for module in (layer, attn, mlp):
        if not original_of(type(module)).__module__.startswith("transformers."):
            return f"{type(module).__name__} is not transformers' own"
    for name, module in _named_parts(layer):
        if "norm" in name and not _is_rms_norm(type(module)):
            return f"its {name} is a {type(module).__name__}"
        if name.endswith("_proj") and type(module) is not nn.Linear:
            return f"its {name} is a {type(module).__name__} (an adapter, or quantised)"
        whose = getattr(type(module).forward, "__module__", None) or ""
        if not whose.startswith(("torch.", "transformers.", "yopo.")):
            return f"the forward of {type(module).__name__} is {whose}'s"
        if is_watched(module):
            return f"its {name} is watched: it has hooks, or a forward of its own"
        if name.endswith("_proj") and not is_plain(module):
            return f"the weights of its {name} are {_odd_kind(module)}"
    if not is_elementwise(activation(mlp)):
        return f"its activation is a {type(activation(mlp)).__name__}"
    return _odd_weights(decoder, layer)


def _odd_kind(linear: nn.Module) -> str:
    """What is to be said of a weight that no plain linear has."""
    kind = type(linear._parameters.get("weight"))
    named = "" if kind is nn.Parameter else f": {kind.__name__}"
    return f"sharded, quantised or not here{named}"


def _odd_weights(decoder: Any, layer: nn.Module) -> str | None:
    weights = [p for _, m in _named_parts(layer) for p in m.parameters(recurse=False)]
    kinds = {(p.dtype, p.device) for p in weights}
    if len(kinds) > 1 or weights[0].dtype not in _FLOATS:
        return (
            f"its weights are of several kinds, or not of floating point: {sorted(map(str, kinds))}"
        )
    if any(p.untyped_storage().nbytes() > p.numel() * p.element_size() for p in weights):
        return "its weights are slices of somebody's larger tensor"
    if any(p.device.type == "cpu" and p.is_shared() for p in weights):
        return "its weights are in memory shared with other processes"
    for group in _groups(layer):
        if len({linear.bias is None for linear in group}) > 1:
            return "some of its projections that belong together have a bias, and some have none"
    heads, kv_heads, head_dim = head_sizes(decoder.config)
    rows = [sum(linear.weight.shape[0] for linear in group) for group in _groups(layer)]
    if rows != [(heads + 2 * kv_heads) * head_dim, 2 * decoder.config.intermediate_size]:
        return f"its projections have {rows} rows, which is not what the config says"
    return None


def shares_weights(decoder: Any) -> bool:
    """Whether two layers have a weight in common."""
    each = [{id(parameter) for parameter in layer.parameters()} for layer in decoder.layers]
    return len(set().union(*each)) < sum(map(len, each))


def _groups(layer: Any) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The projections whose weights belong together: to queries, keys and values; gate and up."""
    attn, mlp = layer._modules["self_attn"]._modules, layer._modules["mlp"]._modules
    qkv = ["qkv_proj"] if "qkv_proj" in attn else ["q_proj", "k_proj", "v_proj"]
    gate_up = ["gate_up_proj"] if "gate_up_proj" in mlp else ["gate_proj", "up_proj"]
    return [attn[name] for name in qkv], [mlp[name] for name in gate_up]


def _named_parts(layer: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a fused layer does without."""
    attn, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    yield "self_attn", attn
    yield "mlp", mlp
    for part in (attn, mlp):
        yield from ((n, m) for n, m in part._modules.items() if n.endswith("_proj"))
    act = activation(mlp)
    if isinstance(act, nn.Module):
        yield "activation", act
    for name in _NORMS:
        yield name, layer._modules[name]


@cache
def _is_rms_norm(cls: type) -> bool:
    """Whether a norm of this class is F.rms_norm by its weight and variance_epsilon."""
    if not cls.__module__.startswith("transformers."):
        return False
    x = torch.linspace(-2, 3, 12, device="cpu").view(2, 6) ** 3
    norm = SimpleNamespace(weight=torch.linspace(0.5, 2, 6, device="cpu"), variance_epsilon=0.1)
    try:
        found = cls.forward(norm, x)
    except Exception:  # a norm with other parts
        return False
    return torch.allclose(found, F.rms_norm(x, (6,), norm.weight, 0.1), atol=1e-6)


def lay(layer: Any) -> _Held:
    """Lays a layer's weights together, unless another thread has just done it."""
    with _LAYING, _as_made(layer.self_attn.o_proj.weight):
        held = vars(layer).get(_FUSED)
        if held is not None and held.conditions.hold():
            return held
        (qkv, qkv_laid), (gate_up, gate_up_laid) = map(_side_by_side, _groups(layer))
        parts = dict(_named_parts(layer))
        norms = [RMSNorm(parts[n].weight.data, parts[n].variance_epsilon) for n in _NORMS]
        o, down = (Product(*_data(parts[name])) for name in ("o_proj", "down_proj"))
        act = parts.get("activation", F.silu)
        weights = FusedLayer(
            before_attention=norms[0],
            qkv=qkv,
            o=o,
            before_ffn=norms[1],
            gate_up=gate_up,
            down=down,
            act=F.silu if type(act) is nn.SiLU else act,
        )
        laid = [(each, each.data_ptr()) for each in (*qkv_laid, *gate_up_laid)]
        held = _Held([weights], tuple(laid), _conditions(layer))
        vars(layer)[_FUSED] = held
        return held


def _conditions(layer: Any) -> _Conditions:
    modules = [module for _, module in _named_parts(layer)]
    holders = [module for module in (layer, *modules) if module._modules]
    named = [(m._parameters, *pair) for m in modules for pair in m._parameters.items()]
    weights = [
        (holding, name, parameter.data_ptr(), parameter.is_contiguous())
        for holding, name, parameter in named
        if parameter is not None
    ]
    settings = [each for each in named if each[2] is None]  # a bias that is not there
    for norm in (vars(layer._modules[name]) for name in _NORMS):
        settings.append((norm, _EPS, norm[_EPS]))
    return _Conditions(
        children=(
            [module._modules for module in holders],
            [tuple(module._modules.values()) for module in holders],
        ),
        weights=_in_columns(weights),
        settings=_in_columns(settings),
        modules=(modules, list(map(type, modules))),
        forwards={type(module): type(module).forward for module in modules},
        hooks=[vars(module)[name] for module in modules for name in HOOKS],
        attributes=list(map(vars, modules)),
    )


def _in_columns(rows: list[tuple[Any, ...]]) -> Any:
    return tuple(map(list, zip(*rows, strict=True)))


def _data(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight.data, None if linear.bias is None else linear.bias.data


def _side_by_side(linears: Sequence[nn.Linear]) -> tuple[Product, tuple[nn.Parameter, ...]]:
    """One product for several linears of one input, whose parameters become slices of its own."""
    if len(linears) == 1:
        return Product(*_data(linears[0])), ()
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    whole = _laid(weights)
    return Product(whole, None if biases[0] is None else _laid(biases)), (
        *weights,
        *(bias for bias in biases if bias is not None),
    )


def _laid(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Parameters one after the other, in memory that is theirs from now on."""
    whole = torch.cat([parameter.data for parameter in parameters])
    slices = whole.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, slices, strict=True):
        # By DLPack each slice gets a storage of its own over the same memory: who saves or shares
        # tensors by their storages takes them for what they are, weights apart.
        parameter.data = torch.from_dlpack(part)
    return whole
