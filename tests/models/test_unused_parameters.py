"""DistributedDataParallel waits for a gradient of each parameter: whatever the plan prunes, every
parameter of the text model gets one from any batch with text."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import build, cases, plans, shapes


@settings(max_examples=60)
@given(st.data())
def test_every_parameter_gets_a_gradient_under_every_plan(data: Any) -> None:
    shape = data.draw(shapes(max_layers=3))
    plan, case = data.draw(plans(shape)), data.draw(cases(shape.heads * 8))
    shown = case.valid & ~case.visual
    if not shown.any():
        return
    model = build(shape, plan).train()
    out = model(**case.kwargs(), use_cache=False).logits[shown]
    torch.nn.functional.cross_entropy(out, torch.zeros(len(out), dtype=torch.long)).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == ["model.embed_tokens.weight"]  # embeddings are given
