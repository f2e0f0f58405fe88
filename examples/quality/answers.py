"""Measures a reader: right answers on whole test sets, picture by picture, and their intervals.

Each picture is read once and its cache shared by all questions about it, which yopo guarantees to
be the same as one prefill. Models and training live elsewhere.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from learn import pad, products
from network import Reader
from pictures import Task, Turn, tokens
from torch import Tensor
from transformers.cache_utils import DynamicCache

BATCH = 50  # pictures read at a time


@dataclass
class Batch:
    """Some pictures and all questions about them.

    features: (b, 64, 96). owner: (q,) the picture of each question. ids: (q, n) its tokens,
    padded on the right; last: (q,) where it ends. answers: (q,) token ids.
    """

    features: Tensor
    owner: Tensor
    ids: Tensor
    last: Tensor
    answers: Tensor


Guess = Callable[[Batch], Tensor]  # a batch to the guessed token ids (q,)


def batches(turns: list[list[Turn]], features: Tensor) -> Iterator[tuple[slice, Batch]]:
    for start in range(0, len(turns), BATCH):
        about = turns[start : start + BATCH]
        asked = [tokens(question) for some in about for _, question, _ in some]
        yield (
            slice(start, start + BATCH),
            Batch(
                features=features[start : start + BATCH].float(),
                owner=torch.tensor([i for i, some in enumerate(about) for _ in some]),
                ids=pad(asked),
                last=torch.tensor([len(ids) - 1 for ids in asked]),
                answers=torch.tensor([tokens(t[2])[0] for some in about for t in some]),
            ),
        )


def guesses(reader: Reader) -> Guess:
    """What the reader as it stands (dense or under its plan) answers."""

    def guess(batch: Batch) -> Tensor:
        return question_logits(reader, batch).argmax(-1)

    return guess


@torch.inference_mode()
def question_logits(reader: Reader, batch: Batch) -> Tensor:
    """(q, words): logits at the end of each question."""
    prefix = reader.prefix(batch.features)
    told = {}
    if hasattr(reader.config, "yopo"):
        visual = torch.arange(prefix.shape[1]) > 0
        told = {"visual_mask": visual.expand(len(prefix), -1)}
    stack = reader.llama
    cache = stack(
        inputs_embeds=prefix, past_key_values=DynamicCache(), use_cache=True, **told
    ).past_key_values
    cache.reorder_cache(batch.owner)  # the picture's, once for each question about it
    out = stack(input_ids=batch.ids, past_key_values=cache, use_cache=True).logits
    return out[torch.arange(len(out)), batch.last]


@torch.inference_mode()
def right_answers(guess: Guess, task: Task, features: Tensor) -> list[list[bool]]:
    """For each picture which of its questions are answered rightly."""
    right: list[list[bool]] = []
    for where, batch in batches(task.turns, features):
        with products():
            hits = iter((guess(batch) == batch.answers).tolist())
        right += [[next(hits) for _ in about] for about in task.turns[where]]
    return right


def accuracy(right: list[list[bool]]) -> float:
    """Percent of all questions."""
    return 100 * sum(map(sum, right)) / sum(map(len, right))


def by_kind(right: list[list[bool]], task: Task) -> dict[str, float]:
    """Percent of the questions of each kind."""
    hits: dict[str, list[bool]] = {}
    for about, marks in zip(task.turns, right, strict=True):
        for (kind, _, _), mark in zip(about, marks, strict=True):
            hits.setdefault(kind, []).append(mark)
    return {kind: 100 * sum(marks) / len(marks) for kind, marks in hits.items()}


def interval(right: list[list[bool]], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy, in percent.

    Pictures are drawn, not questions: those about one picture are right or wrong together.
    """
    hits = np.array([sum(about) for about in right])
    asked = np.array([len(about) for about in right])
    rows = np.random.default_rng(0).integers(len(hits), size=(draws, len(hits)))
    low, high = np.percentile(100 * hits[rows].sum(1) / asked[rows].sum(1), [2.5, 97.5])
    return float(low), float(high)


def mean_loss(
    right: dict[str, list[list[bool]]], other: dict[str, list[list[bool]]], draws: int = 2000
) -> tuple[float, float, float]:
    """How far the mean accuracy over the tasks is below `other`'s, in points, and its interval."""
    random, points, samples = np.random.default_rng(0), [], []
    for task, marks in right.items():
        asked = np.array([len(about) for about in marks])
        lost = np.array([sum(b) - sum(a) for a, b in zip(marks, other[task], strict=True)])
        rows = random.integers(len(lost), size=(draws, len(lost)))
        points.append(100 * lost.sum() / asked.sum())
        samples.append(100 * lost[rows].sum(1) / asked[rows].sum(1))
    low, high = np.percentile(np.mean(samples, axis=0), [2.5, 97.5])
    return float(np.mean(points)), float(low), float(high)
