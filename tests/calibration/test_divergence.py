"""What a plan changes of a model's answers, against stock's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_samples import eager, sample
from layouts import KEEP, SHAPE, VOCAB, a_plan, build, make_case
from oracle import oracle_forward
from torch import Tensor
from torch.nn import functional as F

import yopo
from yopo.calibration.divergence import divergence, references
from yopo.plan.pruning_plan import PruningPlan
from yopo.prompts.sample import with_answer

ANSWER = torch.tensor([[3, 17, 4]])


def answered(seed: int) -> dict[str, Any]:
    return {**sample(seed), "answer_ids": ANSWER}


def dense_logits(embeds: Tensor) -> Tensor:
    with torch.no_grad():
        return eager(SHAPE)(inputs_embeds=embeds).logits[0]


def embedded(ids: Tensor) -> Tensor:
    return build(SHAPE).get_input_embeddings()(ids).detach()


def test_the_reference_is_stock_s_at_every_token_of_the_answer() -> None:
    (found,) = references(build(SHAPE), [answered(0)])
    embeds = torch.cat([sample(0)["inputs_embeds"], embedded(ANSWER)], dim=1)
    expected = dense_logits(embeds)[-4:-1].log_softmax(-1)  # what comes before each token
    torch.testing.assert_close(found.log_probabilities, expected, rtol=1e-5, atol=1e-5)
    assert (found.prompt.text_before, found.prompt.text_after) == (2, 4)
    assert found.prompt.grids == ((3, 4),)


def test_an_answer_that_is_not_given_is_stock_s_greedy_one() -> None:
    (found,) = references(build(SHAPE), [sample(0)], answer_tokens=5)
    embeds = sample(0)["inputs_embeds"]
    tokens = []
    for _ in range(5):
        tokens.append(int(dense_logits(embeds)[-1].argmax()))
        embeds = torch.cat([embeds, embedded(torch.tensor([tokens[-1:]]))], dim=1)
    assert found.answer.tolist() == [tokens]


def test_ids_are_answered_as_embeddings_are() -> None:
    model, given = build(SHAPE), sample(0)
    ids = torch.arange(18)[None] % VOCAB
    by_ids = {"input_ids": ids, "visual_mask": given["visual_mask"]}
    by_ids["visual_grids"] = given["visual_grids"]
    by_embeds = {**by_ids, "inputs_embeds": embedded(ids)}
    del by_embeds["input_ids"]
    one, other = (references(model, [x], answer_tokens=3)[0] for x in (by_ids, by_embeds))
    assert torch.equal(one.answer, other.answer)
    torch.testing.assert_close(one.log_probabilities, other.log_probabilities)


def test_divergence_is_the_kl_from_dense_at_the_answer() -> None:
    model, plan = build(SHAPE), a_plan("drop", "drop")
    found = divergence(model, plan, references(model, [answered(0), answered(1)]))
    expected, same = [], []
    for seed in (0, 1):
        row = [("text", 2), ("image", 3, 4, False), ("text", 4 + 3)]
        case = make_case([row], SHAPE.heads * 8)
        embeds = torch.cat([sample(seed)["inputs_embeds"], embedded(ANSWER)], dim=1)
        pruned = oracle_forward(model, plan, embeds, case.layout).logits[0, -4:-1].log_softmax(-1)
        dense = dense_logits(embeds)[-4:-1].double().log_softmax(-1)
        kl = F.kl_div(pruned, dense, log_target=True, reduction="none").sum(-1)
        expected.append(kl.mean().detach())
        same.append(bool((pruned.argmax(-1) == dense.argmax(-1)).all()))
    torch.testing.assert_close(found.kl, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert found.same.tolist() == same
    assert found.kl.min() > 0.01  # there was something to tell


def test_a_plan_that_prunes_nothing_changes_nothing() -> None:
    model = build(SHAPE)
    found = divergence(model, PruningPlan.dense(model.config), references(model, [sample(0)]))
    assert found.kl.abs().max() < 1e-9 and found.same.all()


def test_at_a_temperature_it_is_the_kl_of_softened_answers() -> None:
    model, plan = build(SHAPE), a_plan("drop", "drop")
    known = references(model, [answered(0)])
    with torch.no_grad():
        yopo.apply(model, plan)
        pruned = model(**known[0].inputs).logits[0, -3:]
        yopo.remove(model)
    soft = [(x / 4).double().log_softmax(-1) for x in (pruned, known[0].log_probabilities)]
    expected = 16 * F.kl_div(*soft, log_target=True, reduction="none").sum(-1).mean()
    found = divergence(model, plan, known, 4).kl[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_samples_that_are_alike_go_together_and_give_what_each_gives_alone() -> None:
    model, plan = build(SHAPE), a_plan("drop", "drop")
    known = references(model, [answered(0), sample(1, SHAPE, after=9), answered(2), answered(3)], 2)
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["inputs_embeds"]))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    found = divergence(model, plan, known)
    hook.remove()
    assert sorted(sizes) == [1, 3]
    alone = [divergence(model, plan, [one]) for one in known]
    torch.testing.assert_close(found.kl, torch.cat([a.kl for a in alone]), rtol=1e-4, atol=1e-7)
    assert found.same.tolist() == [bool(a.same) for a in alone]


def test_the_model_keeps_its_own_plan() -> None:
    model = yopo.apply(build(SHAPE), a_plan()).train()
    known = references(model, [answered(0)])
    assert torch.equal(
        known[0].log_probabilities, references(build(SHAPE), [answered(0)])[0].log_probabilities
    )
    divergence(model, PruningPlan(KEEP), known)
    assert yopo.plan_of(model) == a_plan() and model.training


def test_positions_and_masks_go_on_through_the_answer() -> None:
    given = sample(0)
    given["position_ids"] = torch.arange(18)[None] * 2
    given["attention_mask"] = torch.ones(1, 18, dtype=torch.long)
    longer = with_answer(build(SHAPE), given, ANSWER)
    assert longer["position_ids"][0, -4:].tolist() == [34, 35, 36, 37]
    assert longer["attention_mask"].tolist() == [[1] * 21]
    assert longer["visual_mask"].sum() == 12 and not longer["visual_mask"][0, 18:].any()
    assert longer["visual_grids"] == given["visual_grids"]
    assert given["inputs_embeds"].shape[1] == 18


@pytest.mark.parametrize("answer", [torch.zeros(1, 0), torch.zeros(2, 3), torch.zeros(3)])
def test_what_is_no_answer_is_refused(answer: Tensor) -> None:
    with pytest.raises(ValueError, match="answer_ids has shape"):
        references(build(SHAPE), [{**sample(0), "answer_ids": answer.long()}])
