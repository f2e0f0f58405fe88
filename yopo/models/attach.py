"""apply and remove: prune a model that is loaded already, and restore it exactly.

The classes of live modules are exchanged for ones with the mixins of modeling_llama_prune.py and
families/; no weight is touched. Replacing the classes before a model is built is patch.py's.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from yopo import modeling_llama_prune as prune
from yopo.models import families
from yopo.models.original_llava import instrument, is_llava
from yopo.plan.pruning_plan import RELEASED_FIELDS, PruningPlan
from yopo.versions import exchange_class, require_transformers

Model = TypeVar("Model", bound=nn.Module)

_CLASSES: dict[tuple[type, ...], type] = {}  # bases → the class made of them
_PLAN_FIELDS = ("yopo", *RELEASED_FIELDS)


def apply(model: Model, plan: PruningPlan) -> Model:
    """Prunes `model` in place by `plan` and returns it; its config carries the plan from now on.

    `model`: a LlamaForCausalLM, a LLaVA model built on one, a model of one of families/, or a
    wrapper around such (PEFT, DDP). Once more with the same plan changes nothing; with another,
    replaces it.

    Raises ValueError if the plan does not fit the model, TypeError if the model is of no family
    that yopo knows or its layers are not of the kind that it computes, ImportError if it asks for a
    flash-attn that is not there or its family for a newer transformers.
    """
    require_transformers()
    if not isinstance(plan, PruningPlan):
        raise TypeError(f"plan is a {type(plan).__name__}; apply takes a yopo.PruningPlan")
    parts = Parts.of(model)
    outer, stack = parts.outer, parts.stack
    plan.validate(outer.config)
    _refuse_foreign_layers(outer, stack)
    _refuse_other_order(outer.config, stack, plan)
    for module in (outer, *parts.modules):
        if "forward" in vars(module) and "_old_forward" not in vars(module):
            raise ValueError(
                f"the forward of this {type(module).__name__} was replaced on the instance (as "
                "accelerator.prepare does), which would go on running the unpruned one: apply the "
                "plan first"
            )
    if not hasattr(outer, "_yopo_before"):
        classes = tuple(map(type, parts.modules))
        loaded = getattr(stack, "yopo_plan", None)
        outer._yopo_before = (classes, loaded, [_plan_fields(c) for c in _configs(outer)])
    _keep_ffn_order(outer.config, stack)
    prune_parts(parts, plan)
    for config in _configs(outer):  # a block elsewhere would come back with one version or another
        vars(config).pop("yopo", None)
    plan.save_to(outer.config)
    return model


def prune_parts(parts: Parts, plan: PruningPlan) -> None:
    """Exchanges the classes and sets the plan; the config is the caller's to write."""
    for module, pruned in zip(parts.modules, parts.pruned_classes(), strict=True):
        exchange_class(module, pruned)
    parts.stack.set_plan(plan)


def prune_loaded(model: Any) -> None:
    """Prunes a model of families/ that is being built from a config with a plan; leaves any other
    alone. For patch.py, which calls it of every model."""
    if families.name_of(model) is None or families.composite_of(model) is not model:
        return
    plan = PruningPlan.from_config(model.config)
    if plan is not None:
        parts = Parts.of(model)
        _refuse_foreign_layers(model, parts.stack)
        prune_parts(parts, plan)


def remove(model: Model) -> Model:
    """Takes the plan off `model` in place and returns it.

    After `apply`, classes, config and plan are what they were before it. A model that was loaded
    with a plan, and had none applied, becomes one without: its config loses the fields that would
    bring the plan back.
    """
    parts = Parts.of(model)
    outer, stack = parts.outer, parts.stack
    configs = _configs(outer)
    _keep_ffn_order(outer.config, stack)
    if hasattr(outer, "_yopo_before"):
        classes, loaded, fields = outer._yopo_before
        del outer._yopo_before
    else:
        classes, loaded = tuple(_stock_of(type(module)) for module in parts.modules), None
        fields = [{} for _ in configs]
    if hasattr(parts.teller, "forget_encoded"):
        parts.teller.forget_encoded()
    if isinstance(stack, prune.PrunedModelMixin):
        stack.set_plan(loaded)
        if loaded is None:
            for attribute in ("yopo_plan", "_yopo_stack"):
                vars(stack).pop(attribute, None)
    for module, cls in zip(parts.modules, classes, strict=True):
        exchange_class(module, cls)
    for config, values in zip(configs, fields, strict=True):
        for name in _PLAN_FIELDS:
            if name in vars(config):
                delattr(config, name)
        for name, value in values.items():
            setattr(config, name, value)
    return model


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan that `model` runs under, or None."""
    for module in model.modules():
        if isinstance(module, prune.PrunedModelMixin):
            return module.yopo_plan
    return None


@dataclass(frozen=True)
class Parts:
    """What of a model a plan concerns.

    outer: the outermost transformers model, whose config holds the plan.
    stack: its decoder stack.
    teller: the module that tells the stack where the visual tokens are.
    """

    outer: Any
    stack: Any
    teller: Any

    @property
    def modules(self) -> tuple[Any, Any]:
        return self.stack, self.teller

    @classmethod
    def of(cls, model: Any) -> Parts:
        """Raises TypeError if the model is of no family that yopo knows."""
        modules = model.modules() if isinstance(model, nn.Module) else ()
        # The outermost one: a Llama inside another family's model is that family's.
        outer = next((module for module in modules if isinstance(module, PreTrainedModel)), model)
        if isinstance(outer, prune.StockLlamaForCausalLM):
            return cls(outer, outer.model, outer)
        if families.name_of(outer) is None:
            raise families.unknown(outer)
        composite = families.composite_of(outer)
        return cls(outer, families.text_stack_of(composite), composite)

    def pruned_classes(self) -> tuple[type, type]:
        stack = _with_mixin(type(self.stack), prune.PrunedModelMixin)
        if isinstance(self.teller, prune.StockLlamaForCausalLM):
            return stack, _pruned_causal(type(self.teller))
        return stack, _pruned_composite(type(self.teller), families.family_of(self.teller))


def _configs(outer: Any) -> list[Any]:
    """The configs in which a plan is looked for: the model's, and its text model's."""
    text = getattr(outer.config, "text_config", None)
    return [outer.config] if text is None or isinstance(text, dict) else [outer.config, text]


def _plan_fields(config: Any) -> dict[str, Any]:
    present = [name for name in _PLAN_FIELDS if name in vars(config)]
    return {name: copy.deepcopy(vars(config)[name]) for name in present}


def _refuse_foreign_layers(outer: Any, stack: Any) -> None:
    """Raises TypeError where the layers lack what engine.py calls or have what it does not compute,
    ImportError where the unpruned calls would need a flash-attn that is not there."""
    layer = stack.layers[0]
    wanted = {
        "self_attn": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"}),
        "mlp": ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}),
    }
    quantised = getattr(getattr(outer, "config", None), "quantization_config", None)
    why = f" (quantised: {quantised})" if quantised is not None else ""
    for name, choices in wanted.items():
        module = getattr(layer, name, None)
        has = set() if module is None else set(module._modules)
        if not any(choice <= has for choice in choices):
            raise TypeError(
                f"the layers of this {type(stack).__name__} have as {name} a "
                f"{type(module).__name__} without {' or '.join(map(str, map(sorted, choices)))}"
                f"{why}: fused or replaced layers cannot be pruned; load it without"
            )
        if extra := sorted(has & {"q_norm", "k_norm"}):
            raise TypeError(
                f"the {type(module).__name__} of this {type(stack).__name__} has {extra}: norms "
                "of queries and keys are not computed by a pruned pass"
            )
    chosen = getattr(stack.config, "_attn_implementation", None)
    if chosen == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ImportError(
            "the model asks for attn_implementation='flash_attention_2', but flash-attn is not "
            "installed: load it with attn_implementation='sdpa' (a pruned pass uses SDPA anyway)"
        )


def ffn_order_of(model: Any) -> str | None:
    """The order that the FFN neurons of `model` are in, as a plan names it; None: as trained."""
    parts = Parts.of(model)
    return _ffn_order(parts.outer.config, parts.stack)


def _ffn_order(config: Any, stack: Any) -> str | None:
    block = getattr(config, "yopo", None)
    loaded = block.get("ffn_order") if isinstance(block, dict) else None  # a corrupt one: replaced
    kept = getattr(config, "yopo_ffn_order", None) or loaded
    return getattr(stack, "yopo_ffn_order", None) or kept


def _keep_ffn_order(config: Any, stack: Any) -> None:
    """The order belongs to the weights: a plan that goes must not take it out of the config."""
    order = _ffn_order(config, stack)
    if order is not None:
        config.yopo_ffn_order = order


def _refuse_other_order(config: Any, stack: Any, plan: PruningPlan) -> None:
    here = _ffn_order(config, stack)
    if plan.ffn_order is not None and plan.ffn_order != here:
        raise ValueError(
            f"the plan is for weights with FFN neurons in the order {plan.ffn_order}; this model's "
            f"are {'as trained' if here is None else f'in the order {here}'}: load the checkpoint "
            "that the plan came with, or put them in that order (yopo.calibration.neurons.put)"
        )


def _pruned_causal(stock: type) -> type:
    """The class that tells `stock`'s decoder stack where the visual tokens are."""
    if not is_llava(stock):
        return _with_mixin(stock, prune.PrunedCausalLMMixin)
    # There the layout comes with LLaVA's images; the wrapped forward takes visual_mask as well.
    cls = _derived(stock, (stock,))
    instrument(cls)
    return cls


def _pruned_composite(stock: type, family: type) -> type:
    """`stock` with the forward that works the layout out of the call's images."""
    cls = _with_mixin(stock, family)
    if "forward" not in vars(cls):
        family.instrument(cls, stock)
    return cls


def _stock_of(cls: type) -> type:
    """The class that one of ours was made of; any other class itself."""
    made_of = (bases[-1] for bases, made in _CLASSES.items() if made is cls)
    return next(made_of, cls)


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
