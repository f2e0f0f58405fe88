"""Sinks in the engine: one softmax however the text is fed, trained, in half precision, and only
for what has an image before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layouts import SHAPE, Case, a_plan, build, make_case, random_sinks
from oracle import oracle_forward, oracle_greedy
from torch import Tensor, nn

from yopo import apply
from yopo.engine.text_attention import NO_SINK, additive, attend
from yopo.plan.pruning_plan import PruningPlan

ROWS = [
    [("text", 3), ("image", 2, 3, False), ("text", 2), ("image", 3, 3, False), ("text", 4)],
    [("text", 2), ("image", 4, 2, True), ("text", 6)],
    [("text", 7)],
]
DIM = SHAPE.heads * 8


def sink_plan(tokens: int | None = 6, with_b: bool = True, **changes: Any) -> PruningPlan:
    sinks = replace(random_sinks(SHAPE, 3, with_b), tokens=tokens)
    return a_plan("sink", "sink", sinks=sinks, **changes)


def truth_of(model: Any, plan: Any, case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    return oracle_forward(
        model, plan, case.inputs_embeds, case.layout, case.attention_mask, dtype=dtype
    ).logits


# --- one attention -------------------------------------------------------------------------------

SIGHTS = {"mask": False, "causal": True}


@pytest.fixture(params=[True, False], ids=["gradients", "no gradients"])
def grad(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients a kernel's own sums are used."""
    with torch.set_grad_enabled(request.param):
        yield


def one_by_one(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """Causal attention with a sink, written out in float64."""
    q, k, v, sink = (x.double() for x in (q, k, v, sink))
    scores = (q @ k.mT * 0.3).masked_fill(~seen(q, k), -torch.inf)
    return torch.cat([sink, scores], -1).softmax(-1)[..., 1:] @ v


def seen(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])


@pytest.mark.usefixtures("grad")
@pytest.mark.parametrize("causal", SIGHTS.values(), ids=SIGHTS)
@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["", "dropout's path"])
@pytest.mark.parametrize("queries", [1, 5])
def test_several_queries_take_the_share_that_one_alone_takes(
    queries: int, dropout: float, causal: bool
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (queries, 5, 5))
    sink = 3 * torch.randn(2, 3, queries, 1)
    if causal and queries < 5:
        k, v = k[:, :, :queries], v[:, :, :queries]
    mask = None if causal else additive(seen(q, k), q.dtype)
    out = attend(q, k, v, mask, 0.3, dropout, causal, sink)
    torch.testing.assert_close(out.double(), one_by_one(q, k, v, sink), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("grad")
@pytest.mark.parametrize("causal", SIGHTS.values(), ids=SIGHTS)
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sink_that_nobody_has_takes_no_share(
    dtype: torch.dtype, queries: int, causal: bool
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 64).to(dtype) for n in (queries, queries, queries))
    mask = None if causal else additive(seen(q, k), q.dtype)
    out = attend(q, k, v, mask, 0.125, 0.0, causal, torch.full((2, 3, queries, 1), NO_SINK))
    torch.testing.assert_close(out, attend(q, k, v, mask, 0.125, 0.0, causal))


@pytest.mark.usefixtures("grad")
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_round_the_logit(dtype: torch.dtype, queries: int) -> None:
    """Of logits of 20, bfloat16 rounds away up to 0.06, and 1.5 % of the share with it."""
    torch.manual_seed(0)
    q = torch.full((1, 50, queries, 64), 1.0).to(dtype)
    k, v = torch.full((1, 50, 6, 64), 2.5).to(dtype), torch.ones(1, 50, 6, 64).to(dtype)
    sink = 20 + 2.5 * torch.rand(1, 50, queries, 1)
    out = attend(q, k, v, None, 0.125, sink=sink)[..., 0]
    truth = (torch.tensor(6.0).log() + 20 - sink[..., 0]).sigmoid()
    assert ((out - truth) / truth).abs().max() < 0.006


@pytest.mark.parametrize("queries", [1, 4])
def test_dropout_takes_values_and_leaves_the_sink_its_share(queries: int) -> None:
    torch.manual_seed(0)
    q, k = torch.zeros(1, 1, queries, 8), torch.zeros(1, 1, 4, 8)
    v, sink = torch.ones(1, 1, 4, 8), torch.zeros(1, 1, queries, 1)
    outs = torch.stack([attend(q, k, v, None, 0.3, 0.5, sink=sink) for _ in range(2000)])
    assert abs(outs.mean() - 0.8) < 0.02, "the mean is that without dropout: 4 of 5 keys"
    assert set((outs / 0.4).unique().round(decimals=4).tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}


# --- however it is fed ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [6, None])
@pytest.mark.parametrize("with_b", [True, False])
@torch.no_grad()
def test_text_fed_token_by_token_and_between_images_is_one_prefill(
    tokens: int | None, with_b: bool
) -> None:
    """Row 0 by itself: text, an image, text, another image, text; each text token alone."""
    plan = sink_plan(tokens, with_b, window_causal=True)
    case = make_case(ROWS[:1], DIM)
    model = build(SHAPE, plan)
    truth, past, n = truth_of(model, plan, case), None, case.shape[1]
    edges = [0, 1, 2, 3, 9, 10, 11, 20, *range(21, n + 1)]
    for start, stop in pairwise(edges):
        out = model(
            inputs_embeds=case.inputs_embeds[:, start:stop],
            visual_mask=case.visual[:, start:stop],
            visual_grids={3: [[(2, 3)]], 11: [[(3, 3)]]}.get(start),
            past_key_values=past,
            use_cache=True,
        )
        past = out.past_key_values
        assert (out.logits - truth[:, start:stop]).abs().max() < 1e-4, (start, stop)


@pytest.mark.parametrize("tokens", [6, None])
@torch.no_grad()
def test_rows_with_one_two_and_no_image_are_each_as_alone_and_generate_as_the_oracle(
    tokens: int | None,
) -> None:
    plan = sink_plan(tokens)
    case = make_case(ROWS, DIM, pads=[(1, 0)] * 3)
    model = build(SHAPE, plan)
    together = model(**case.kwargs()).logits
    for b in range(3):
        alone = case.alone(b)
        assert (together[b, case.valid[b]] - truth_of(model, plan, alone)[0]).abs().max() < 1e-4
    generated = model.generate(**case.kwargs(), max_new_tokens=6, do_sample=False)
    steps = oracle_greedy(model, plan, case.inputs_embeds, case.layout, 6, case.attention_mask)
    assert torch.equal(generated[:, -6:], steps)


@torch.no_grad()
def test_text_before_the_first_image_and_rows_without_one_have_no_sink() -> None:
    """Whatever their sinks are, and though there are other rows and later tokens that have them."""
    case = make_case(ROWS, DIM)
    outs = []
    for scale in (1, -2):
        plan = sink_plan()
        sinks = replace(plan.sinks, a=scale * plan.sinks.a, b=scale * plan.sinks.b)
        outs.append(build(SHAPE, replace(plan, sinks=sinks))(**case.kwargs()).logits)
    near = (outs[0] - outs[1]).abs().amax(-1) < 1e-5
    image_before = case.visual.cumsum(1) > 0
    text_after = case.valid & image_before & ~case.visual
    assert near[case.valid & ~image_before].all() and not near[text_after].any()


@torch.no_grad()
def test_as_many_visual_tokens_again_take_twice_the_share() -> None:
    """The logit is for `tokens` of them: with N it is larger by log(N / tokens)."""
    case = make_case([[("text", 2), ("image", 3, 4, False), ("text", 5)]], DIM)
    plan = sink_plan(tokens=6)
    sinks = replace(plan.sinks, a=plan.sinks.a + torch.tensor(2.0).log(), tokens=None)
    counted, constant = (
        build(SHAPE, p)(**case.kwargs()).logits for p in (plan, replace(plan, sinks=sinks))
    )
    assert (counted - constant).abs().max() < 1e-4


@torch.no_grad()
def test_beams_carry_their_images() -> None:
    plan = sink_plan()
    case = make_case(ROWS, DIM, pads=[(1, 0)] * 3)
    model = build(SHAPE, plan)
    how = dict(max_new_tokens=5, num_beams=3, do_sample=False)
    together = model.generate(**case.kwargs(), **how)
    for b in range(3):
        alone = model.generate(**case.alone(b).kwargs(), **how)
        assert torch.equal(together[b, -5:], alone[0, -5:])


# --- trained -------------------------------------------------------------------------------------


def trained(model: Any, plan: PruningPlan) -> tuple[Any, list[nn.Parameter]]:
    """The plan as the oracle reads it, and its sinks as parameters, the engine's too."""
    a, b = (nn.Parameter(x.double()) for x in (plan.sinks.a, plan.sinks.b))
    plans = model.model._yopo_layer_plans
    plans.plans[:] = plans.with_sinks(a, b).plans
    names = [n for n in dir(plan) if not n.startswith("_") and n != "sinks"]
    values = {name: getattr(plan, name) for name in names}
    return SimpleNamespace(**values, sinks=SimpleNamespace(a=a, b=b, tokens=plan.sinks.tokens)), [
        a,
        b,
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_sinks_weights_and_inputs_are_the_oracles(checkpointing: bool) -> None:
    plan = sink_plan(
        visual_attention=[True, False, True], ffn=[7, 0, None], ffn_ratio=1, layer_cut=3
    )
    case = make_case(ROWS, DIM, pads=[(1, 0)] * 3)
    model = build(SHAPE, plan).double()
    case.inputs_embeds = case.inputs_embeds.double().requires_grad_()
    with torch.no_grad():
        model(**case.kwargs())
    same, sinks = trained(model, plan)
    wanted = [*sinks, case.inputs_embeds, *model.model.layers.parameters()]
    towards = torch.randn(*case.shape, 31, dtype=torch.float64) * case.valid[..., None]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ours = torch.autograd.grad((model(**case.kwargs()).logits * towards).sum(), wanted)
    truth = torch.autograd.grad((truth_of(model, same, case) * towards).sum(), wanted)
    for mine, theirs in zip(ours, truth, strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * (1 + theirs.abs().max())
    assert all(gradient.abs().max() > 1e-3 for gradient in ours[:2])


@torch.no_grad()
def test_a_cache_filled_with_other_sinks_is_refused() -> None:
    plan = sink_plan()
    case = make_case(ROWS[:1], DIM)
    model = build(SHAPE, plan)
    past = model(**case.kwargs(), use_cache=True).past_key_values
    apply(model, replace(plan, sinks=random_sinks(SHAPE, 4, True)))
    with pytest.raises(ValueError, match="filled under another plan"):
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=past)
