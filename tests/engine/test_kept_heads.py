"""A product by some heads of a weight has the gradients of one by a gathered copy, which it does
not keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from yopo.engine.kept_heads import kept, kept_linear

HEADS, HEAD_DIM, OTHER = 4, 3, 5
SHAPES = {0: (HEADS * HEAD_DIM, OTHER), 1: (OTHER, HEADS * HEAD_DIM)}
CHOSEN = torch.tensor([3, 0])


def inputs(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(dim)
    weight = torch.randn(SHAPES[dim], dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, (OTHER, len(CHOSEN) * HEAD_DIM)[dim], dtype=torch.float64)
    bias = torch.randn((len(CHOSEN) * HEAD_DIM, OTHER)[dim], dtype=torch.float64)
    return x.requires_grad_(), weight, bias.requires_grad_()


def call(x: Tensor, weight: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    return kept_linear(x, weight, bias, CHOSEN, HEAD_DIM, dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_output_and_gradients_to_the_second_are_those_of_the_gathered_weight(dim: int) -> None:
    x, weight, bias = inputs(dim)
    expected = F.linear(x, kept(weight, CHOSEN, HEAD_DIM, dim), bias)
    assert torch.equal(expected, call(x, weight, bias, dim))
    with torch.no_grad():
        assert torch.equal(expected, call(x, weight, bias, dim))
    assert torch.autograd.gradcheck(lambda *a: call(*a, dim), (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda *a: call(*a, dim), (x, weight, bias))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_frozen_weight_gets_no_gradient_and_the_input_its_own(dim: int) -> None:
    x, weight, _ = inputs(dim)
    call(x, weight.detach(), None, dim).sum().backward()
    assert weight.grad is None and x.grad is not None
    ours = x.grad.clone()
    x.grad = None
    F.linear(x, kept(weight.detach(), CHOSEN, HEAD_DIM, dim)).sum().backward()
    assert torch.allclose(ours, x.grad)


@pytest.mark.parametrize("dim", [0, 1])
def test_nothing_as_large_as_the_gathered_weight_is_kept(dim: int) -> None:
    x, weight, bias = inputs(dim)
    held: list[int] = []

    def pack(each: Tensor) -> Tensor:
        held.append(each.untyped_storage().data_ptr())
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        call(x, weight, bias, dim)
    known = {each.untyped_storage().data_ptr() for each in (x, weight, CHOSEN)}
    assert held and set(held) <= known


def test_transforms_of_functions_go_through() -> None:
    x, weight, bias = inputs(0)

    def total(w: Tensor, row: Tensor) -> Any:
        return call(row[None], w, bias.detach(), 0).square().sum()

    each = torch.func.vmap(torch.func.grad(total), (None, 0))(weight.detach(), x.detach())
    alone = [torch.func.grad(total)(weight.detach(), row) for row in x.detach()]
    assert torch.allclose(each, torch.stack(alone))


def test_under_autocast_gradients_come_too() -> None:
    x, weight, bias = (each.detach().float().requires_grad_() for each in inputs(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = call(x, weight, bias, 0)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad is not None
