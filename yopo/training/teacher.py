"""A teacher that stays what it was while all its weights learn, without a second copy of them: what
the model says without its plan is asked once, before training, and goes with the rows (`teach`).
How a pupil learns from it is distillation.py's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import trange

from yopo.models.unpruned import unpruned
from yopo.training.distillation import IGNORED, TAUGHT, in_eval, without_adapters


@torch.no_grad()
def teach(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[..., Mapping[str, Any]],
    *,
    batch: int = 8,
    most: int = 64,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """`rows`, each with what `model` says without its plan, and its adapters if it has any, at the
    tokens of its answer: the `most` likeliest tokens there and their log-probabilities.
    `AnswerCollator` puts them into batches, and `distillation_loss` takes them in place of a
    teacher's pass.

    collate: as of the training. batch: rows that go through the model at once. most: a temperature
    other than 1 needs all tokens. They hold 6 bytes for each token and likeliest one.
    """
    device = next(model.parameters()).device
    made: list[dict[str, Any]] = []
    with unpruned(), in_eval(model), without_adapters(model):
        for first in trange(0, len(rows), batch, desc="teacher", disable=not progress):
            asked = [rows[at] for at in range(first, min(first + batch, len(rows)))]
            inputs = {name: value.to(device) for name, value in collate(asked).items()}
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            for row, said, label in zip(asked, logits, labels, strict=True):
                answer = said[label != IGNORED].float().log_softmax(-1)
                likeliest, ids = answer.topk(min(most, answer.shape[-1]))
                found = ids.int().cpu().numpy(), likeliest.half().cpu().numpy()
                made.append({**row, **dict(zip(TAUGHT, found, strict=True))})
    return made
