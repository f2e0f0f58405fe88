"""Which rows reach the modules of a layer under plans that say it per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import SHAPE, a_plan, build, cases, left_padded, plans, shapes
from oracle import oracle_forward
from torch import nn

from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import CACHE_FIELD

PARTS = (
    "input_layernorm",
    "self_attn",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp",
    "mlp.down_proj",
)


def rows_reaching(model: Any, case: Any) -> tuple[list[list[int]], Any, Any]:
    """For each layer the rows that each of its PARTS is given, the cache and the logits."""
    seen: list[list[int]] = []
    hooks = []
    for layer in model.model.layers:
        mine: list[int] = []
        seen.append(mine)
        for name in PARTS:
            part = layer.get_submodule(name)

            def look(_: Any, args: Any, kwargs: Any, mine: list[int] = mine) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                mine.append(len(x))

            hooks.append(part.register_forward_pre_hook(look, with_kwargs=True))
    with torch.no_grad():
        out = model(**case.kwargs(), use_cache=True)
    for hook in hooks:
        hook.remove()
    return seen, getattr(out, CACHE_FIELD), out.logits


def plan_of(**changes: Any) -> PruningPlan:
    """No head of layer 1 reads; below the cut all the same, as layer 2's do."""
    return a_plan("drop", "drop", layer_cut=3, ffn_ratio=1, window=None, **changes)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [  # of layer 1, in which no head reads: T text rows, N all
        ({}, "NNNNNN"),
        ({"visual_attention": False}, "NNTNNN"),
        ({"ffn": 0}, "NNNTTT"),
        ({"visual_attention": False, "ffn": 0}, "TTTTTT"),
    ],
)
def test_a_layer_that_does_nothing_to_visual_rows_never_sees_them(
    changes: dict[str, Any], rows: str
) -> None:
    each = {
        name: [None if name == "ffn" else True, value, value] for name, value in changes.items()
    }
    plan, case = plan_of(**each), left_padded()
    model = build(SHAPE, plan)
    seen, cache, logits = rows_reaching(model, case)
    text = int((case.valid & ~case.visual).sum())
    assert seen[0] == [int(case.valid.sum())] * len(PARTS)
    assert seen[1] == [text if kind == "T" else int(case.valid.sum()) for kind in rows]
    assert [sum(s.nbytes(visual_only=True) > 0 for s in stores) for stores in cache.stores] == [
        1,
        0,
        1,
    ]
    truth = oracle_forward(model, plan, case.inputs_embeds, case.layout, case.attention_mask).logits
    assert (logits - truth)[case.valid].abs().max() < 1e-4


def test_a_layer_that_freezes_visual_rows_takes_them_for_keys_and_values_alone() -> None:
    plan, case = plan_of(visual_attention=[True, True, False], ffn=[None, None, 0]), left_padded()
    seen, cache, _ = rows_reaching(build(SHAPE, plan), case)
    text, every = int((case.valid & ~case.visual).sum()), int(case.valid.sum())
    assert seen[2] == [every, every, text, text, text, text]
    assert cache.stores[2][0].visual_keys == cache.stores[2][0].visual_values > 0


@pytest.mark.parametrize("mass", ["exact", "drop"])
def test_under_exact_mass_a_frozen_layer_still_gives_every_head_its_keys(mass: str) -> None:
    plan, case = a_plan(mass, mass, visual_attention=False, ffn=0, ffn_ratio=1), left_padded()
    model = build(SHAPE, plan)
    seen, _, logits = rows_reaching(model, case)
    text, every = int((case.valid & ~case.visual).sum()), int(case.valid.sum())
    first = [every, every if mass == "exact" else text, every if mass == "exact" else text]
    assert [rows[0] for rows in seen] == first
    assert all(row == text for rows in seen for row in rows[2:])
    truth = oracle_forward(model, plan, case.inputs_embeds, case.layout, case.attention_mask).logits
    assert (logits - truth)[case.valid].abs().max() < 1e-4


class Somebodys(nn.Linear):
    """Of a class that the engine does not slice."""


@given(data=st.data(), watched=st.booleans())
@settings(max_examples=80)
@torch.no_grad()
def test_modules_that_cannot_be_sliced_are_called_and_give_the_same(
    data: st.DataObject, watched: bool
) -> None:
    """Random plans per layer, every projection hooked or of somebody's own class."""
    shape = data.draw(shapes())
    plan, case = data.draw(plans(shape)), data.draw(cases(shape.heads * 8))
    model = build(shape, plan)
    for module in [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]:
        if watched:
            module.register_forward_hook(lambda module, args, out: None)
        else:
            module.__class__ = Somebodys
    truth = oracle_forward(
        model, plan, case.inputs_embeds, case.layout, case.attention_mask, case.position_ids
    ).logits
    assert (model(**case.kwargs()).logits - truth)[case.valid].abs().max() < 1e-4
