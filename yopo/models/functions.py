"""The functions that a decoder's layers compute by: forwards of its classes, what these call by
name in their own modules and classes, and registered attention. Anybody may replace one at any
time; here is told which they are and whether they are still the same. Calls none of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from yopo.models.exchange import original_of
from yopo.models.layers import layer_in, settings, stock_forward

# Packages whose forwards and attention functions do nothing but compute what their names say.
_PLAIN = {"transformers", "liger_kernel", "torch", "accelerate", "kernels", "yopo"}
# Where a function is looked up, and by which name; under an id of the first.
_Places = dict[tuple[int, str], tuple[Mapping[str, Any], str]]


class Functions:
    """Where the functions are looked up, and what was found there.

    A copy of a model, or one from a pickle, has None in its place: it may be used elsewhere."""

    def __init__(self, decoder: Any) -> None:
        self._implementation = decoder.config._attn_implementation
        classes = {original_of(type(decoder)): None}
        for layer in map(layer_in, decoder.layers):
            parts = (layer, layer.self_attn, layer.mlp)
            classes |= dict.fromkeys(original_of(type(part)) for part in parts)
        places: _Places = {}
        for cls in classes:
            owner = _owner(cls, "forward") or cls
            _reach(places, cls, owner, "forward", None, self._implementation)
        self._places = [(space.get, name) for space, name in places.values()]
        self.found = self._look()
        self.settle()

    def settle(self) -> None:
        """What was set on layers' parts so far is known."""
        self._settings = settings()

    def changed(self, decoder: Any) -> bool:
        """Whether one of them was replaced since, another attention was chosen, or something was
        set on a layer's part. Asked at every forward, so it must cost next to nothing."""
        if self._settings != settings():
            return True
        if decoder.config._attn_implementation != self._implementation:
            return True
        return self._look() != self.found

    def _look(self) -> list[Any]:
        return [get(name) for get, name in self._places]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _reach(
    places: _Places, cls: type, owner: Any, name: str, home: Any, implementation: str
) -> None:
    """Adds the place `name` of `owner`, a class or what has names, and those that the function
    there looks into; of functions of another module than `home` (masks, caches) the place alone.
    """
    space = vars(owner) if isinstance(owner, type) else owner
    value = space.get(name)
    if (id(owner), name) in places or not (value is None or callable(value)):
        return
    places[id(owner), name] = space, name
    function = value if value is None else inspect.unwrap(value)
    if not isinstance(function, FunctionType) or home not in (None, function.__module__):
        return
    names, home = function.__globals__, function.__module__
    for called in _names_in(function.__code__):
        if isinstance(registry := names.get(called), Mapping):
            for mapping in _mappings(registry):
                _reach(places, cls, mapping, implementation, None, implementation)
        elif called in names:
            _reach(places, cls, names, called, home, implementation)
        if (base := _owner(cls, called)) is not None:
            _reach(places, cls, base, called, home, implementation)


def _owner(cls: type, name: str) -> type | None:
    """The class, of those that `cls` goes back to, that has a `name` by itself; none of torch's."""
    bases = (base for base in cls.__mro__ if not base.__module__.startswith("torch."))
    return next((base for base in bases if name in vars(base)), None)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


def _mappings(registry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a registry looks into: since 4.50 or so, one of its own and one of all."""
    names = ("_local_mapping", "_global_mapping")
    return [getattr(registry, name) for name in names if hasattr(registry, name)] or [registry]


def attention_function(decoder: Any) -> Callable[..., Any] | None:
    """What an unpruned layer calls for attention; None before 4.48, where each kind is a class of
    its own."""
    names = inspect.unwrap(stock_forward(layer_in(decoder.layers[0]).self_attn)).__globals__
    registry = names.get("ALL_ATTENTION_FUNCTIONS", {})
    own = names.get("eager_attention_forward")
    return registry.get(decoder.config._attn_implementation, own)


def is_plain(function: Any) -> bool:
    """Whether a function or class is of a package that only computes what its names say."""
    return str(getattr(function, "__module__", "")).partition(".")[0] in _PLAIN
