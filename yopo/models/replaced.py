"""Forwards that somebody put on a module itself, in place of its class's: which of them a pruned
pass can live with, and what becomes of these.

Accelerate's call the class's forward. One that takes any argument and was put on after the plan is
a wrapper around ours. Liger's (put on a loaded model) compute what the class computes, by other
kernels: they are set aside, for calls that are stock's. All others are refused.

Which modules a pass finds, and in whose place, is layers.py's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from yopo.models.exchange import is_the_class_s, stock_method

_ASIDE = "_yopo_set_aside"


def replaced_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward on this very module that is not its class's; None: it has none."""
    forward = vars(module).get("forward")
    known = "_old_forward" in vars(module) or is_the_class_s(module, forward)
    return None if known else forward


def refuse_replaced(module: nn.Module) -> None:
    """Sets a forward of Liger's aside. Raises ValueError for any other that was there before the
    plan: it would go on running the unpruned one."""
    replaced = replaced_forward(module)
    if replaced is None:
        return
    if not _is_ligers(replaced):
        raise ValueError(
            f"{_named(module, replaced)}, which would go on running the unpruned one: apply the "
            "plan first, or put the change into a class of your own"
        )
    _put_aside(module)


def settle(module: nn.Module) -> None:
    """The same of one that was put on while the plan was; so is one that the class had before.

    Raises ValueError for one that is neither nor passes its arguments on."""
    forward = vars(module).get("forward")
    if forward is None or "_old_forward" in vars(module):
        return
    if is_the_class_s(module, forward):
        if forward.__func__ is not type(module).forward:
            _put_aside(module)
        return
    if _is_ligers(forward):
        _put_aside(module)
        return
    try:  # of the function itself, not of one that it tells to wrap
        parameters = inspect.signature(forward, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # whether it hands them on shows when it is called
        return
    if not any(p.name == "pruned" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{_named(module, forward)}, which takes no further arguments: a pruned pass calls it "
            "with `pruned=…`. Take **kwargs and hand them on, or remove the plan (yopo.remove)"
        )


def own_forward(module: nn.Module, mixin: type) -> Callable[..., Any]:
    """The forward of a module for calls that are stock's: one that was set aside, else that which
    the `mixin`'s stands before."""
    return vars(module).get(_ASIDE) or stock_method(module, mixin)


def take_back(module: nn.Module) -> None:
    """Puts a forward that was set aside back on the module."""
    if _ASIDE in vars(module):
        module.forward = vars(module).pop(_ASIDE)


def _put_aside(module: nn.Module) -> None:
    object.__setattr__(module, _ASIDE, vars(module).pop("forward"))


def _is_ligers(forward: Callable[..., Any]) -> bool:
    return getattr(forward, "__module__", "").partition(".")[0] == "liger_kernel"


def _named(module: nn.Module, replaced: Callable[..., Any]) -> str:
    name = getattr(replaced, "__qualname__", repr(replaced))
    return f"the forward of this {type(module).__name__} was replaced on the instance (by {name})"
