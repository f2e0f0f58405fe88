"""How far a pruned model's answers are from the dense model's: KL over the tokens of the answer,
and how many would come out the same.

The answer is fed to both (teacher forcing): the sample's own, or what the dense model says,
greedily. Runs models; decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from yopo.calibration.processes import in_turn
from yopo.calibration.sample_statistics import digest_of
from yopo.counting.flops import Prompt
from yopo.engine.visual_cache import VisualCache
from yopo.models.trial import under
from yopo.plan.pruning_plan import PruningPlan
from yopo.prompts.prompter import greedy
from yopo.prompts.sample import ANSWER, Sample, prompt_of, with_answer

BATCH_TOKENS = 4096  # that go through the model at once


@dataclass(frozen=True)
class Reference:
    """What the dense model, or one under a plan to compare with, makes of one sample.

    inputs: the prompt and, behind it, the answer without its last token.
    answer: (1, m) ids. log_probabilities: (m, V) float32, of the token at each place of the answer.
    prompt: where the image is.
    """

    inputs: dict[str, Any]
    answer: Tensor
    log_probabilities: Tensor
    prompt: Prompt


class Change(NamedTuple):
    """What a plan changes, sample by sample. kl: (S,) float64, of the pruned model from the dense
    one in nats, averaged over the answer's tokens. same: (S,) bool, at each of these tokens both
    models' likeliest is the same."""

    kl: Tensor
    same: Tensor


@torch.no_grad()
def references(
    model: nn.Module,
    samples: Iterable[Sample],
    answer_tokens: int = 16,
    plan: PruningPlan | None = None,
    watching: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> list[Reference]:
    """The dense `model` (whatever its plan), or the model under `plan`, on `samples`; where one has
    no answer, at most `answer_tokens` greedy tokens are. watching: gets the number of a sample, and
    gives the context in which its prompt and answer go through the model."""

    def made(index: int, sample: Sample) -> Reference:
        inputs = prompt_of(sample)
        answer = sample.get(ANSWER)
        if answer is None:
            answer = greedy(model, inputs, answer_tokens)
        if answer.dim() != 2 or answer.shape[0] != 1 or answer.shape[1] == 0:
            raise ValueError(
                f"{ANSWER} has shape {tuple(answer.shape)}; allowed: (1, tokens), not empty"
            )
        longer = with_answer(model, inputs, answer[:, :-1])
        with watching(index):
            out = model(**longer, use_cache=True)
        dense = out.logits[0, -answer.shape[1] :].float().log_softmax(-1)
        if not bool(dense.isfinite().all()):
            raise ValueError(
                f"sample {index} (the first is 0): the model's logits are not finite. Look at "
                "its weights and dtype (float16 overflows in some models: try bfloat16)"
            )
        if not isinstance(out.past_key_values, VisualCache):
            raise ValueError(
                f"sample {index} (the first is 0) shows no image: calibrating takes prompts "
                "with one"
            )
        prompt = _prompt(out.past_key_values, answer.shape[1] - 1)
        return Reference(longer, answer, dense.cpu(), prompt)

    with under(model, plan):
        if watching is not nullcontext:  # who looks on wants to see all of them
            return [made(index, sample) for index, sample in enumerate(samples)]
        return list(in_turn(samples, made, lambda sample: digest_of(prompt_of(sample))))


@torch.no_grad()
def divergence(
    model: nn.Module, plan: PruningPlan, known: Sequence[Reference], temperature: float = 1.0
) -> Change:
    """What `model` says under `plan` against what it says dense. Samples that are alike in shape go
    through it together. temperature: logits are divided by it, and KL multiplied by its square, as
    in distillation (arXiv 1503.02531): above 1 unlikely tokens count more."""
    kl = torch.empty(len(known), dtype=torch.float64)
    same = torch.empty(len(known), dtype=torch.bool)

    def changed(_: int, rows: list[int]) -> tuple[list[int], Tensor, Tensor]:
        batch = [known[row] for row in rows]
        count = batch[0].answer.shape[1]
        inputs = _together([reference.inputs for reference in batch])
        logits = model(**inputs, use_cache=False).logits[:, -count:]
        both = (
            logits.float().log_softmax(-1).cpu(),
            torch.stack([reference.log_probabilities for reference in batch]),
        )
        pruned, dense = ((one / temperature).log_softmax(-1) for one in both)
        moved = temperature**2 * (dense.exp() * (dense - pruned)).sum(-1).double().mean(1)
        return rows, moved, (dense.argmax(-1) == pruned.argmax(-1)).all(1)

    with under(model, plan):
        for rows, moved, kept in in_turn(_alike(known), changed):
            kl[rows], same[rows] = moved, kept
    return Change(kl, same)


def _alike(known: Sequence[Reference]) -> Iterator[list[int]]:
    """Numbers of references whose inputs make one batch without padding."""
    groups: dict[Any, list[int]] = {}
    for number, one in enumerate(known):
        # `number`: no other is like an input that does not begin with the batch.
        kind = [(name, _kind(value, number)) for name, value in sorted(one.inputs.items())]
        groups.setdefault((*kind, one.prompt, one.answer.shape), []).append(number)
    for numbers in groups.values():
        prompt = known[numbers[0]].prompt
        most = max(1, BATCH_TOKENS // (prompt.text + prompt.visual))
        for first in range(0, len(numbers), most):
            yield numbers[first : first + most]


def _kind(value: Any, alone: int) -> Any:
    """What two inputs must have in common to go together: both one row, of the same shape."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype) if value.dim() and value.shape[0] == 1 else alone
    if isinstance(value, list):
        return list if len(value) == 1 else alone
    return value if value is None or isinstance(value, bool | str) else alone


def _together(inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of inputs that are alike."""
    batch = dict(inputs[0])
    for name, value in batch.items():
        if len(inputs) > 1 and isinstance(value, Tensor):
            batch[name] = torch.cat([one[name] for one in inputs])
        elif len(inputs) > 1 and isinstance(value, list):
            batch[name] = [one[name][0] for one in inputs]
    return batch


def mean_kl(model: nn.Module, plan: PruningPlan, known: Sequence[Reference]) -> float:
    """KL of the answers of `known`, averaged, in nats a token; nan where there are none."""
    return float(divergence(model, plan, known).kl.mean()) if known else float("nan")


def _prompt(cache: VisualCache, answered: int) -> Prompt:
    """Where the image is in the sequence in `cache`, its last `answered` tokens left out."""
    visual = cache.layout.visual[0]
    n = len(visual) - answered
    before = int(visual.int().argmax())
    return Prompt(before, cache.layout.grids[0], n - before - int(visual.sum()))
