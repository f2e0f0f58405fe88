"""apply and remove: prune a model that is loaded already, and restore it exactly.

The classes of live modules are exchanged for ones with the mixins of modeling_llama_prune.py; no
weight is touched. Replacing the classes before a model is built is patch.py's.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from . import modeling_llama_prune as prune
from ._compat import exchange_class, require_transformers
from .llava import instrument, is_llava
from .plan import RELEASED_FIELDS, PruningPlan

Model = TypeVar("Model", bound=nn.Module)

_CLASSES: dict[tuple[type, ...], type] = {}  # bases → the class made of them
_PLAN_FIELDS = ("yopo", *RELEASED_FIELDS)


def apply(model: Model, plan: PruningPlan) -> Model:
    """Prunes `model` in place by `plan` and returns it; its config carries the plan from now on.

    `model`: a LlamaForCausalLM, a LLaVA model built on one, or a wrapper around such (PEFT, DDP).
    Once more with the same plan changes nothing; with another, replaces it.

    Raises ValueError if the plan does not fit the model, TypeError if the model is of no family
    that yopo knows.
    """
    require_transformers()
    if not isinstance(plan, PruningPlan):
        raise TypeError(f"plan is a {type(plan).__name__}; apply takes a yopo.PruningPlan")
    causal = _causal_lm(model)
    plan.validate(causal.config)
    stack = causal.model
    for module in (causal, stack):
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise ValueError(
                f"the forward of this {type(module).__name__} was replaced on the instance (as "
                "accelerator.prepare does), which would go on running the unpruned one: apply the "
                "plan first"
            )
    if not hasattr(causal, "_yopo_before"):
        present = [name for name in _PLAN_FIELDS if hasattr(causal.config, name)]
        fields = {name: copy.deepcopy(getattr(causal.config, name)) for name in present}
        loaded = getattr(stack, "yopo_plan", None)
        causal._yopo_before = (type(causal), type(stack), loaded, fields)
    exchange_class(stack, _with_mixin(type(stack), prune.PrunedModelMixin))
    exchange_class(causal, _pruned_causal(type(causal)))
    stack.set_plan(plan)
    plan.save_to(causal.config)
    return model


def remove(model: Model) -> Model:
    """Takes the plan off `model` in place and returns it.

    After `apply`, classes, config and plan are what they were before it. A model that was loaded
    with a plan, and had none applied, becomes one without: its config loses the fields that would
    bring the plan back.
    """
    causal = _causal_lm(model)
    if hasattr(causal, "_yopo_before"):
        causal_class, stack_class, loaded, fields = causal._yopo_before
        del causal._yopo_before
    else:
        causal_class, stack_class, loaded, fields = type(causal), type(causal.model), None, {}
    if isinstance(causal.model, prune.PrunedModelMixin):
        causal.model.set_plan(loaded)
        if loaded is None:
            for attribute in ("yopo_plan", "_yopo_stack"):
                vars(causal.model).pop(attribute, None)
    exchange_class(causal.model, stack_class)
    exchange_class(causal, causal_class)
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


def _causal_lm(model: Any) -> Any:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    # The outermost transformers model: a Llama inside another family's model is that family's.
    found = next((module for module in modules if isinstance(module, PreTrainedModel)), model)
    if isinstance(found, prune.StockLlamaForCausalLM):
        return found
    raise TypeError(
        f"yopo cannot prune a {type(found).__name__}: it knows LlamaForCausalLM and models built "
        "on it, such as the original LLaVA's LlavaLlamaForCausalLM"
    )


def _pruned_causal(stock: type) -> type:
    """The class that tells `stock`'s decoder stack where the visual tokens are."""
    if not is_llava(stock):
        return _with_mixin(stock, prune.PrunedCausalLMMixin)
    # There the layout comes with LLaVA's images; the wrapped forward takes visual_mask as well.
    cls = _derived(stock, (stock,))
    instrument(cls)
    return cls


def _with_mixin(stock: type, mixin: type) -> type:
    return stock if issubclass(stock, mixin) else _derived(stock, (mixin, stock))


def _derived(stock: type, bases: tuple[type, ...]) -> type:
    """A class of `bases` under the name of `stock`, the same one each time."""
    if stock in _CLASSES.values():
        return stock
    if bases not in _CLASSES:
        names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
        _CLASSES[bases] = type(stock.__name__, bases, names)
    return _CLASSES[bases]
