"""A loaded model under one plan after another, and left as it was found. Puts plans on and takes
them off; runs nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from yopo.models.attach import apply, remove
from yopo.models.parts import Parts, part_of, plan_of
from yopo.plan.pruning_plan import PruningPlan

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def under(model: Model, plan: PruningPlan | None) -> Iterator[Model]:
    """`model` in eval mode under `plan`; None: one that prunes nothing, so that the model is dense
    but knows where its visual tokens are. Afterwards its own plan, or none, and mode are back."""
    if part_of(Parts.of(model)).count > 1:
        raise ValueError(
            "the model is shared by processes (tensor parallelism), each of which sees some heads "
            "only: calibrate it whole, on one process or on several with a copy each"
        )
    applied, before = hasattr(Parts.of(model).outer, "_yopo_before"), plan_of(model)
    training = model.training
    apply(model, plan or PruningPlan.dense(config_of(model)))
    try:
        yield model.eval()
    finally:
        model.train(training)
        if applied:
            apply(model, before)
        else:
            remove(model)


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder: the module with `layers`, `norm` and, of both, the config."""
    return Parts.of(model).decoder


def config_of(model: nn.Module) -> Any:
    """The config that a plan of `model` is written to."""
    return Parts.of(model).outer.config
