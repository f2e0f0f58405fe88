"""Families: a plan for them, running a model, and the oracle's word on what comes out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import oracle_forward
from random_families import (
    Batch,
    Kind,
    Segment,
    angles,
    config,
    into_stack,
    seen_by_oracle,
)
from torch import Tensor

import yopo
from yopo.plan.config_fields import head_dim
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

KEEP = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]])


TOLERANCE = 1e-4


def a_plan(**changes: Any) -> PruningPlan:
    return PruningPlan(KEEP, **(dict(window=3, layer_cut=2, ffn_ratio=2) | changes))


def some_sinks(kind: Kind) -> Sinks:
    """For `a_plan` of that kind."""
    generator = torch.Generator().manual_seed(2)
    dim = head_dim(config(kind))
    return Sinks(*(torch.randn(*KEEP.shape, *more, generator=generator) for more in ((), (dim,))))


def mixed(kind: Kind) -> list[list[Segment]]:
    """Rows of different lengths: two images of different sizes, text alone, one image, a video."""
    last = len(kind.sizes) - 1
    rows = [
        [("text", 3), ("image", 0), ("text", 2), ("image", last), ("text", 4)],
        [("text", 6)],
        [("image", last // 2), ("text", 3)],
    ]
    if kind.videos:
        rows.append([("text", 2), ("video", 1), ("image", 1), ("text", 2), ("video", 0)])
    return rows


def truth(model: Any, plan: PruningPlan, batch: Batch, fed: SimpleNamespace) -> Any:
    """What the oracle says of the embeddings that stock handed to its decoder stack."""
    turned = angles(model, fed.positions, batch.ids.shape[1]).expand(len(batch.ids), -1, -1)
    return oracle_forward(
        seen_by_oracle(model), plan, fed.embeds, batch.layout, batch.mask, angles=turned
    )


def check(ours: Tensor, theirs: Tensor, valid: Tensor) -> None:
    assert torch.isfinite(ours).all()
    worst = (ours.double() - theirs)[valid].abs().max().item()
    assert worst <= TOLERANCE, f"differs by {worst:.3g}"


def same(ours: Any, stock: Any) -> None:
    assert torch.equal(ours.logits, stock.logits)
    assert (ours.hidden_states is None) == (stock.hidden_states is None)
    for a, b in zip(ours.hidden_states or (), stock.hidden_states or (), strict=True):
        assert torch.equal(a, b)
    assert type(ours.past_key_values) is type(stock.past_key_values)


def run(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **more)


def rows(kind: Kind) -> st.SearchStrategy[list[list[Segment]]]:
    text = st.tuples(st.just("text"), st.integers(1, 4))
    pieces = [text, st.tuples(st.just("image"), st.integers(0, len(kind.sizes) - 1))]
    if kind.videos:
        pieces.append(st.tuples(st.just("video"), st.integers(0, len(kind.videos) - 1)))
    row = st.lists(st.one_of(*pieces), min_size=1, max_size=5)
    few = row.filter(lambda r: sum(s[0] != "text" for s in r) <= 2)
    return st.lists(few, min_size=1, max_size=3)


def compare(model: Any, plan: PruningPlan, batch: Batch, positions: bool = True) -> None:
    inputs = batch.inputs(model, positions)
    fed = into_stack(model, inputs)
    theirs = truth(model, plan, batch, fed)
    yopo.apply(model, plan)
    try:
        ours = run(model, inputs, output_hidden_states=True, use_cache=False)
    finally:
        yopo.remove(model)
    for mine, state in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        check(mine, state, batch.mask.bool())
    check(ours.logits, theirs.logits, batch.mask.bool())


def later(model: Any, inputs: dict[str, Any], tokens: Tensor, past: Any) -> dict[str, Any]:
    """The arguments of a forward over `tokens` (B, k) after a prompt and what came behind it."""
    length = past.get_seq_length()
    k = tokens.shape[1]
    mask = inputs["attention_mask"]
    ones = torch.ones(len(mask), length + k - mask.shape[1], dtype=mask.dtype)
    steps = torch.arange(length - mask.shape[1], length - mask.shape[1] + k)
    start = inputs["position_ids"].amax(-1, keepdim=True)
    if start.dim() == 3:
        start = start.amax(0, keepdim=True).expand(3, -1, -1)
    return dict(
        input_ids=tokens,
        attention_mask=torch.cat([mask, ones], 1),
        position_ids=start + 1 + steps,
        past_key_values=past,
    )
