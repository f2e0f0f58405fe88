"""What a model says under its plan, taught by what it says without: `distillation_loss`. The
teacher is the model itself with the plan switched off, so no second copy of it is held. Knows no
optimiser and no loop; trainer.py has transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yopo.models.unpruned import unpruned

IGNORED = -100  # a label that is none, as transformers has it
# Of the teacher, asked before (teacher.py): (T, k) likeliest tokens at each of a batch's answers'
# tokens, and their log-probabilities.
TAUGHT = ("taught_ids", "taught_logs")
_UNLIKELY = -1e4  # finite: 0 * inf is not a number


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

    Raises ValueError without labels, for settings that cannot be, for inputs with a cache or fewer
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
        with torch.no_grad(), unpruned(), _in_eval(model), _without_adapters(model):
            taught = model(**told).logits
    outputs = model(**told)
    logits = outputs.logits
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"the model gives logits of {tuple(logits.shape[:2])} tokens for labels of "
            f"{tuple(labels.shape)}: take inputs whose labels have a place for each token"
        )
    mine = logits[:, :-1][answered]
    loss = divergence(
        mine,
        _known(mine, inputs) if taught is None else taught[:, :-1][answered],
        labels[:, 1:][answered],
        temperature=temperature,
        weight=weight,
    )
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


def _known(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Logits (T, V) of what the teacher said before."""
    ids, logs = (inputs[name].to(logits.device) for name in TAUGHT)
    if len(ids) != len(logits):
        raise ValueError(
            f"the teacher was asked for {len(ids)} tokens of answers, labels have {len(logits)}: "
            "teach and train with the same collator"
        )
    unlikely = torch.full(logits.shape, _UNLIKELY, device=logits.device)
    return unlikely.scatter(1, ids.long(), logs.float())


_OF_ANSWERING = ("past_key_values", "logits_to_keep", "num_logits_to_keep")


def _without_adapters(model: nn.Module) -> AbstractContextManager[Any]:
    adapted = next((part for part in model.modules() if hasattr(part, "disable_adapter")), None)
    return nullcontext() if adapted is None else adapted.disable_adapter()


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
