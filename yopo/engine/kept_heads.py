"""A linear map by some heads of a weight, which are gathered from it. For the backward they are
gathered once more, and not kept: they are as large as the weight's own part. Tensors only; which
modules may be read so, weights.py knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def kept_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, head_dim: int, dim: int
) -> Tensor:
    """x (N, in) → (N, out) by the `heads` (H',) among the rows of weight (H·D, in), dim 0, or among
    its columns, (out, H·D), dim 1. bias: as large as the output."""
    if torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
        out: Tensor = _KeptLinear.apply(x, weight, heads, head_dim, dim)
        return out if bias is None else out + bias
    return F.linear(x, kept(weight, heads, head_dim, dim), bias)


def kept(weight: Tensor, heads: Tensor, head_dim: int, dim: int) -> Tensor:
    """The `heads` along `dim`, (H·D, …) → (H'·D, …)."""
    apart = weight.unflatten(dim, (-1, head_dim))
    return apart.index_select(dim, heads).flatten(dim, dim + 1)


class _KeptLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, heads: Tensor, head_dim: int, dim: int) -> Tensor:
        return F.linear(x, kept(weight, heads, head_dim, dim))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, heads, *ctx.place = inputs
        ctx.save_for_backward(x, weight, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, heads = ctx.saved_tensors
        head_dim, dim = ctx.place
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ kept(weight, heads, head_dim, dim)
        if ctx.needs_input_grad[1]:
            part = (grad.t() @ x).unflatten(dim, (-1, head_dim))
            of_weight = part.new_zeros(weight.shape)
            of_weight.unflatten(dim, (-1, head_dim)).index_copy_(dim, heads, part)
        return of_x, of_weight, None, None, None
