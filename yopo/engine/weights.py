"""Linear maps of which a pass needs only some heads or the first neurons, of a layer's own modules.

A plain nn.Linear that nobody watches is sliced. Anything else (quantised, LoRA, sharded, hooked) is
called, once and with all rows, and its output sliced, or its input filled up with zeros. Plain
weights are read when they are used: kept heads are gathered from them in whole heads at every image
(some 2 ms for 16 MB, 1 to 3 % of a layer's prefill), so no copy can be stale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yopo.engine.layer_plan import LayerPlan
from yopo.engine.part_products import (
    from_first_and_rest,
    from_heads_kept,
    to_first_and_rest,
    to_heads_kept,
)
from yopo.versions import is_any_module_hooked, is_compiling

# Where activations are made that take values one by one, and those that do not.
_ACTIVATIONS = {"torch.nn.modules.activation", "transformers.activations"}
_OF_SEVERAL = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}
_ELEMENTWISE = (F.silu, F.gelu, F.relu, F.mish, torch.relu, torch.sigmoid, torch.tanh)
_KNOWN: dict[type, bool] = {}  # classes of activations that were looked at
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Attention(Protocol):
    """What is read of a decoder layer's self-attention: a fused qkv_proj, or three projections.

    Of an nn.Module's attributes no type is known before `is_plain` has looked."""

    config: Any
    head_dim: int
    qkv_proj: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    _modules: Any


class GatedFFN(Protocol):
    """What is read of a decoder layer's FFN: a fused gate_up_proj, or two projections."""

    gate_up_proj: Any
    gate_proj: Any
    up_proj: Any
    down_proj: Any


@dataclass(frozen=True)
class Rows:
    """A slice of a fused linear (Phi-3's qkv_proj and gate_up_proj), used as the linear it would be
    by itself."""

    module: nn.Linear
    at: slice

    @property
    def weight(self) -> Tensor:
        return self.module.weight[self.at]

    @property
    def bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias[self.at]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Called:
    """The output (N, …) that a module gave for all rows of the pass, in place of the module."""

    output: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.output


# Of an nn.Linear here the weight may be read, or it is one of a pass that slices nothing and calls
# whatever the module is.
Linear = nn.Linear | Rows | Called


def is_watched(module: nn.Module) -> bool:
    """Whether somebody looks on when `module` is called: hooks, or a forward of its own."""
    attributes = vars(module)
    if "forward" in attributes or is_any_module_hooked():
        return True
    return any(attributes.get(name) for name in HOOKS)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module's output is x @ weight.T + bias with a weight that can be read here and
    now, and nobody watches."""
    if type(module) is not nn.Linear or is_watched(module):
        return False
    # Not module.weight: under DeepSpeed's ZeRO-3 to read a weight that is elsewhere is to gather
    # it, which waits for all processes, and some may have no image.
    weight = module._parameters.get("weight")
    # A weight of another type is a tensor subclass: quantised in place, or sharded.
    if type(weight) is not nn.Parameter or weight.is_meta:
        return False
    # ZeRO-3 leaves an empty weight where a module's part is on other ranks.
    return weight.numel() > 0 or module.in_features * module.out_features == 0


def call(module: nn.Module, x: Tensor) -> Called:
    """Calls a module that cannot be sliced, with all rows x (N, d) of the pass."""
    return Called(module(x))


def _plain_or_called(module: nn.Module, x: Tensor) -> nn.Linear | Called:
    """The module where it can be sliced; else called, with all rows x (N, d) of the pass."""
    return module if is_plain(module) else call(module, x)


def to_qkv(attn: Attention, x: Tensor, sliced: bool) -> tuple[Linear, Linear, Linear]:
    """The projections to queries, keys and values. Where they are to be `sliced`, those that cannot
    be are called with x (N, d)."""
    if "qkv_proj" not in attn._modules:
        q, k, v = attn.q_proj, attn.k_proj, attn.v_proj
        if not sliced:
            return q, k, v
        return _plain_or_called(q, x), _plain_or_called(k, x), _plain_or_called(v, x)
    n_kv = attn.config.num_key_value_heads * attn.head_dim
    n_q = attn.config.num_attention_heads * attn.head_dim
    q, k, v = _split(attn.qkv_proj, x, n_q, n_kv, n_kv)
    return q, k, v


def _gate_up(mlp: GatedFFN, size: int) -> tuple[nn.Linear | Rows, nn.Linear | Rows] | None:
    """The gate and up projections, to `size` neurons each; None unless both can be sliced."""
    if hasattr(mlp, "gate_up_proj"):
        fused = mlp.gate_up_proj
        if not is_plain(fused):
            return None
        return Rows(fused, slice(0, size)), Rows(fused, slice(size, 2 * size))
    gate, up = mlp.gate_proj, mlp.up_proj
    return (gate, up) if is_plain(gate) and is_plain(up) else None


def _split(fused: nn.Module, x: Tensor, *sizes: int) -> tuple[Linear, ...]:
    ends = itertools.accumulate(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    if is_plain(fused):
        return tuple(Rows(fused, part) for part in parts)
    output = call(fused, x).output
    return tuple(Called(output[..., part]) for part in parts)


def activation(mlp: GatedFFN) -> Callable[[Tensor], Tensor]:
    """The activation of a gated FFN; Liger's FFNs have none as a module, and compute SiLU."""
    return getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None) or F.silu


def is_elementwise(act: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is known to make each value of that one alone, so that some neurons can
    do without the others. What comes of any other (top-k, softmax, one's own) hangs on them all."""
    if not isinstance(act, nn.Module):
        return any(act is known for known in _ELEMENTWISE)
    if any(weight.numel() > 1 for weight in act._parameters.values() if weight is not None):
        return False
    cls = type(act)
    if not is_compiling():  # which cannot ask; then it was asked when the plan was put on
        whose = getattr(cls.forward, "__qualname__", "").partition(".")[0]
        ours = getattr(cls.forward, "__module__", None) in _ACTIVATIONS
        _KNOWN[cls] = ours and whose not in _OF_SEVERAL
    return _KNOWN.get(cls, False)


def to_heads(output: Tensor, count: int, head_dim: int) -> Tensor:
    """What a projection gave, (N, H·D), by heads: (N, H, D). Raises ValueError unless H = count."""
    if output.shape[-1] != count * head_dim:
        raise ValueError(
            f"a projection gives {output.shape[-1] // head_dim} heads, the model has {count}: they "
            "are split over processes (tensor parallelism), or were taken out. Load the model whole"
        )
    return output.unflatten(-1, (count, head_dim))


def project_qkv(
    attn: Attention, x: Tensor, n_text: int, plan: LayerPlan, head_dim: int
) -> tuple[Tensor, Tensor | None]:
    """x (N, d), text rows first → [queries | keys | values] of text rows, (Nt, H + 2 K, D), in the
    layer's own order, and of visual rows, (Nv, H', D), those that the plan's visual_order names;
    None where there are none."""
    sliced = n_text < len(x)
    linears = to_qkv(attn, x, sliced)
    kv_heads = sum(plan.kv_counts)
    counts = plan.heads, kv_heads, kv_heads
    if not sliced:
        each = zip(linears, counts, strict=True)
        return torch.cat([to_heads(linear(x), n, head_dim) for linear, n in each], dim=1), None
    chosen = plan.visual_heads, *plan.visual_kv_heads
    found = [
        project_to_heads(linear, x, n_text, heads, n, head_dim)
        for linear, heads, n in zip(linears, chosen, counts, strict=True)
    ]
    text, visual = zip(*found, strict=True)
    return torch.cat(text, dim=1), torch.cat(visual, dim=1)


def project_to_heads(
    linear: Linear, x: Tensor, n_text: int, heads: Tensor | None, count: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """x (N, d), text rows first → text rows (Nt, H, D) of all heads, `count` many, and visual rows
    (Nv, H', D) of `heads`, None: all."""
    if heads is None or isinstance(linear, Called):
        every = to_heads(linear(x), count, head_dim)
        text, visual = every[:n_text], every[n_text:]
        return text, visual if heads is None else visual.index_select(1, heads)
    text, visual = to_heads_kept(x, n_text, linear.weight, linear.bias, heads, head_dim)
    return to_heads(text, count, head_dim), visual.unflatten(-1, (-1, head_dim))


def project_from_heads(
    linear: nn.Module, text: Tensor, visual: Tensor | None, heads: Tensor | None
) -> Tensor:
    """text (Nt, H, D), and visual (Nv, H', D), the outputs of `heads`, the others being zero →
    (N, d)."""
    if visual is None:
        return linear(text.flatten(1))
    if heads is not None and is_plain(linear):
        flat, head_dim = (text.flatten(1), visual.flatten(1)), text.shape[2]
        return from_heads_kept(*flat, linear.weight, linear.bias, heads, head_dim)
    if heads is not None:
        visual = visual.new_zeros(len(visual), *text.shape[1:]).index_copy(1, heads, visual)
    every = torch.cat([text, visual]).flatten(1)
    return linear(every) if is_plain(linear) else call(linear, every).output


def gated_ffn(mlp: GatedFFN, x: Tensor, n_text: int, neurons: int, of_all: int) -> Tensor:
    """x (N, d) → (N, d): rows from `n_text` on use only the first `neurons` of the gate, up and
    down projections' `of_all`.

    Plain weights are read once: the first neurons multiply all rows, the rest the text rows alone.
    Where the activation wants them all, it gets them, and visual rows lose the others after it.
    Raises ValueError where there are not that many.
    """
    act, down, linears = activation(mlp), mlp.down_proj, _gate_up(mlp, of_all)
    whole = not is_elementwise(act) or (isinstance(act, nn.Module) and is_watched(act))
    if linears is None or whole or not is_plain(down):
        hidden = _called_neurons(mlp, act, x, of_all)
        used = torch.arange(of_all, device=x.device) < neurons
        text = torch.arange(x.shape[0], device=x.device) < n_text
        return call(down, hidden.masked_fill(~(used[None, :] | text[:, None]), 0)).output
    gate, up = linears

    gates, ups = (
        to_first_and_rest(x, n_text, linear.weight, linear.bias, neurons) for linear in (gate, up)
    )
    first, rest = (act(gate) * up for gate, up in zip(gates, ups, strict=True))
    return from_first_and_rest(first, rest, down.weight, down.bias)


def _called_neurons(mlp: GatedFFN, act: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """The `size` neurons (N, I) of all rows, by modules called in the order in which an unpruned
    FFN calls them: under ZeRO-3 a process without an image does so at the same time."""
    if hasattr(mlp, "gate_up_proj"):
        fused = call(mlp.gate_up_proj, x).output
        gate, up = fused.tensor_split(2, dim=-1)
        hidden = act(gate) * up
    else:
        hidden = act(call(mlp.gate_proj, x).output)
        hidden = hidden * call(mlp.up_proj, x).output
    if hidden.shape[1] != size:
        raise ValueError(
            f"the FFN has {hidden.shape[1]} neurons here, the model {size}: they are split over "
            "processes (tensor parallelism), or were taken out. Load the model whole"
        )
    return hidden
