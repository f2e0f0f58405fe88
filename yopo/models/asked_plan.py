"""The plan that $YOPO_PLAN asks for: it is put on every model that is loaded from a checkpoint and
that a plan can be put on. Who asks when is patch.py's business."""

from __future__ import annotations

import os
from typing import Any

from yopo.models.attach import apply
from yopo.models.parts import Parts
from yopo.plan.pruning_plan import PruningPlan

VARIABLE = "YOPO_PLAN"

_pruned = [0]


def put_on(model: Any) -> None:
    """Puts the plan in the file or folder that the variable names on `model`, which was loaded just
    now; on none of a kind that yopo does not know, such as a vision tower.

    Raises ValueError where the plan does not fit the model, or where the model has another plan.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return
    try:
        Parts.of(model)
    except TypeError:
        return
    asked, had = PruningPlan.load(file), PruningPlan.from_config(model.config)
    if had is not None and had != asked:
        raise ValueError(
            f"{VARIABLE} (or --plan) asks for the plan in {file}, and the checkpoint of this "
            f"{type(model).__name__} has a plan of its own, another one: leave {VARIABLE} out to "
            "go by that, or load the dense checkpoint"
        )
    try:
        apply(model, asked)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the plan in {file} ({VARIABLE}, or --plan): {error}") from error
    _pruned[0] += 1


def pruned() -> int:
    """How many models got it."""
    return _pruned[0]
