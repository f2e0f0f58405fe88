"""apply, remove and applied: prune a model that is loaded already, and restore it exactly.

The classes of live modules are exchanged (exchange.py) for ones with the mixins of decoder.py,
causal_lm.py, layers.py and families/; no weight is touched. Models that are being built from a
config with a plan come by patch.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from yopo.models import original_llava
from yopo.models.decoder import PrunedDecoder, shares_config
from yopo.models.exchange import Exchanged, put, stock_of
from yopo.models.parts import Parts, part_of, plan_of, refuse_foreign
from yopo.models.peft_adapters import accompany_adapters
from yopo.models.probe import probe
from yopo.models.replaced import replaced_forward
from yopo.models.saved_sinks import accompany_configs
from yopo.models.shown import RELEASED
from yopo.plan.pruning_plan import RELEASED_FIELDS, PruningPlan
from yopo.versions import require_transformers

Model = TypeVar("Model", bound=nn.Module)

_PLAN_FIELDS = ("yopo", *RELEASED_FIELDS)


def apply(model: Model, plan: Any, *, layout: str | None = None) -> Model:
    """Prunes `model` in place by `plan` and returns it; its config carries the plan from now on.

    `model`: a LlamaForCausalLM, a LLaVA model built on one, a model of one of families/, or a
    wrapper around such (PEFT, DDP). `plan`: a PruningPlan, or what has one as `.plan`, as
    `yopo.calibrate` returns. Once more with the same plan changes nothing; with another, replaces
    it. `layout`: "released" takes embeddings of which nothing is known for one 24 × 24 image after
    `config.sprompt_len` tokens, as the released code does; None refuses them.

    Raises ValueError if the plan does not fit the model, TypeError if the model is of no family
    that yopo knows or its layers are not of the kind that it computes (probe.py), ImportError if it
    asks for a flash-attn that is not there or its family for a newer transformers. The model is
    then as it was.
    """
    require_transformers()
    plan = getattr(plan, "plan", plan)
    if not isinstance(plan, PruningPlan):
        raise TypeError(f"plan is a {type(plan).__name__}; apply takes a yopo.PruningPlan")
    if layout not in (None, RELEASED):
        raise ValueError(f"layout is {layout!r}; allowed: None, {RELEASED!r}")
    parts = Parts.of(model)
    outer, decoder = parts.outer, parts.decoder
    plan.validate(outer.config)
    refuse_foreign(parts)
    _refuse_other_order(outer.config, decoder, plan)
    for module in (outer, *parts.modules):
        _refuse_replaced(module)
    before = getattr(decoder, "yopo_plan", None)
    try:
        put_plan(parts, plan)
        probe(decoder, PrunedDecoder)
        decoder.yopo_layout = layout
    except BaseException:
        _restore(parts, before)
        raise
    _give_own_config(model, parts, before)
    if not hasattr(outer, "_yopo_before"):
        outer._yopo_before = (before, [_plan_fields(c) for c in _configs(outer)])
    _keep_ffn_order(outer.config, decoder)
    for config in _configs(outer):  # a block elsewhere would come back with one version or another
        vars(config).pop("yopo", None)
    plan.save_to(outer.config)
    accompany_adapters(apply)
    accompany_configs()
    return model


@contextmanager
def applied(model: Model, plan: Any) -> Iterator[Model]:
    """`model` under `plan` within the block, and afterwards as it was before: without a plan, or
    with the one that it had."""
    outer = Parts.of(model).outer
    had, before = hasattr(outer, "_yopo_before"), plan_of(model)
    apply(model, plan)
    try:
        yield model
    finally:
        if had:
            apply(model, before)
        else:
            remove(model)


def put_plan(parts: Parts, plan: PruningPlan) -> None:
    """Exchanges the classes and sets the plan; the config is the caller's to write."""
    original_llava.instrument(type(parts.teller))
    for module, pruned in zip(parts.modules, parts.pruned_classes(), strict=True):
        put(module, pruned)
    parts.decoder.yopo_part = part_of(parts)
    parts.decoder.set_plan(plan)


def remove(model: Model) -> Model:
    """Takes the plan off `model` in place and returns it.

    After `apply`, classes, config and plan are what they were before it. A model that was loaded
    with a plan, and had none applied, becomes one without: its config loses the fields that would
    bring the plan back.
    """
    parts = Parts.of(model)
    outer, decoder = parts.outer, parts.decoder
    _give_own_config(model, parts, plan_of(model))
    configs = _configs(outer)
    _keep_ffn_order(outer.config, decoder)
    loaded, fields = None, [{} for _ in configs]
    if hasattr(outer, "_yopo_before"):
        loaded, fields = outer._yopo_before
    _restore(parts, loaded)
    vars(outer).pop("_yopo_before", None)
    for config, values in zip(configs, fields, strict=True):
        for name in _PLAN_FIELDS:
            if name in vars(config):
                delattr(config, name)
        for name, value in values.items():
            setattr(config, name, value)
    return model


def _restore(parts: Parts, plan: PruningPlan | None) -> None:
    """The classes for `plan`; None: stock's."""
    decoder = parts.decoder
    if plan is not None:
        put_plan(parts, plan)
        return
    if hasattr(parts.teller, "forget_encoded"):
        parts.teller.forget_encoded()
    if isinstance(decoder, PrunedDecoder):
        decoder.set_plan(None)
    for module in parts.modules:
        put(module, stock_of(type(module)))
    for name in [name for name in vars(decoder) if name in vars(PrunedDecoder)]:
        if name != "yopo_ffn_order":  # which belongs to the weights
            delattr(decoder, name)


def _refuse_replaced(module: nn.Module) -> None:
    replaced = replaced_forward(module)
    # One that was put on under a plan stands around our forward, whichever plan comes next.
    if replaced is not None and not isinstance(module, Exchanged):
        raise ValueError(
            f"the forward of this {type(module).__name__} was replaced on the instance (as "
            "accelerator.prepare does), which would go on running the unpruned one: apply the "
            "plan first"
        )


def _give_own_config(model: nn.Module, parts: Parts, plan: PruningPlan | None) -> None:
    """Gives `model`, which runs under `plan`, a copy of its config where another one under a plan
    has the same object: what is written there is meant for one of them."""
    if not shares_config(parts.decoder):
        return
    copies: dict[int, Any] = {}
    copy.deepcopy(parts.outer.config, copies)
    for module in model.modules():
        own = copies.get(id(vars(module).get("config")))
        if own is not None:
            module.config = own
    if plan is None:  # then it is the other's
        for config in _configs(parts.outer):
            vars(config).pop("yopo", None)


def _configs(outer: Any) -> list[Any]:
    """The configs in which a plan is looked for: the model's, and its text model's."""
    text = getattr(outer.config, "text_config", None)
    return [outer.config] if text is None or isinstance(text, dict) else [outer.config, text]


def _plan_fields(config: Any) -> dict[str, Any]:
    present = [name for name in _PLAN_FIELDS if name in vars(config)]
    return {name: copy.deepcopy(vars(config)[name]) for name in present}


def ffn_order_of(model: Any) -> str | None:
    """The order that the FFN neurons of `model` are in, as a plan names it; None: as trained."""
    parts = Parts.of(model)
    return _ffn_order(parts.outer.config, parts.decoder)


def _ffn_order(config: Any, decoder: Any) -> str | None:
    block = getattr(config, "yopo", None)
    loaded = block.get("ffn_order") if isinstance(block, dict) else None  # a corrupt one: replaced
    kept = getattr(config, "yopo_ffn_order", None) or loaded
    return getattr(decoder, "yopo_ffn_order", None) or kept


def _keep_ffn_order(config: Any, decoder: Any) -> None:
    """The order belongs to the weights: a plan that goes must not take it out of the config."""
    order = _ffn_order(config, decoder)
    if order is not None:
        config.yopo_ffn_order = order


def _refuse_other_order(config: Any, decoder: Any, plan: PruningPlan) -> None:
    here = _ffn_order(config, decoder)
    if plan.ffn_order is not None and plan.ffn_order != here:
        raise ValueError(
            f"the plan is for weights with FFN neurons in the order {plan.ffn_order}; this model's "
            f"are {'as trained' if here is None else f'in the order {here}'}: load the checkpoint "
            "that the plan came with, or put them in that order (yopo.calibration.neurons.put)"
        )
