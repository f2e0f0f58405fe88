"""Exchanges the classes of live modules: a stock class for one of ours with a mixin before it, and
back. No weight, hook or attribute is touched. Nothing here knows what the mixins do."""

from __future__ import annotations

import inspect
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn

_MADE_HERE = "_yopo_made_here"
_MADE: dict[tuple[type, type], type] = {}  # (mixin, stock class) → the class made of them


class Exchanged:
    """Base of every mixin: a module of a class made here is pickled and copied by what its class
    was made of, since the class goes by its stock's name."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        if _MADE_HERE not in vars(cls):
            super().__init_subclass__(**keywords)
            return
        # A class made here is no new class to the user's own, which may want keywords, or keep a
        # list; to transformers' it is: from 5.24 on they put gradient checkpointing around forward.
        for base in cls.__mro__:
            if base.__module__.startswith("transformers.") and "__init_subclass__" in vars(base):
                vars(base)["__init_subclass__"].__get__(None, cls)()
                return

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        made_of = parts_of(cls)
        if made_of is None:  # a class of the user's own, to be found by its name
            return super().__reduce_ex__(protocol)
        # By what its class says of itself (from 2 on object's own asks __getstate__), but for its
        # stock, which can be found by its name.
        function, arguments, *rest = super().__reduce_ex__(max(protocol, 2))
        function, *arguments = (made_of[1] if x is cls else x for x in (function, *arguments))
        return _remake, (*made_of, function, *arguments), *rest


def _remake(mixin: type, stock: type, function: Callable[..., Any], *arguments: Any) -> Any:
    made = function(*arguments)
    if type(made) is stock:
        put(made, derive(mixin, stock))
    return made


def derive(mixin: type, stock: type) -> type:
    """The class with `mixin` before `stock`, under the name of `stock`; the same one each time, and
    `stock` itself where it has the mixin already."""
    if issubclass(stock, mixin):
        return stock
    key = (mixin, stock)
    if key not in _MADE:
        names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
        extra = getattr(mixin, "_yopo_attributes", None)
        attributes = {_MADE_HERE: True} | names | ({} if extra is None else extra(stock))
        # Past a metaclass of the user's own, which may want keywords or keep a list of classes; but
        # not past ABCMeta, whose isinstance looks up what it noted of each class.
        metaclass = type(stock)
        maker = ABCMeta if issubclass(metaclass, ABCMeta) else type
        _MADE[key] = maker.__new__(metaclass, stock.__name__, (mixin, stock), attributes)
    return _MADE[key]


def parts_of(cls: type) -> tuple[type, type] | None:
    """The mixin and the stock class that `cls` was made of here; None for any other class."""
    return next((parts for parts, made in _MADE.items() if made is cls), None)


def original_of(cls: type) -> type:
    """The stock class that `cls` goes back to, also where torch exchanged the class of a module for
    one of its own in front (FSDP2's fully_shard), of ours or of stock's."""
    made = next((base for base in cls.__mro__ if parts_of(base) is not None), cls)
    whose = (base for base in stock_of(made).__mro__ if not base.__module__.startswith("torch."))
    return next((base for base in whose if issubclass(base, nn.Module)), cls)


def stock_of(cls: type) -> type:
    """The class that one of ours was made of, and any other class itself."""
    parts = parts_of(cls)
    return cls if parts is None else stock_of(parts[1])


def put(module: nn.Module, cls: type) -> None:
    """Makes a live module one of `cls`, whatever else goes by its class or its bound methods."""
    if module.__class__ is cls:
        return
    attributes = vars(module)
    if is_the_class_s(module, attributes.get("forward")):
        del attributes["forward"]  # it would go on running that of the class before
    module.__class__ = cls
    if "_old_forward" in attributes:  # accelerate's hooks call the bound method that they found
        module._old_forward = cls.forward.__get__(module)
    # Since 4.54 what a model can record (hidden states) is looked up by the name of the class that
    # it was constructed as.
    for name in ("transformers.utils.output_capturing", "transformers.utils.generic"):
        registry = getattr(sys.modules.get(name), "_CAN_RECORD_REGISTRY", None)
        if registry is not None:
            dict.__setitem__(registry, str(cls), getattr(cls, "_can_record_outputs", None))


def is_the_class_s(module: nn.Module, forward: Any) -> bool:
    """Whether `forward` is the bound method of a class of the module: transformers 4.54 to 5.1
    leave one on layers whose outputs they recorded."""
    if getattr(forward, "__self__", None) is not module:
        return False
    return any(vars(base).get("forward") is forward.__func__ for base in type(module).__mro__)


def stock_method(module: Any, mixin: type, name: str = "forward") -> Callable[..., Any]:
    """The bound method that the one of `mixin` stands before; of a module that has its stock class
    back, while somebody kept a method of ours, that class's own."""
    if isinstance(module, mixin):
        return getattr(super(mixin, module), name)
    cls = type(module)
    return next(vars(base)[name] for base in cls.__mro__ if name in vars(base)).__get__(module, cls)


@cache
def parameters_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters after self."""
    return tuple(inspect.signature(function).parameters)[1:]


_NAMES: dict[tuple[type, str], tuple[str, ...]] = {}


def stock_parameters(module: Any, name: str = "forward") -> tuple[str, ...]:
    """Names of the parameters of a module's method before our mixins: in order those that may be
    given by place, then the others. Where it takes any (*args), the further ones are those of the
    class that it derives from."""
    cls = type(module)
    if (cls, name) in _NAMES:
        return _NAMES[cls, name]
    by_place: list[str] = []
    others: list[str] = []
    for base in cls.__mro__:
        if name not in vars(base) or issubclass(base, Exchanged):
            continue
        try:  # bound, so that it does not matter what kind of a method it is
            told = inspect.signature(vars(base)[name].__get__(module, cls)).parameters.values()
        except (TypeError, ValueError):  # an object that says nothing of what it takes
            continue
        placed = [p.name for p in told if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        by_place += placed[len(by_place) :]
        others += [p.name for p in told if p.kind is p.KEYWORD_ONLY]
        if all(p.kind is not p.VAR_POSITIONAL for p in told):
            break
    more = (other for other in others if other not in by_place)
    _NAMES[cls, name] = (*by_place, *dict.fromkeys(more))
    return _NAMES[cls, name]


def named(
    module: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str = "forward"
) -> dict[str, Any]:
    """The arguments that a module's method was called with, by name.

    Raises ValueError for more than its class has names for."""
    if not args:
        return dict(kwargs)
    names = stock_parameters(module, name)
    if len(args) > len(names):
        raise ValueError(
            f"{name} of this {type(module).__name__} was given {len(args)} arguments by their "
            f"place, of which {len(args) - len(names)} have no name: give them by name"
        )
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def with_signature(
    function: FunctionType, like: Callable[..., Any], more: Iterable[inspect.Parameter]
) -> FunctionType:
    """A copy of the method `function` that tells the signature of `like`, and the parameters
    `more`: generate(), Trainer and others look names up there."""
    try:
        parameters = list(inspect.signature(like).parameters.values())
    except (TypeError, ValueError):  # an object that says nothing of what it takes
        parameters = list(inspect.signature(function).parameters.values())
    end = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
    present = {parameter.name for parameter in parameters}
    added = [parameter for parameter in more if parameter.name not in present]
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    vars(copy).update(vars(function))
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, function.__doc__
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    copy.__signature__ = inspect.Signature(parameters[:end] + added + parameters[end:])
    return copy
