"""generate() over a pruned pass, greedy, beams, sampling, streaming: against recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import MASS, ROWS, SHAPE, VOCAB, Case, a_plan, build, left_padded, make_case
from oracle import extended, oracle_forward, oracle_greedy
from torch import Tensor

from yopo import remove
from yopo.plan.pruning_plan import PruningPlan


@pytest.mark.parametrize("masses", MASS, ids="/".join)
@pytest.mark.parametrize("kind", ["inputs_embeds", "input_ids"])
def test_generate_greedy(kind: str, masses: tuple[str, str]) -> None:
    plan = a_plan(*masses)
    model = build(SHAPE, plan)
    case = left_padded()
    told = case.kwargs()
    del told["inputs_embeds"], told["position_ids"]
    if kind == "input_ids":
        ids = torch.randint(1, VOCAB, case.shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            case.inputs_embeds = model.model.embed_tokens(ids)
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False, **told)[:, ids.shape[1] :]
    else:
        tokens = model.generate(
            inputs_embeds=case.inputs_embeds, max_new_tokens=6, do_sample=False, **told
        )[:, -6:]  # 4.36 puts the bos token first
    with torch.no_grad():
        truth = oracle_greedy(model, plan, case.inputs_embeds, case.layout, 6, case.attention_mask)
    assert torch.equal(tokens, truth)


def beams(model: Any, plan: PruningPlan, case: Case, width: int, steps: int) -> Tensor:
    """Plain beam search by full recomputation, no end token: (B, width, steps), best first."""
    answers = []
    for b in range(case.shape[0]):
        row = case.alone(b)
        kept = [(0.0, [])]
        for step in range(steps):
            grown = []
            for score, tokens in kept:
                embeds = model.model.embed_tokens(torch.tensor([tokens], dtype=torch.long))
                embeds = torch.cat([row.inputs_embeds, embeds], 1)
                out = oracle_forward(model, plan, embeds, extended(row.layout, step))
                chances = out.logits[0, -1].log_softmax(-1).tolist()
                grown += [(score + c, [*tokens, t]) for t, c in enumerate(chances)]
            kept = sorted(grown, reverse=True)[:width]
        answers.append([tokens for _, tokens in kept])
    return torch.tensor(answers)


@pytest.mark.parametrize("returned", [1, 3])
def test_generate_beams(returned: int) -> None:
    plan = a_plan()
    model = build(SHAPE, plan)
    case = left_padded()
    tokens = model.generate(
        inputs_embeds=case.inputs_embeds,
        attention_mask=case.attention_mask,
        visual_mask=case.visual,
        visual_grids=case.grids,
        max_new_tokens=4,
        num_beams=3,
        num_return_sequences=returned,
        do_sample=False,
    )[:, -4:]
    with torch.no_grad():
        truth = beams(model, plan, case, 3, 4)[:, :returned].flatten(0, 1)
    assert torch.equal(tokens, truth)


@pytest.mark.parametrize("returned", [1, 2])
def test_generate_samples(returned: int) -> None:
    plan = a_plan("drop", "drop")
    model = build(SHAPE, plan)
    case = left_padded()
    torch.manual_seed(7)
    tokens = model.generate(
        inputs_embeds=case.inputs_embeds,
        attention_mask=case.attention_mask,
        visual_mask=case.visual,
        visual_grids=case.grids,
        max_new_tokens=5,
        do_sample=True,
        top_k=0,
        num_return_sequences=returned,
    )[:, -5:]
    many = case.repeated(returned)
    torch.manual_seed(7)
    truth: list[Tensor] = []
    with torch.no_grad():
        for step in range(5):
            embeds = many.inputs_embeds
            for token in truth:
                embeds = torch.cat([embeds, model.model.embed_tokens(token)], 1)
            mask = torch.nn.functional.pad(many.attention_mask, (0, step), value=1)
            out = oracle_forward(model, plan, embeds, extended(many.layout, step), mask)
            chances = out.logits[:, -1].float().softmax(-1)
            truth.append(torch.multinomial(chances, 1))
    assert torch.equal(tokens, torch.cat(truth, 1))


def test_generate_streams() -> None:
    class Listener:
        def __init__(self) -> None:
            self.heard: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.heard += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    plan = a_plan()
    model = build(SHAPE, plan)
    case = make_case([ROWS[0]], 32)
    listener = Listener()
    tokens = model.generate(
        inputs_embeds=case.inputs_embeds,
        attention_mask=torch.ones(case.shape, dtype=torch.long),
        visual_mask=case.visual,
        visual_grids=case.grids,
        max_new_tokens=5,
        do_sample=False,
        streamer=listener,
    )[:, -5:]
    assert listener.ended and listener.heard[-5:] == tokens[0].tolist()
    with torch.no_grad():
        truth = oracle_greedy(model, plan, case.inputs_embeds, case.layout, 5)
    assert torch.equal(tokens, truth)


@pytest.mark.parametrize("masses", MASS, ids="/".join)
def test_a_batch_padded_on_the_right_goes_on_as_stocks_does(masses: tuple[str, str]) -> None:
    """The next token of a short row is read off its last pad, so that pad must be computed. With
    every head kept and no window the pruned pass is the dense one, and stock the reference."""
    nothing = PruningPlan(torch.ones(3, 4), head_mass=masses[0], cut_mass=masses[1])
    model = build(SHAPE, nothing)
    case = make_case(ROWS, SHAPE.heads * 8)
    assert not case.attention_mask[:, -1].all()
    told = {"attention_mask": case.attention_mask, "max_new_tokens": 4, "do_sample": False}
    ours = model.generate(
        inputs_embeds=case.inputs_embeds,
        visual_mask=case.visual,
        visual_grids=case.all_grids,
        **told,
    )
    remove(model)
    assert torch.equal(ours, model.generate(inputs_embeds=case.inputs_embeds, **told))


@pytest.mark.parametrize("width", [3, 40])
def test_a_visual_mask_of_another_width_than_the_prompt_is_refused(width: int) -> None:
    model = build(SHAPE, a_plan())
    embeds = make_case([ROWS[0]], SHAPE.heads * 8).inputs_embeds
    mask = torch.zeros(1, width, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"visual_mask has shape \(1, {width}\)"):
        model.generate(inputs_embeds=embeds, visual_mask=mask, max_new_tokens=2)


def pruned_prompt() -> dict[str, Any]:
    case = make_case([[("text", 2), ("image", 2, 2, False), ("text", 3)]], SHAPE.heads * 8)
    return {"inputs_embeds": case.inputs_embeds, "visual_mask": case.visual, "max_new_tokens": 3}


def test_an_assistant_is_refused_at_an_image_and_right_without() -> None:
    model, dense = build(SHAPE, a_plan()), build(SHAPE, None)
    with pytest.raises(ValueError, match="assistant_model is given with visual_mask"):
        model.generate(**pruned_prompt(), assistant_model=dense)
    ids, how = torch.tensor([[3, 4, 5, 6]]), dict(max_new_tokens=6, do_sample=False)
    for main, assistant in ((model, dense), (dense, model)):
        found = main.generate(ids, assistant_model=assistant, **how)
        assert torch.equal(found, dense.generate(ids, **how))


def test_contrastive_search_over_an_image_is_refused_with_the_remedy() -> None:
    model, how = build(SHAPE, a_plan()), dict(penalty_alpha=0.6, top_k=4)
    ids = torch.tensor([[3, 4, 5, 6]])
    try:
        build(SHAPE, None).generate(ids, max_new_tokens=3, **how)
    except ValueError as error:
        pytest.skip(f"this transformers has no contrastive search of its own: {error}")
    assert model.generate(ids, max_new_tokens=3, **how).shape == (1, 7)
    with pytest.raises(TypeError, match="leave out penalty_alpha"):
        model.generate(**pruned_prompt(), **how)
