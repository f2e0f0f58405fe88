"""graphed: decode steps over buffers of a fixed size, here uncaptured, are those that grow."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import SHAPE as GROUPED
from layouts import Case, Shape, a_plan, build, cases, make_case, plans, random_sinks, shapes
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F

import yopo
from yopo.models import decode_graph, prefill_graph

SHAPE = replace(GROUPED, kv_heads=GROUPED.heads)
ROWS = [[("text", 2), ("image", 3, 3, False), ("text", 3)]]
pytestmark = pytest.mark.skipif(
    not hasattr(F, "rms_norm") or Version(transformers.__version__) < Version("4.43"),
    reason="fused weights need torch 2.4; angles of a decoder's own module, transformers 4.43",
)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps went by fixed buffers."""
    count, call = [0], decode_graph.Step.__call__

    def counted(*args: Any) -> Tensor:
        count[0] += 1
        return call(*args)

    monkeypatch.setattr(decode_graph.Step, "__call__", counted)
    return count


@pytest.fixture(autouse=True)
def short_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "TEXT_SLOTS", 4)
    monkeypatch.setattr(decode_graph, "VISUAL_SLOTS", 4)


def plan_with(mass: str) -> Any:
    sinks = random_sinks(SHAPE, 0, True) if mass == "sink" else None
    return a_plan(mass, mass, sinks=sinks)


@torch.no_grad()
def decoded(model: Any, case: Case, steps: int = 6) -> list[Tensor]:
    out = model(**case.kwargs(), use_cache=True)
    logits = [out.logits[:, -1:]]
    for number in range(steps):
        token = torch.full((case.shape[0], 1), number + 1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return logits


def near(ours: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(ours, expected, strict=True)
    return all((a - b).abs().max() <= 2e-5 * (1 + b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("mass", ["drop", "sink"])
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_those_of_a_cache_that_grows(mass: str, batch: int, ran: list[int]) -> None:
    plan, case = plan_with(mass), make_case(ROWS * batch, SHAPE.heads * 8)
    expected = decoded(build(SHAPE, plan), case)
    model = build(SHAPE, plan)
    assert yopo.graphed(model) is model
    assert near(decoded(model, case), expected)
    assert ran == [6]
    yopo.unfuse(model)
    assert near(decoded(model, case), expected) and ran == [6]


@pytest.mark.parametrize("mass", ["exact", "drop", "sink"])
@pytest.mark.parametrize("texts", [1, 3, 30, 40])
def test_a_prefill_is_that_of_any_number_of_text_tokens(
    mass: str, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, call = [0], prefill_graph.Prefill.__call__

    def counted(*args: Any) -> Tensor:
        runs[0] += 1
        return call(*args)

    monkeypatch.setattr(prefill_graph.Prefill, "__call__", counted)
    rows = [[("text", 2), ("image", 3, 3, False), ("text", texts)]] * 2
    plan, case = plan_with(mass), make_case(rows, SHAPE.heads * 8)
    model = yopo.graphed(build(SHAPE, plan))
    with torch.no_grad():
        ours, expected = (m(**case.kwargs(), use_cache=True) for m in (model, build(SHAPE, plan)))
        assert runs == [1] and near([ours.logits], [expected.logits])
        past = ours.past_key_values
        assert past.nbytes() == expected.past_key_values.nbytes()
        assert torch.equal(past.text_order, expected.past_key_values.text_order)
        more = {"input_ids": torch.tensor([[1, 2, 3]] * 2), "use_cache": True}
        ours, expected = (
            m(**more, past_key_values=out.past_key_values).logits
            for m, out in ((model, ours), (build(SHAPE, plan), expected))
        )
    assert near([ours], [expected])


def test_a_prefill_of_other_lengths_takes_the_same_capture_as_long_as_it_fits() -> None:
    model = yopo.graphed(build(SHAPE, plan_with("drop")))
    for texts in (3, 7, 20):
        rows = [[("text", 2), ("image", 3, 3, False), ("text", texts)]]
        case = make_case(rows, SHAPE.heads * 8)
        expected = decoded(build(SHAPE, plan_with("drop")), case, 2)
        assert near(decoded(model, case, 2), expected)
    assert sum(type(one) is prefill_graph.Prefill for one in captured(model)) == 1


def test_prompts_of_layouts_seen_before_and_of_others_take_turns_in_one_capture() -> None:
    """Text before the image or behind it, an image more or fewer rows high: each once more."""
    model, plan = yopo.graphed(build(SHAPE, plan_with("sink"))), plan_with("sink")
    for before, behind, tall in [(2, 3, 3), (3, 2, 3), (2, 3, 3), (2, 3, 2), (3, 2, 3), (2, 3, 2)]:
        rows = [[("text", before), ("image", tall, 3, False), ("text", behind)]]
        case = make_case(rows, SHAPE.heads * 8)
        assert near(decoded(model, case, 2), decoded(build(SHAPE, plan), case, 2))
    other = plan_with("drop")
    yopo.apply(model, other)
    yopo.graphed(model)
    assert near(decoded(model, case, 2), decoded(build(SHAPE, other), case, 2))


def captured(model: Any) -> list[Any]:
    return list(model.model._yopo_graphs._captured.values())


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_on_random_layouts_and_plans_too(data: Any) -> None:
    shape: Shape = data.draw(shapes())
    plan, case = data.draw(plans(shape)), data.draw(cases(shape.heads * 8))
    expected = decoded(build(shape, plan), case, 3)
    assert near(decoded(yopo.graphed(build(shape, plan)), case, 3), expected)


def test_two_caches_take_turns(ran: list[int]) -> None:
    plan = a_plan("drop", "drop")
    case = make_case(ROWS, SHAPE.heads * 8)
    expected = decoded(build(SHAPE, plan), case, 4)
    model = yopo.graphed(build(SHAPE, plan))
    with torch.no_grad():
        pasts = [model(**case.kwargs(), use_cache=True).past_key_values for _ in range(2)]
        for number in range(4):
            for past in pasts:
                token = torch.tensor([[number + 1]])
                out = model(input_ids=token, past_key_values=past, use_cache=True).logits
                assert near([out], [expected[number + 1]])
    assert ran == [8]


def test_a_step_of_two_tokens_goes_on_from_the_same_buffers(ran: list[int]) -> None:
    plan, case = a_plan("drop", "drop"), make_case(ROWS, SHAPE.heads * 8)
    logits = []
    for model in (build(SHAPE, plan), yopo.graphed(build(SHAPE, plan))):
        with torch.no_grad():
            past = model(**case.kwargs(), use_cache=True).past_key_values
            for tokens in ([[1]], [[2, 3]], [[4]]):
                out = model(input_ids=torch.tensor(tokens), past_key_values=past, use_cache=True)
        logits.append(out.logits)
    assert near(*([x] for x in logits)) and ran == [2]


def test_beams_and_generate_give_the_same_tokens(ran: list[int]) -> None:
    plan, case = a_plan("drop", "drop"), make_case(ROWS, SHAPE.heads * 8)
    kwargs = {**case.kwargs(), "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    del kwargs["position_ids"]
    plain, model = build(SHAPE, plan), yopo.graphed(build(SHAPE, plan))
    for beams in (1, 3):
        ours, expected = (m.generate(**kwargs, num_beams=beams) for m in (model, plain))
        assert torch.equal(ours, expected)
    assert ran[0] > 6


def test_what_cannot_be_captured_runs_as_before(ran: list[int]) -> None:
    case = make_case(ROWS, SHAPE.heads * 8)
    for plan, shape in (
        (a_plan("exact", "exact"), SHAPE),
        (a_plan("drop", "exact"), SHAPE),
        (a_plan("drop", "drop"), GROUPED),
    ):
        expected = decoded(build(shape, plan), case)
        assert near(decoded(yopo.graphed(build(shape, plan)), case), expected)
    assert ran == [0]


def test_a_copy_has_no_steps_of_the_other_s_and_remove_ends_them() -> None:
    model = yopo.graphed(build(SHAPE, a_plan("drop", "drop")))
    assert copy.deepcopy(model).model._yopo_graphs is None
    yopo.remove(model)
    assert "_yopo_graphs" not in vars(model.model)


def test_what_was_captured_goes_with_the_last_who_needs_it_not_with_the_garbage() -> None:
    """A GPU's memory is no reason for a collection."""
    model, case = yopo.graphed(build(SHAPE, plan_with("drop"))), make_case(ROWS, SHAPE.heads * 8)
    decoded(model, case, 1)
    held = [weakref.ref(one) for one in captured(model)]
    whole = weakref.ref(vars(model.model.layers[0])["_yopo_laid"].weights[0])
    assert len(held) == 2
    gc.disable()
    try:
        yopo.unfuse(model)
        assert not any(one() for one in held) and whole() is None
    finally:
        gc.enable()


def test_with_a_hook_on_a_layer_or_in_training_mode_nothing_is_captured(ran: list[int]) -> None:
    case, seen = make_case(ROWS, SHAPE.heads * 8), []
    model = yopo.graphed(build(SHAPE, plan_with("drop")))
    hook = model.model.layers[1].register_forward_hook(
        lambda _, args, out: seen.append(len(args[0]))
    )
    expected = decoded(build(SHAPE, plan_with("drop")), case)
    assert near(decoded(model, case), expected)
    assert seen == [int(case.valid.sum())] + 6 * [1] and ran == [0]
    hook.remove()
    decoded(model.train(), case)
    assert ran == [0] and not captured(model)
    decoded(model.eval(), case)
    assert ran == [6]


def test_a_hook_may_call_the_model_again() -> None:
    case, again = make_case(ROWS, SHAPE.heads * 8), []
    model = yopo.graphed(build(SHAPE, plan_with("drop")))

    def hook(*_: Any) -> None:
        if not again:
            again.append(1)
            model(**case.kwargs(), use_cache=True)

    model.model.layers[0].register_forward_hook(hook)
    assert near(decoded(model, case), decoded(build(SHAPE, plan_with("drop")), case))
    assert again
