"""The sinks of a plan as parameters, which an optimiser moves and checkpoints take with them:
`trainable_sinks`. What they are is plan/sinks.py's; by which loss they move is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from yopo.models.decoder import SINK_PARAMETERS, PrunedDecoder
from yopo.plan.config_fields import head_dim
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

_BEFORE = "_yopo_plans_before"


@contextmanager
def trainable_sinks(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Within the block the sinks of the model's plan, a (L, H) and b (L, H, D), are the only
    parameters of `model` that learn: of its decoder, so that optimisers, Trainer and DDP find them.

    Every save_pretrained within writes the plan with the sinks as they are then; after the block
    the model's plan has them (unless it was left by an error), and all weights learn that did.
    Another plan that is put on within goes by these sinks, too, if it has any.

    Raises ValueError where no head has a sink, where they are being trained already, and for a
    model shared by processes (tensor parallelism).
    """
    outer, decoder = _parts(model)
    plan = None if decoder is None else decoder.yopo_plan
    if plan is None or plan.sinks is None or "sink" not in (plan.head_mass, plan.cut_mass):
        has = "no plan" if plan is None else f"a plan of mass {plan.head_mass}/{plan.cut_mass}"
        raise ValueError(
            f"the model has {has}: there are no sinks to train. Fit some (yopo.fit_sinks), and "
            "apply the plan that comes of it"
        )
    if is_training_sinks(model):
        raise ValueError("the sinks of this model are being trained already: leave that block")
    if decoder.yopo_part.count > 1:
        raise ValueError(
            "the model is shared by processes (tensor parallelism), each of which has some of the "
            "sinks only: train them whole, on one process or on several with a copy each"
        )
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    device = next(decoder.parameters()).device
    shape = (*plan.sinks.a.shape, head_dim(decoder.config))
    b = torch.zeros(shape) if plan.sinks.b is None else plan.sinks.b
    made = [nn.Parameter(value.detach().clone().to(device)) for value in (plan.sinks.a, b)]
    hooks = (
        decoder.register_forward_pre_hook(_take_sinks),
        decoder.register_forward_hook(_leave_sinks, always_call=True),
    )
    for weight in learning:
        weight.requires_grad_(False)
    for name, parameter in zip(SINK_PARAMETERS, made, strict=True):
        decoder.register_parameter(name, parameter)
    try:
        yield made[0], made[1]
        settle_sinks(outer)
    except BaseException:
        _put(outer, decoder, plan.sinks)  # a save within has settled others
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for name in SINK_PARAMETERS:
            delattr(decoder, name)
        if getattr(decoder, "yopo_plan", None) is not None:  # else it was taken off meanwhile
            decoder.set_plan(decoder.yopo_plan)
        for weight in learning:
            weight.requires_grad_(True)


def settle_sinks(model: nn.Module) -> None:
    """Puts sinks that are being trained, as they are now, into the model's plan and its config;
    where none are, nothing changes."""
    outer, decoder = _parts(model)
    values = _parameters(decoder)
    plan = getattr(decoder, "yopo_plan", None)
    if values is not None and plan is not None and plan.sinks is not None:
        a, b = (value.detach().float().cpu() for value in values)
        _put(outer, decoder, Sinks(a, b, plan.sinks.tokens))


def _put(outer: Any, decoder: Any, sinks: Sinks) -> None:
    plan: PruningPlan | None = decoder.yopo_plan
    if plan is not None and plan.sinks is not None:  # else another was put on meanwhile
        decoder.yopo_plan = replace(plan, sinks=sinks)
        decoder.yopo_plan.save_to(outer.config)


def is_training_sinks(model: nn.Module) -> bool:
    return _parameters(_parts(model)[1]) is not None


def set_sinks(model: nn.Module, sinks: Sinks) -> None:
    """Has the sinks that are being trained go on from `sinks`."""
    values = _parameters(_parts(model)[1])
    assert values is not None
    for value, given in zip(values, (sinks.a, sinks.b), strict=True):
        with torch.no_grad():
            value.zero_() if given is None else value.copy_(given)


def _parameters(decoder: Any) -> tuple[Tensor, ...] | None:
    if decoder is None or not hasattr(decoder, SINK_PARAMETERS[0]):
        return None
    return tuple(getattr(decoder, name) for name in SINK_PARAMETERS)  # of a replica no parameters


def _take_sinks(decoder: Any, args: Any) -> None:
    """Before each forward: gradients reach the parameters once."""
    values, plans = _parameters(decoder), decoder._yopo_layer_plans
    if plans is not None and values is not None and decoder.yopo_plan.sinks is not None:
        vars(decoder)[_BEFORE] = plans
        decoder._yopo_layer_plans = plans.with_sinks(*values)


def _leave_sinks(decoder: Any, args: Any, output: Any) -> None:
    """After it: parts of parameters, which have gradients, cannot be copied with a model."""
    plans = vars(decoder).pop(_BEFORE, None)
    if plans is not None:
        decoder._yopo_layer_plans = plans


def _parts(model: nn.Module) -> tuple[Any, Any]:
    """The outermost transformers model and its decoder, if that has or had a plan."""
    outer = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
    return outer, next((m for m in outer.modules() if isinstance(m, PrunedDecoder)), None)
