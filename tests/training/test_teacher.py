"""A teacher that is asked before training: what it said goes with the rows, is what the model says
without its plan, and stays so whatever becomes of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import a_plan
from random_families import KINDS, build
from tiny_processors import VOCAB, photos, processor

import yopo

KIND = KINDS["llava-llama"]
pytestmark = pytest.mark.skipif(not KIND.exists, reason="older than the families' support")


def rows() -> list[dict[str, Any]]:
    china, flower = photos()
    return [
        {"image": china, "question": "what is it?", "answer": "a red roof"},
        {"image": flower, "question": "and what is this one, please?", "answer": "no"},
        {"image": china, "question": "and this?", "answer": "yes"},
    ]


def model() -> Any:
    return yopo.apply(build(KIND, VOCAB), a_plan(head_mass="drop", cut_mass="drop"))


def collator() -> Any:
    return yopo.AnswerCollator(processor(KIND))


def a_plan_that_prunes_nothing() -> yopo.PruningPlan:
    return yopo.PruningPlan(torch.ones_like(a_plan().head_keep))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_that_of_a_teacher_s_pass_and_stays_with_what_it_said(
    temperature: float,
) -> None:
    pupil, collate = model().train(), yopo.AnswerCollator(processor(KIND))
    taught = yopo.teach(pupil, rows(), collate, batch=2, most=VOCAB)
    assert (
        pupil.training
        and [set(row) - set(rows()[0]) for row in taught] == [{"taught_ids", "taught_logs"}] * 3
    )
    settings: dict[str, Any] = {"temperature": temperature, "weight": 0.5}
    order = [2, 0]  # another batch than it was asked in
    known = collate([taught[n] for n in order])
    alone = collate([rows()[n] for n in order])
    loss, _ = yopo.distillation_loss(pupil, known, **settings)
    expected, _ = yopo.distillation_loss(pupil, alone, **settings)
    assert float(loss) == pytest.approx(float(expected), rel=1e-2)
    with torch.no_grad():
        pupil.get_output_embeddings().weight.mul_(0.5)
    moved, _ = yopo.distillation_loss(pupil, known, temperature=temperature)
    fixed = model()
    p = fixed_logs(fixed, alone) / temperature
    labels = alone["labels"][:, 1:]
    inputs = {name: value for name, value in alone.items() if name != "labels"}
    q = pupil(**inputs).logits[:, :-1][labels != -100] / temperature
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    kl = temperature**2 * (p.exp() * (p - q)).sum(-1).mean()
    assert float(moved) == pytest.approx(float(kl), rel=1e-2)


def fixed_logs(teacher: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), yopo.unpruned():
        logits = teacher(**inputs).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != -100]


def test_the_rest_of_the_likeliest_tokens_is_one_more_outcome() -> None:
    """So nothing is left to learn for a pupil that is its teacher, nor tokens to be unlearned."""
    pupil, collate = yopo.apply(build(KIND, VOCAB), a_plan_that_prunes_nothing()), collator()
    batch = collate(yopo.teach(pupil, rows(), collate, most=VOCAB // 4))
    loss, _ = yopo.distillation_loss(pupil, batch)
    assert abs(float(loss)) < 1e-3
    with pytest.raises(ValueError, match=f"temperature is 2.0, .* teach with most={VOCAB}"):
        yopo.distillation_loss(pupil, batch, temperature=2.0)


def test_a_teacher_leaves_each_module_in_its_mode_also_when_it_fails() -> None:
    pupil = model().train()
    pupil.lm_head.eval()
    yopo.teach(pupil, rows(), collator())

    def fails(rows: Any) -> Any:
        raise KeyError("image")

    with pytest.raises(KeyError):
        yopo.teach(pupil, rows(), fails)
    assert pupil.training and not pupil.lm_head.training


def test_an_adapter_is_off_for_its_teacher_and_learns_as_before() -> None:
    peft = pytest.importorskip("peft")
    pupil = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q_proj"]))
    frozen = [name for name, _ in pupil.named_parameters() if "lora_A" in name]
    for name, weight in pupil.named_parameters():
        if name in frozen:
            weight.requires_grad_(False)
        elif "lora_B" in name:
            torch.nn.init.normal_(weight)
    learning = [name for name, weight in pupil.named_parameters() if weight.requires_grad]
    collate = collator()
    taught = collate(yopo.teach(pupil, rows(), collate, most=VOCAB))
    loss, _ = yopo.distillation_loss(pupil, taught)
    alone, _ = yopo.distillation_loss(pupil, collate(rows()))
    assert float(loss) == pytest.approx(float(alone), rel=1e-2)
    assert frozen
    assert learning == [name for name, weight in pupil.named_parameters() if weight.requires_grad]


def test_another_collator_s_tokens_are_refused() -> None:
    pupil, collate = model(), yopo.AnswerCollator(processor(KIND))
    batch = collate(yopo.teach(pupil, rows(), collate))
    batch["labels"][0, -1] = batch["labels"][0].max()
    batch["labels"][:, :4] = 1
    with pytest.raises(ValueError, match="teach and train with the same collator"):
        yopo.distillation_loss(pupil, batch)
