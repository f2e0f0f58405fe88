"""What a model says under its plan, taught by what it says without: `distillation_loss`. The
teacher is the model itself with the plan switched off, so no second copy of it is held. Knows no
optimiser and no loop; trainer.py has transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yopo.models.unpruned import unpruned

IGNORED = -100  # a label that is none, as transformers has it
# Of the teacher, asked before (teacher.py): (T, k) likeliest tokens at each of a batch's answers'
# tokens, and their log-probabilities.
TAUGHT = ("taught_ids", "taught_logs")
_TOO_LITTLE = 1e-6  # of a distribution: what rounding leaves of 1


def distillation_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
    num_items: Tensor | int | None = None,
) -> tuple[Tensor, Any]:
    """(loss, outputs) of a batch under the model's plan: KL of the answers' tokens from those of
    the same weights without it, as in distillation (arXiv 1503.02531).

    inputs: of forward, with `labels` (B, n), -100 where no answer is; rows of `teach` have what the
    teacher said before, which then makes no pass. temperature: both
    distributions are taken at it, and KL is multiplied by its square. weight: of KL; the rest is
    cross entropy with the labels. num_items: divides the sums over tokens in place of how many
    there are in this batch (gradient accumulation). The teacher's pass is in eval mode, and of a
    PeftModel without its adapters: there the teacher stays what it was. Where the weights learn it
    moves with them, and may get worse with its pupil: `teach` it once before, or take a weight
    below 1.

    Raises ValueError without labels, for settings that cannot be (a temperature other than 1 where
    `teach` has kept a part of the tokens), for inputs with a cache or fewer
    logits than tokens, and for a model whose logits are not of the labels' tokens (the original
    LLaVA's, which puts image tokens in between).
    """
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError("inputs have no labels: which tokens are the answer's is not known")
    if temperature <= 0 or not 0 <= weight <= 1:
        raise ValueError(
            f"temperature is {temperature}, weight {weight}; allowed: above 0, and from 0 to 1"
        )
    if given := sorted(name for name in _OF_ANSWERING if inputs.get(name)):
        raise ValueError(f"inputs have {given}, which is for answering: leave it out")
    told = {name: value for name, value in inputs.items() if name not in ("labels", *TAUGHT)}
    told |= {"return_dict": True}
    answered = labels[:, 1:] != IGNORED
    taught = None
    if TAUGHT[0] not in inputs:
        with torch.no_grad(), unpruned(), in_eval(model), without_adapters(model):
            taught = model(**told).logits
    outputs = model(**told)
    logits = outputs.logits
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"the model gives logits of {tuple(logits.shape[:2])} tokens for labels of "
            f"{tuple(labels.shape)}: take inputs whose labels have a place for each token"
        )
    mine, right = logits[:, :-1][answered], labels[:, 1:][answered]
    settings = {"temperature": temperature, "weight": weight}
    if taught is not None:
        loss = divergence(mine, taught[:, :-1][answered], right, **settings)
    else:
        loss = _from_known(mine, *(inputs[name] for name in TAUGHT), right, **settings)
    loss = loss / (answered.sum().clamp(min=1) if num_items is None else num_items)
    return loss, outputs


def divergence(
    logits: Tensor, taught: Tensor, labels: Tensor, *, temperature: float, weight: float
) -> Tensor:
    """The sum over tokens of what `distillation_loss` is the mean of: logits and the teacher's
    (T, V), labels (T,)."""
    mine, theirs = logits.float(), taught.float()
    q, p = ((each / temperature).log_softmax(-1) for each in (mine, theirs))
    loss = weight * temperature**2 * (p.exp() * (p - q)).sum()
    if weight < 1:
        loss = loss + (1 - weight) * F.cross_entropy(mine, labels, reduction="sum")
    return loss


def _from_known(
    logits: Tensor, ids: Tensor, logs: Tensor, labels: Tensor, *, temperature: float, weight: float
) -> Tensor:
    """`divergence` from what the teacher said before: (T, k) tokens and their log-probabilities.
    All tokens beside these are one more outcome, of what is left of its distribution.

    Raises ValueError for other tokens than were asked for, and where a temperature would need what
    was not kept."""
    ids, logs = ids.to(logits.device).long(), logs.to(logits.device).float()
    if len(ids) != len(logits):
        raise ValueError(
            f"the teacher was asked for {len(ids)} tokens of answers, labels have {len(logits)}: "
            "teach and train with the same collator"
        )
    if ids.shape[1] == logits.shape[1]:
        said = torch.zeros_like(logits, dtype=torch.float32).scatter(1, ids, logs)
        return divergence(logits, said, labels, temperature=temperature, weight=weight)
    if temperature != 1:
        raise ValueError(
            f"temperature is {temperature}, and of the teacher's answers only the {ids.shape[1]} "
            f"likeliest tokens of {logits.shape[1]} are known, at 1: teach with most="
            f"{logits.shape[1]}, or take temperature 1"
        )
    q, p = logits.float().log_softmax(-1), logs.exp()
    left = (1 - p.sum(-1)).clamp(min=_TOO_LITTLE)
    others = q.scatter(1, ids, -torch.inf).logsumexp(-1)
    loss = (p * (logs - q.gather(1, ids))).sum() + (left * (left.log() - others)).sum()
    return weight * loss + (1 - weight) * F.cross_entropy(logits.float(), labels, reduction="sum")


_OF_ANSWERING = ("past_key_values", "logits_to_keep", "num_logits_to_keep")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Of a PeftModel. What learns is the same afterwards: peft has all adapters learn then."""
    adapted = next((part for part in model.modules() if hasattr(part, "disable_adapter")), None)
    if adapted is None:
        yield
        return
    learning = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with adapted.disable_adapter():
            yield
    finally:
        for weight, learns in learning:
            weight.requires_grad_(learns)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
