"""The constants of mass="calibrated" fitted to one plan: by gradient descent on the KL of the
answers from the dense model's. No weight changes.

The constants that Statistics give are right for each head by itself; here all heads that a plan
blinds are moved together. Costs a backward pass for each sample and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from yopo.calibration.divergence import Reference, divergence
from yopo.engine.layer_plan import HeadGroup, LayerPlans
from yopo.models.trial import decoder_of, under
from yopo.plan.pruning_plan import PruningPlan

RATE = 0.05  # of Adam
BATCH = 8  # answers a step
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the way from the old constants to the fitted ones


def fit_text_mass(
    model: nn.Module,
    plan: PruningPlan,
    known: Sequence[Reference],
    held_out: Sequence[Reference],
    steps: int = 40,
    progress: bool = False,
) -> PruningPlan:
    """`plan` with constants under which the answers of `known` come nearer to the dense model's.

    Starts from the plan's constants, or from 1 ("drop") where that is nearer already, and goes as
    far to the fitted ones as the answers of `held_out` come nearer too: there the plan returned is
    never worse than the one given. Raises ValueError for a plan without constants.
    """
    if plan.text_mass is None:
        raise ValueError("the plan has no constants to fit: its mass is not calibrated")
    starts = [plan, replace(plan, text_mass=torch.ones_like(plan.text_mass))]
    start = min(starts, key=lambda one: _mean(model, one, known))
    fitted = _descend(model, start, known, steps, progress)
    way = [torch.lerp(start.text_mass, fitted, share) for share in SHARES]
    tried = [*starts, *(replace(plan, text_mass=mass) for mass in way)]
    return min(tried, key=lambda one: _mean(model, one, held_out))


def _mean(model: nn.Module, plan: PruningPlan, known: Sequence[Reference]) -> float:
    return float(divergence(model, plan, known).kl.mean())


def _descend(
    model: nn.Module, plan: PruningPlan, known: Sequence[Reference], steps: int, progress: bool
) -> Tensor:
    """(L, H) in [0, 1]: the constants after `steps` steps of Adam."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    mass = nn.Parameter(plan.text_mass.clone())
    optimizer = torch.optim.Adam([mass], lr=RATE)
    for weight in learning:
        weight.requires_grad_(False)
    try:
        with under(model, plan), torch.enable_grad():
            decoder = decoder_of(model)
            made = decoder._yopo_layer_plans
            for step in trange(steps, desc="constants", disable=not progress):
                optimizer.zero_grad()
                for i in range(BATCH):
                    reference = known[(step * BATCH + i) % len(known)]
                    decoder._yopo_layer_plans = _with(made, mass)
                    (_kl(model, reference) / BATCH).backward()
                optimizer.step()
                with torch.no_grad():
                    mass.clamp_(0, 1)
    finally:
        for weight in learning:
            weight.requires_grad_(True)
    return mass.detach()


def _kl(model: Any, reference: Reference) -> Tensor:
    count = reference.answer.shape[1]
    logits = model(**reference.inputs, use_cache=False).logits[0, -count:]
    dense = reference.log_probabilities.to(logits.device)
    return (dense.exp() * (dense - logits.float().log_softmax(-1))).sum(-1).mean()


def _with(made: LayerPlans, mass: Tensor) -> LayerPlans:
    """`made` with the constants `mass` (L, H), through which gradients flow."""

    def place(group: HeadGroup, row: Tensor) -> HeadGroup:
        if group.text_mass is None:
            return group
        row = row.to(group.text_mass.device)
        return replace(group, text_mass=row if group.q is None else row[group.q])

    plans = [
        replace(
            layer,
            text=tuple(place(group, row) for group in layer.text),
            visual=tuple(place(group, row) for group in layer.visual),
        )
        for layer, row in zip(made.plans, mass, strict=True)
    ]
    return replace(made, plans=plans)
