"""The engine equals the dense oracle on random batches, plans and shapes, visual rows too."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Case, Shape, build, cases, make_case, needs_float16, plans, random_sinks, shapes
from oracle import oracle_forward
from torch import Tensor

from yopo.engine import text_attention
from yopo.engine.layout import VisualLayout
from yopo.models.told import call
from yopo.plan.pruning_plan import PruningPlan

TOLERANCE = 1e-4
MASS = [
    ("exact", "exact"),
    ("exact", "drop"),
    ("drop", "exact"),
    ("drop", "drop"),
    ("sink", "sink"),
]


def check(ours: Tensor, truth: Tensor, valid: Tensor, tolerance: float = TOLERANCE) -> None:
    assert torch.isfinite(ours).all(), "padding rows must stay finite, too: their gradients mix in"
    worst = (ours.double() - truth)[valid].abs().max().item()
    assert worst <= tolerance, f"differs by {worst:.3g}"


def run_both(shape: Shape, plan: PruningPlan, case: Case) -> None:
    model = build(shape, plan)
    with torch.no_grad():
        out = model(**case.kwargs(), output_hidden_states=True, use_cache=False)
        truth = oracle_forward(
            model, plan, case.inputs_embeds, case.layout, case.attention_mask, case.position_ids
        )
    assert len(out.hidden_states) == shape.layers + 1
    for ours, state in zip(out.hidden_states, truth.hidden_states, strict=True):
        check(ours, state, case.valid)
    check(out.logits, truth.logits, case.valid)


@given(data=st.data())
@settings(max_examples=400)
def test_prefill_is_the_oracles(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    run_both(shape, plan, data.draw(cases(shape.heads * 8)))


@given(data=st.data())
@settings(max_examples=100)
def test_prefill_of_long_texts_is_the_oracles(data: st.DataObject) -> None:
    """They see by `InTurn`, as any text here does that is no shorter than the rest."""
    with patch.object(text_attention, "LONG", 1):
        test_prefill_is_the_oracles.hypothesis.inner_test(data)


def test_long_texts_hold_no_mask() -> None:
    shape = Shape()
    plan = PruningPlan(torch.eye(shape.layers, shape.heads).bool(), layer_cut=1, window=3)
    model = build(shape, plan)
    case = make_case([[("text", 2), ("image", 2, 3, False), ("text", 9)]] * 2, shape.heads * 8)
    held: list[tuple[int, ...]] = []

    def pack(each: Tensor) -> Tensor:
        held.append(tuple(each.shape[-2:]))
        return each

    def hold() -> None:
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
            model(**case.kwargs(), use_cache=False)

    hold()
    assert (11, 17) in held  # text queries, and all that they may see
    with patch.object(text_attention, "LONG", 11):
        hold()
    assert not {(11, 17), (17, 17), (11, 11)} & set(held)


CORNERS = {
    "image first": [[("image", 2, 3, False), ("text", 3)]],
    "image last": [[("text", 3), ("image", 2, 3, False)]],
    "image alone": [[("image", 3, 2, False)]],
    "adjacent": [[("text", 1), ("image", 2, 2, False), ("image", 1, 5, False), ("text", 2)]],
    "newlines": [[("text", 2), ("image", 3, 2, True), ("text", 2)]],
    "some rows without": [[("text", 5)], [("text", 1), ("image", 2, 2, False)], [("text", 2)]],
}


@pytest.mark.parametrize("prune_visual_queries", [True, False])
@pytest.mark.parametrize("masses", MASS, ids="/".join)
@pytest.mark.parametrize("name", CORNERS)
def test_corners(name: str, masses: tuple[str, str], prune_visual_queries: bool) -> None:
    """What a random search might miss: each place of an image, each cut, no kept head."""
    shape = Shape()
    case = make_case(CORNERS[name], shape.heads * 8, pads=[(1, 0)] * len(CORNERS[name]))
    for cut in (0, 2, 3):
        plan = PruningPlan(
            torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]),
            window=3,
            layer_cut=cut,
            ffn_ratio=2,
            head_mass=masses[0],
            cut_mass=masses[1],
            prune_visual_queries=prune_visual_queries,
            sinks=random_sinks(shape, 3, True),
        )
        run_both(shape, plan, case)


@given(data=st.data())
@settings(max_examples=60)
def test_layout_counts_places_right(data: st.DataObject) -> None:
    case = data.draw(cases(8))
    layout = VisualLayout.from_mask(case.visual, case.grids)
    for name in ("visual", "image", "row", "col"):
        assert torch.equal(getattr(layout, name), getattr(case, name)), name
    assert [list(row) for row in layout.grids] == case.all_grids


def test_layout_of_the_call_is_the_argument() -> None:
    """LLaVA's way (the call's layout) gives what the argument gives."""
    shape = Shape()
    plan = PruningPlan(torch.tensor([[1, 0, 1, 0]] * 3), window=3, layer_cut=2, ffn_ratio=2)
    case = make_case([[("text", 2), ("image", 2, 3, False), ("text", 3)], [("text", 5)]], 32)
    model = build(shape, plan)
    arguments = case.kwargs()
    with torch.no_grad():
        told = model(**arguments).logits
        del arguments["visual_mask"], arguments["visual_grids"]
        with call(VisualLayout.from_mask(case.visual, case.grids)):
            held = model(**arguments).logits
        with pytest.raises(ValueError, match="nothing is known"):  # it must not outlive its call
            model(**arguments)
    assert torch.equal(told, held)


@pytest.mark.parametrize("masses", [("exact", "exact"), ("drop", "drop"), ("sink", "sink")])
@pytest.mark.parametrize(
    "dtype,tolerance",
    [(torch.bfloat16, 0.25), pytest.param(torch.float16, 0.04, marks=needs_float16)],
)
def test_half_precision_is_near(
    dtype: torch.dtype, tolerance: float, masses: tuple[str, str]
) -> None:
    shape = Shape()
    plan = PruningPlan(
        torch.tensor([[1, 0, 1, 0]] * 3),
        window=3,
        layer_cut=2,
        ffn_ratio=2,
        head_mass=masses[0],
        cut_mass=masses[1],
        sinks=random_sinks(shape, 20, True),
    )
    first = [("text", 4), ("image", 5, 5, False), ("text", 3)]
    case = make_case([first, [("image", 3, 2, False), ("text", 4)]], 32, pads=[(1, 0), (1, 0)])
    model = build(shape, plan).to(dtype)
    case.inputs_embeds = case.inputs_embeds.to(dtype)
    with torch.no_grad():
        out = model(**case.kwargs())
        truth = oracle_forward(model, plan, case.inputs_embeds, case.layout, case.attention_mask)
    assert out.logits.isfinite().all()
    difference = (out.logits.double() - truth.logits)[case.valid]
    assert difference.abs().mean() < tolerance / 3, difference.abs().mean()
    assert difference.abs().max() < 4 * tolerance, difference.abs().max()


def test_float64_stays_float64() -> None:
    shape = Shape()
    plan = PruningPlan(torch.tensor([[1, 0, 1, 0]] * 3), window=3, layer_cut=2, ffn_ratio=2)
    case = make_case([[("text", 2), ("image", 2, 3, False), ("text", 3)]], 32)
    model = build(shape, plan).double()
    case.inputs_embeds = case.inputs_embeds.double()
    with torch.no_grad():
        hidden = model.model(**case.kwargs()).last_hidden_state
        truth = oracle_forward(model, plan, case.inputs_embeds, case.layout).last_hidden_state
    assert hidden.dtype == torch.float64
    check(hidden, truth, case.valid, 1e-5)
