"""Linear maps of packed rows of which text rows use the whole weight and visual rows a part of it:
some heads, or the first neurons. Both products of a weight are one function of autograd, for which
no part of the weight is kept, and whose gradient of the weight is written once into one tensor
(autograd alone fills a whole one with zeros for each part, and adds them). Tensors only; which
modules may be read so, weights.py knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from yopo.versions import autocast_dtype, is_compiling, is_transformed


def kept(weight: Tensor, heads: Tensor, head_dim: int, dim: int) -> Tensor:
    """The `heads` along `dim`, (H·D, …) → (H'·D, …). They are gathered."""
    apart = weight.unflatten(dim, (-1, head_dim))
    return apart.index_select(dim, heads).flatten(dim, dim + 1)


def to_heads_kept(
    x: Tensor, n_text: int, weight: Tensor, bias: Tensor | None, heads: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """x (N, d), text rows first, weight (H·D, d) → text rows (Nt, H·D), visual rows (Nv, H'·D) of
    the `heads` (H',)."""
    text, visual = _two(x[:n_text], x[n_text:], weight, heads, head_dim, 0)
    if bias is None:
        return text, visual
    return text + _cast(bias, text), visual + _cast(kept(bias, heads, head_dim, 0), visual)


def from_heads_kept(
    text: Tensor, visual: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, head_dim: int
) -> Tensor:
    """text (Nt, H·D), visual (Nv, H'·D) of the `heads` (H',), weight (d, H·D) → (N, d)."""
    out = torch.cat(_two(text, visual, weight, heads, head_dim, 1))
    return out if bias is None else out + _cast(bias, out)


def to_first_and_rest(
    x: Tensor, n_text: int, weight: Tensor, bias: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    """x (N, d), text rows first, weight (I, d) → of all rows the `first` neurons (N, i), of text
    rows the others (Nt, I - i)."""
    of_all, of_text = _two(x, x[:n_text], weight, None, first, 0)
    if bias is None:
        return of_all, of_text
    return of_all + _cast(bias[:first], of_all), of_text + _cast(bias[first:], of_text)


def from_first_and_rest(
    of_all: Tensor, of_text: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The first neurons (N, i) of all rows, the others (Nt, I - i) of text rows, which come first,
    weight (d, I) → (N, d)."""
    n_text = of_text.shape[0]
    every, text = _two(of_all, of_text, weight, None, of_all.shape[1], 1)
    out = torch.cat([every[:n_text] + text, every[n_text:]])
    return out if bias is None else out + _cast(bias, out)


def _cast(bias: Tensor, out: Tensor) -> Tensor:
    return bias.to(out.dtype)  # under autocast it is not yet


def _two(
    first: Tensor, second: Tensor, weight: Tensor, heads: Tensor | None, size: int, dim: int
) -> tuple[Tensor, Tensor]:
    """What both give by their parts of the weight, see `_parts`."""
    if not torch.is_grad_enabled():
        a, b = _parts(weight, heads, size, dim)
        return F.linear(first, a), F.linear(second, b)
    dtype = autocast_dtype(first.device.type)
    if dtype is not None:
        first, second, weight = (  # autocast leaves double precision alone
            each if each.dtype == torch.float64 else each.to(dtype)
            for each in (first, second, weight)
        )
    both: tuple[Tensor, Tensor] = _TwoProducts.apply(first, second, weight, heads, size, dim)
    return both


def _parts(weight: Tensor, heads: Tensor | None, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """With heads, of `size` numbers along `dim`: the whole weight, and theirs. Without: the first
    `size` along `dim`, and the rest."""
    if heads is not None:
        return weight, kept(weight, heads, size, dim)
    return weight.narrow(dim, 0, size), weight.narrow(dim, size, weight.shape[dim] - size)


class _TwoProducts(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        first: Tensor, second: Tensor, weight: Tensor, heads: Tensor | None, size: int, dim: int
    ) -> tuple[Tensor, Tensor]:
        a, b = _parts(weight, heads, size, dim)
        return F.linear(first, a), F.linear(second, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        first, second, weight, heads, *ctx.place = inputs
        trained = ctx.needs_input_grad[2]  # of a frozen weight no gradient needs the rows
        ctx.save_for_backward(
            first if trained else None, second if trained else None, weight, heads
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first, second, weight, heads = ctx.saved_tensors
        size, dim = ctx.place
        a, b = _parts(weight, heads, size, dim)
        of_first = grads[0] @ a if ctx.needs_input_grad[0] else None
        of_second = grads[1] @ b if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[2]:
            return of_first, of_second, None, None, None, None
        left, right = grads[0].t(), grads[1].t()
        if torch.is_grad_enabled() or is_compiling() or is_transformed(left):
            of_weight = _together(left @ first, right @ second, heads, size, dim)
        else:
            of_weight = weight.new_empty(weight.shape)
            if heads is None:
                parts = _parts(of_weight, None, size, dim)
                torch.mm(left, first, out=parts[0])
                torch.mm(right, second, out=parts[1])
            else:
                torch.mm(left, first, out=of_weight)
                mine = (right @ second).unflatten(dim, (-1, size))
                of_weight.unflatten(dim, (-1, size)).index_add_(dim, heads, mine)
        return of_first, of_second, of_weight, None, None, None


def _together(first: Tensor, second: Tensor, heads: Tensor | None, size: int, dim: int) -> Tensor:
    """The weight's gradient of those of its parts, by operations that have gradients themselves."""
    if heads is None:
        return torch.cat([first, second], dim=dim)
    apart, mine = (
        each.reshape(*each.shape[:dim], -1, size, *each.shape[dim + 1 :])
        for each in (first, second)
    )
    return apart.index_add(dim, heads, mine).reshape(first.shape)
