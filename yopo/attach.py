"""apply and remove: prune a model that is loaded already, and restore it exactly.

The classes of live modules are exchanged for ones with the mixins of modeling_llama_prune.py; no
weight is touched. Replacing the classes before a model is built is patch.py's.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from . import modeling_llama_prune as prune
from ._compat import require_transformers
from .llava import instrument
from .plan import RELEASED_FIELDS, PruningPlan

Model = TypeVar("Model", bound=nn.Module)

_CLASSES: dict[tuple[type, type], type] = {}  # (stock class, mixin) → the class with the mixin
_PLAN_FIELDS = ("yopo", *RELEASED_FIELDS)


def apply(model: Model, plan: PruningPlan) -> Model:
    """Prunes `model` in place by `plan` and returns it; its config carries the plan from now on.

    `model`: a LlamaForCausalLM, a LLaVA model built on one, or a wrapper around such (PEFT, DDP).
    Once more with the same plan changes nothing; with another, replaces it.

    Raises ValueError if the plan does not fit the model, TypeError if the model is of no family
    that yopo knows.
    """
    require_transformers()
    causal = _causal_lm(model)
    plan.validate(causal.config)
    stack = causal.model
    if not hasattr(causal, "_yopo_before"):
        present = [name for name in _PLAN_FIELDS if hasattr(causal.config, name)]
        fields = {name: copy.deepcopy(getattr(causal.config, name)) for name in present}
        causal._yopo_before = (type(causal), type(stack), fields)
    _exchange_class(stack, _with_mixin(type(stack), prune.PrunedModelMixin))
    _exchange_class(causal, _with_mixin(type(causal), prune.PrunedCausalLMMixin))
    stack.set_plan(plan)
    plan.save_to(causal.config)
    return model


def remove(model: Model) -> Model:
    """Takes the plan off `model` in place and returns it.

    After `apply`, classes and config are what they were. A model that was loaded with a plan
    becomes one without: its config loses the fields that would bring the plan back.
    """
    causal = _causal_lm(model)
    if hasattr(causal, "_yopo_before"):
        causal_class, stack_class, fields = causal._yopo_before
        del causal._yopo_before
    else:
        causal_class, stack_class, fields = type(causal), type(causal.model), {}
    if isinstance(causal.model, prune.PrunedModelMixin):
        causal.model.set_plan(None)
        for attribute in ("yopo_plan", "_yopo_stack"):
            vars(causal.model).pop(attribute, None)
    _exchange_class(causal.model, stack_class)
    _exchange_class(causal, causal_class)
    for name in _PLAN_FIELDS:
        if hasattr(causal.config, name):
            delattr(causal.config, name)
    for name, value in fields.items():
        setattr(causal.config, name, value)
    return model


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan that `model` runs under, or None."""
    for module in model.modules():
        if isinstance(module, prune.PrunedModelMixin):
            return module.yopo_plan
    return None


def _causal_lm(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, prune.StockLlamaForCausalLM):
            return module
    raise TypeError(
        f"yopo cannot prune a {type(model).__name__}: it knows LlamaForCausalLM and models built "
        "on it, such as the original LLaVA's LlavaLlamaForCausalLM"
    )


def _with_mixin(stock: type, mixin: type) -> type:
    if issubclass(stock, mixin):
        return stock
    if (stock, mixin) not in _CLASSES:
        names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
        _CLASSES[stock, mixin] = type(stock.__name__, (mixin, stock), names)
        instrument(_CLASSES[stock, mixin])
    return _CLASSES[stock, mixin]


def _exchange_class(module: nn.Module, cls: type) -> None:
    module.__class__ = cls
    if "_old_forward" in vars(module):  # accelerate's hooks call the bound method that they found
        module._old_forward = cls.forward.__get__(module)
