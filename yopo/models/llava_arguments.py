"""Has the original LLaVA's own methods, which are of 2023, take what the generate() of today's
transformers passes to every forward, plan or no plan. Nothing else of a call is touched.

LLaVA's `forward` lacks `cache_position` (passed by 4.38 to 5.3) and `cache` (from 5.24 on, the new
name of `past_key_values`); alone it fails there with a TypeError.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

from yopo.versions import CACHE_FIELD, passed_to_every_forward

Method = Callable[..., Any]

ADAPTED = ("forward", "prepare_inputs_for_generation")
_OLD_CACHE = "past_key_values"
_WRAPPED: WeakSet[Method] = WeakSet()


def adapt(owner: type) -> None:
    """Wraps `forward` and `prepare_inputs_for_generation`, if `owner` itself defines them, on a
    transformers that passes what LLaVA's lack; each once. Raises TypeError as exchange_method."""
    if not passed_to_every_forward():
        return
    for name, wrap in zip(ADAPTED, (_forward, _inputs), strict=True):
        found = vars(owner).get(name)
        if inspect.isfunction(found) and not any(method in _WRAPPED for method in chain(found)):
            wrapper = wrap(found)
            _WRAPPED.add(wrapper)
            exchange_method(owner, name, wrapper)


def exchange_method(owner: type, name: str, method: Method) -> None:
    """Raises TypeError where `owner` does not let it be set: a metaclass may have its own say."""
    cause = None
    try:
        setattr(owner, name, method)
    except Exception as error:  # whatever that code raises
        cause = error
    if vars(owner).get(name) is not method:
        raise TypeError(
            f"{owner.__name__}.{name} cannot be set (its class is a {type(owner).__name__}), and a "
            "plan needs it wrapped, to learn where the image tokens are: let the class be changed, "
            "or load this model without a plan"
        ) from cause


def chain(method: Any) -> Iterator[Any]:
    """A function and those that it says it wraps."""
    while method is not None:
        yield method
        method = getattr(method, "__wrapped__", None)


def _forward(original: Method) -> Method:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **_fitted(kwargs, original))

    forward.__signature__ = _with_cache(inspect.signature(original))  # generate() looks there
    return forward


def _inputs(original: Method) -> Method:
    @functools.wraps(original)
    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Fitted to the forward that this model has now, a subclass's or one put on it since.
        return _fitted(original(self, *args, **_fitted(kwargs, original)), self.forward)

    return prepare_inputs_for_generation


def _fitted(arguments: dict[str, Any], method: Method) -> dict[str, Any]:
    """The keyword arguments as `method` takes them."""
    innermost = inspect.unwrap(getattr(method, "__func__", method))
    code = getattr(innermost, "__code__", None)
    if code is None:
        return arguments
    taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    fitted = dict(arguments)
    if CACHE_FIELD in fitted and CACHE_FIELD not in taken and _OLD_CACHE in taken:
        cache = fitted.pop(CACHE_FIELD)
        if fitted.get(_OLD_CACHE) is None:
            fitted[_OLD_CACHE] = cache
    if "cache_position" not in taken and not code.co_flags & inspect.CO_VARKEYWORDS:
        fitted.pop("cache_position", None)
    return fitted


def _with_cache(signature: inspect.Signature) -> inspect.Signature:
    """The signature, and the cache by its new name, where it knows the old one only."""
    parameters = dict(signature.parameters)
    if CACHE_FIELD in parameters or _OLD_CACHE not in parameters:
        return signature
    added = inspect.Parameter(CACHE_FIELD, inspect.Parameter.KEYWORD_ONLY, default=None)
    order = sorted([*parameters.values(), added], key=lambda parameter: parameter.kind)
    return signature.replace(parameters=order)
