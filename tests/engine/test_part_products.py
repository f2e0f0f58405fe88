"""Products by parts of a weight have the outputs and gradients of plain ones, and keep no part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from yopo.engine.part_products import (
    from_first_and_rest,
    from_heads_kept,
    kept,
    to_first_and_rest,
    to_heads_kept,
)

HEADS, HEAD_DIM, OTHER, TEXT, ROWS = 4, 3, 5, 2, 7
WIDTH = HEADS * HEAD_DIM
CHOSEN = torch.tensor([3, 0])
FIRST = 5

Inputs = tuple[Tensor, Tensor | None, Tensor, Tensor]
Product = Callable[[Tensor, Tensor | None, Tensor, Tensor | None], tuple[Tensor, ...]]


def ours_to_heads(x: Tensor, _: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return to_heads_kept(x, TEXT, weight, bias, CHOSEN, HEAD_DIM)


def plain_to_heads(x: Tensor, _: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    every = F.linear(x, weight, bias)
    return every[:TEXT], every[TEXT:].unflatten(1, (HEADS, HEAD_DIM))[:, CHOSEN].flatten(1)


def ours_from_heads(
    text: Tensor, visual: Any, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    return (from_heads_kept(text, visual, weight, bias, CHOSEN, HEAD_DIM),)


def plain_from_heads(
    text: Tensor, visual: Any, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    of_visual = F.linear(visual, kept(weight, CHOSEN, HEAD_DIM, 1), bias)
    return (torch.cat([F.linear(text, weight, bias), of_visual]),)


def ours_to_first(x: Tensor, _: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return to_first_and_rest(x, TEXT, weight, bias, FIRST)


def plain_to_first(x: Tensor, _: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    every = F.linear(x, weight, bias)
    return every[:, :FIRST], every[:TEXT, FIRST:]


def ours_from_first(
    of_all: Tensor, of_text: Any, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    return (from_first_and_rest(of_all, of_text, weight, bias),)


def plain_from_first(
    of_all: Tensor, of_text: Any, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    return (F.linear(torch.cat([of_all, F.pad(of_text, (0, 0, 0, ROWS - TEXT))], 1), weight, bias),)


# By name: both, and the shapes of rows, more rows, weight and bias.
KINDS: dict[str, tuple[Product, Product, tuple[Any, ...]]] = {
    "to heads": (ours_to_heads, plain_to_heads, ((ROWS, OTHER), None, (WIDTH, OTHER), WIDTH)),
    "from heads": (
        ours_from_heads,
        plain_from_heads,
        ((TEXT, WIDTH), (ROWS - TEXT, len(CHOSEN) * HEAD_DIM), (OTHER, WIDTH), OTHER),
    ),
    "to first": (ours_to_first, plain_to_first, ((ROWS, OTHER), None, (WIDTH, OTHER), WIDTH)),
    "from first": (
        ours_from_first,
        plain_from_first,
        ((ROWS, FIRST), (TEXT, WIDTH - FIRST), (OTHER, WIDTH), OTHER),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def inputs(kind: str) -> tuple[Product, Product, list[Any]]:
    torch.manual_seed(0)
    ours, plain, shapes = KINDS[kind]
    made = [
        None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    return ours, plain, made


@every_kind
@pytest.mark.parametrize("with_bias", [True, False])
def test_outputs_and_gradients_to_the_second_are_those_of_plain_products(
    kind: str, with_bias: bool
) -> None:
    ours, plain, given = inputs(kind)
    if not with_bias:
        given[3] = None
    outs, expected = ours(*given), plain(*given)
    with torch.no_grad():
        without = ours(*given)
    for mine, quick, right in zip(outs, without, expected, strict=True):
        assert torch.allclose(mine, right) and torch.allclose(quick, right)
    leaves = [each for each in given if each is not None]
    weigh = [torch.randn_like(right) for right in expected]
    found = torch.autograd.grad(outs, leaves, weigh)
    for mine, right in zip(found, torch.autograd.grad(expected, leaves, weigh), strict=True):
        assert torch.allclose(mine, right)
    assert torch.autograd.gradcheck(ours, given)
    assert torch.autograd.gradgradcheck(ours, given)


@every_kind
def test_a_frozen_weight_gets_no_gradient_and_the_rows_their_own(kind: str) -> None:
    ours, plain, given = inputs(kind)
    given[2], given[3] = given[2].detach(), None
    rows = [each for each in given[:2] if each is not None]
    found, expected = (
        torch.autograd.grad([out.square().sum() for out in product(*given)], rows)
        for product in (ours, plain)
    )
    for mine, right in zip(found, expected, strict=True):
        assert torch.allclose(mine, right)


@every_kind
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_kept_but_what_is_there_and_no_rows_for_a_frozen_weight(
    kind: str, frozen: bool
) -> None:
    ours, _, given = inputs(kind)
    given[2].requires_grad_(not frozen)
    held: list[int] = []

    def pack(each: Tensor) -> Tensor:
        held.append(each.untyped_storage().data_ptr())
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        ours(*given)
    rows = {each.untyped_storage().data_ptr() for each in given[:2] if each is not None}
    known = {each.untyped_storage().data_ptr() for each in (given[2], CHOSEN)}
    assert held and set(held) <= known | (set() if frozen else rows)


@every_kind
def test_transforms_of_functions_go_through(kind: str) -> None:
    ours, plain, given = inputs(kind)
    rows, more, weight, bias = (None if each is None else each.detach() for each in given)
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def gradients(product: Product) -> Any:
        def total(weight: Tensor, scale: Tensor) -> Any:
            outs = product(rows * scale, more, weight, bias)
            return sum(out.square().sum() for out in outs)

        return torch.func.vmap(torch.func.grad(total), (None, 0))(weight, scales)

    assert torch.allclose(gradients(ours), gradients(plain))


@every_kind
@pytest.mark.skipif(
    not hasattr(torch._C._functorch, "is_legacy_batchedtensor"), reason="torch before 2.2"
)
def test_gradients_of_several_losses_at_once(kind: str) -> None:
    ours, plain, given = inputs(kind)
    found, expected = (
        torch.autograd.grad(
            out, given[2], torch.stack([out, 2 * out]).detach(), is_grads_batched=True
        )[0]
        for out in (product(*given)[0] for product in (ours, plain))
    )
    assert torch.allclose(found, expected)


@every_kind
def test_under_autocast_gradients_come_in_the_types_of_plain_products(kind: str) -> None:
    ours, plain, given = inputs(kind)
    given = [None if each is None else each.detach().float().requires_grad_() for each in given]
    leaves = [each for each in given if each is not None]
    found = []
    for product in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16):
            outs = product(*given)
        assert {out.dtype for out in outs} == {torch.bfloat16}
        found.append(torch.autograd.grad([out.float().sum() for out in outs], leaves))
    for mine, right in zip(*found, strict=True):
        assert mine.dtype == right.dtype
        assert torch.allclose(mine, right, atol=0.05, rtol=0.05)


@every_kind
def test_autocast_leaves_double_precision_alone(kind: str) -> None:
    ours, plain, given = inputs(kind)
    with torch.autocast("cpu", torch.bfloat16):
        for mine, right in zip(ours(*given), plain(*given), strict=True):
            assert mine.dtype == right.dtype == torch.float64 and torch.allclose(mine, right)
