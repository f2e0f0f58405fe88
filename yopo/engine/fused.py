"""One decoder layer by fused weights: queries, keys and values of text rows are one product, so are
gate and up; what a product gives is added to the rows in place, and nothing is called.

The same attention as with live weights (layer.py), for passes without gradients. Which layers can
go this way, and that they still can, models/fusing.py knows; no module is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from yopo.engine.layer import LayerCall, attend
from yopo.engine.part_products import kept

GATHERED = 16 << 20  # bytes of a weight that are gathered together on a CPU


@dataclass(frozen=True)
class RMSNorm:
    """weight (d,), eps."""

    weight: Tensor
    eps: float

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.rms_norm(rows, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Product:
    """x @ weight.T + bias: weight (out, in), bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def added(self, rows: Tensor, x: Tensor) -> Tensor:
        """rows with what x gives, in one product."""
        out = torch.addmm(rows, x, self.weight.t())
        return out if self.bias is None else out.add_(self.bias)

    def add_to(self, rows: Tensor, x: Tensor) -> Tensor:
        """Adds to rows, in place, what x gives."""
        self._add(rows, x, self.weight)
        return rows

    # Of parts of it no Product is made: torch.compile of some versions calls none that it has seen
    # made.

    def of_rows(self, x: Tensor, at: slice) -> Tensor:
        """What those rows of the weight give."""
        return F.linear(x, self.weight[at], None if self.bias is None else self.bias[at])

    def of_heads(self, x: Tensor, heads: Tensor, head_dim: int) -> Tensor:
        """What `heads` (H',) of it give. Their weights are gathered, and let go at once."""
        parts = self._gathered_together(heads, head_dim * self.weight.shape[1])
        outs = []
        for part in parts:
            bias = None if self.bias is None else kept(self.bias, part, head_dim, 0)
            outs.append(F.linear(x, kept(self.weight, part, head_dim, 0), bias))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def add_from_heads(self, rows: Tensor, x: Tensor, heads: Tensor, head_dim: int) -> None:
        """Adds to rows, in place, what x gives, of `heads` (H',), the others being zero."""
        parts = self._gathered_together(heads, head_dim * self.weight.shape[0])
        inputs = x.split([len(part) * head_dim for part in parts], dim=1)
        for part, mine in zip(parts, inputs, strict=True):
            rows.addmm_(mine, kept(self.weight, part, head_dim, 1).t())
        if self.bias is not None:
            rows.add_(self.bias)

    def add_from_first(self, rows: Tensor, x: Tensor) -> None:
        """Adds to rows, in place, what x gives, of the first inputs, the others being zero."""
        self._add(rows, x, self.weight[:, : x.shape[1]])

    def _gathered_together(self, heads: Tensor, numbers: int) -> tuple[Tensor, ...]:
        """Heads, of so many numbers each, in parts whose weights are gathered together: on a CPU
        what is larger is given back to the system each time, and paged in anew."""
        if heads.device.type != "cpu":
            return (heads,)
        most = max(1, GATHERED // (numbers * self.weight.element_size()))
        return heads.split(most)

    def _add(self, rows: Tensor, x: Tensor, weight: Tensor) -> None:
        rows.addmm_(x, weight.t())
        if self.bias is not None:
            rows.add_(self.bias)


@dataclass(frozen=True)
class FusedLayer:
    """The weights of a pre-norm decoder layer.

    qkv: ((H + 2 K) D, d), queries, keys, values. o: (d, H D). gate_up: (2 I, d), all of gate, then
    all of up. down: (d, I). act: elementwise.
    """

    before_attention: RMSNorm
    qkv: Product
    o: Product
    before_ffn: RMSNorm
    gate_up: Product
    down: Product
    act: Callable[[Tensor], Tensor]


def run_fused(layer: FusedLayer, rows: Tensor, call: LayerCall) -> Tensor:
    """A layer on rows (N, d), text first → all of them, or text rows alone where the layer leaves
    visual ones as they are."""
    rows = _attended(layer, rows, call)
    n_text, plan = call.shared.n_text, call.plan
    if call.slices_ffn:
        return _sliced_ffn(layer, rows, n_text, plan.neurons or 0)
    if plan.neurons == 0:
        _ffn(layer, rows[:n_text])
        return rows
    return _ffn(layer, rows)


def _attended(layer: FusedLayer, rows: Tensor, call: LayerCall) -> Tensor:
    """Rows with what attention gave them; nobody else holds them."""
    plan, shared = call.plan, call.shared
    n_text, dim = shared.n_text, shared.head_dim
    x = layer.before_attention(rows)
    if n_text == rows.shape[0]:
        text, _ = attend(layer.qkv(x).view(n_text, plan.count, dim), None, call, in_place=True)
        return layer.o.added(rows, text.flatten(1))
    if plan.visual_order is None:
        text, visual = layer.qkv(x).view(rows.shape[0], plan.count, dim).tensor_split([n_text])
    else:
        text = layer.qkv(x[:n_text]).view(n_text, plan.count, dim)
        visual = layer.qkv.of_heads(x[n_text:], plan.visual_order, dim)
        visual = visual.view(shared.n_visual, sum(plan.visual_counts), dim)
    text, out = attend(text, visual, call, in_place=True)
    rows = rows.clone() if call.changes_visual else rows[:n_text].clone()
    layer.o.add_to(rows[:n_text], text.flatten(1))
    if out is not None and call.changes_visual:
        if plan.visual_heads is None:
            layer.o.add_to(rows[n_text:], out.flatten(1))
        else:
            layer.o.add_from_heads(rows[n_text:], out.flatten(1), plan.visual_heads, dim)
    return rows


def _ffn(layer: FusedLayer, rows: Tensor) -> Tensor:
    """Adds to rows, in place."""
    gate, up = layer.gate_up(layer.before_ffn(rows)).chunk(2, dim=-1)
    return layer.down.add_to(rows, layer.act(gate) * up)


def _sliced_ffn(layer: FusedLayer, rows: Tensor, n_text: int, neurons: int) -> Tensor:
    """Adds to rows, in place; of visual ones, from `n_text` on, only the first `neurons`. Each
    weight is read once: the first neurons multiply all rows, the rest the text rows alone."""
    x, of_all = layer.before_ffn(rows), layer.down.weight.shape[1]

    def hidden(x: Tensor, first: int, stop: int) -> Tensor:
        gate = layer.gate_up.of_rows(x, slice(first, stop))
        return layer.act(gate) * layer.gate_up.of_rows(x, slice(of_all + first, of_all + stop))

    down = layer.down
    down.add_from_first(rows, hidden(x, 0, neurons))
    if neurons < of_all:
        rest = hidden(x[:n_text], neurons, of_all)
        rows[:n_text].addmm_(rest, down.weight[:, neurons:].t())
    return rows
