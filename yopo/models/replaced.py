"""Forwards that somebody put on a module itself, in place of its class's: which of them a pruned
pass can live with, and what becomes of these.

Accelerate's call the class's forward. One that takes any argument and was put on after the plan is
a wrapper around ours. Liger's (put on a loaded model) compute what the class computes, by other
kernels: they are set aside, for calls that are stock's. All others are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from yopo.models.exchange import is_the_class_s

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
    """The same of one that was put on while the plan was.

    Raises ValueError for one that is neither Liger's nor passes its arguments on."""
    replaced = replaced_forward(module)
    if replaced is None:
        return
    if _is_ligers(replaced):
        _put_aside(module)
        return
    parameters = inspect.signature(replaced).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"{_named(module, replaced)}, which takes no further arguments: a pruned pass calls it "
            "with `pruned=…`. Take **kwargs and hand them on, or remove the plan (yopo.remove)"
        )


def set_aside(module: nn.Module, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of this module that was set aside, `otherwise` if none was."""
    return vars(module).get(_ASIDE, otherwise)


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
