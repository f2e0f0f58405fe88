"""Sinks moved together, by gradient descent on the KL of a model's answers from those known. No
weight changes.

Least squares (sink_fit.py) make each head's sink right by itself; here all of a plan's are moved at
once, which costs a backward pass for each sample and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from yopo.calibration.divergence import Reference, mean_kl
from yopo.models.trained_sinks import trainable_sinks
from yopo.models.trial import decoder_of, under
from yopo.plan.config_fields import head_dim
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

RATE = 0.1  # of Adam, for a
RATE_OF_B = 0.01  # b is multiplied by a whole query
BATCH = 8  # answers a step
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the way from the old sinks to the tuned ones


def tune_sinks(
    model: nn.Module,
    plan: PruningPlan,
    known: Sequence[Reference],
    held_out: Sequence[Reference],
    steps: int,
    progress: bool = False,
) -> PruningPlan:
    """`plan` with sinks under which the answers of `known` come nearer to what they are there.

    It goes as far from the plan's sinks to the tuned ones as the answers of `held_out` come nearer
    too: there the plan returned is never worse than the one given. Raises ValueError for a plan
    under which no head has a sink, and within torch.inference_mode.
    """
    if plan.sinks is None or "sink" not in (plan.head_mass, plan.cut_mass):
        raise ValueError(
            f"the plan has mass {plan.head_mass}/{plan.cut_mass}: there are no sinks to tune"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError("there are no gradients to tune by within torch.inference_mode: leave it")
    old = plan.sinks
    b = torch.zeros(*old.a.shape, head_dim(decoder_of(model).config)) if old.b is None else old.b
    tuned = _descend(model, plan, known, steps, progress)
    tried = [plan]
    for share in SHARES:
        pairs = zip((old.a, b), tuned, strict=True)
        sinks = Sinks(*(torch.lerp(start, end, share) for start, end in pairs), old.tokens)
        tried.append(replace(plan, sinks=sinks))
    return min(tried, key=lambda one: mean_kl(model, one, held_out))


def _descend(
    model: nn.Module,
    plan: PruningPlan,
    known: Sequence[Reference],
    steps: int,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """a and b after so many steps of Adam from the plan's."""
    with under(model, plan), trainable_sinks(model) as (a, b), torch.enable_grad():
        groups = [{"params": [a], "lr": RATE}, {"params": [b], "lr": RATE_OF_B}]
        optimizer = torch.optim.Adam(groups)
        for step in trange(steps, desc="tuning", disable=not progress):
            optimizer.zero_grad()
            for i in range(BATCH):
                reference = known[(step * BATCH + i) % len(known)]
                (_kl(model, reference) / BATCH).backward()
            optimizer.step()
    return a.detach().cpu(), b.detach().cpu()


def _kl(model: Callable[..., Any], reference: Reference) -> Tensor:
    count = reference.answer.shape[1]
    logits = model(**reference.inputs, use_cache=False).logits[0, -count:]
    known = reference.log_probabilities.to(logits.device)
    return (known.exp() * (known - logits.float().log_softmax(-1))).sum(-1).mean()
