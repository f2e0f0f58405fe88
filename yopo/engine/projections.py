"""Linear maps of which a pass needs only some heads or the first neurons.

A plain nn.Linear is sliced; anything else (quantised, LoRA, offloaded) is called whole and its
output sliced, or its input filled up with zeros. The weights are always the model's own, read when
they are used: kept heads are gathered from them in whole heads at every image (some 2 ms for 16 MB,
1 to 3 % of a layer's prefill), so no copy can be stale, also after writes through `.data`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Rows:
    """A slice of a fused linear (Phi-3's qkv_proj and gate_up_proj), used as the linear it would be
    by itself."""

    module: nn.Module
    at: slice

    @property
    def weight(self) -> Tensor:
        return self.module.weight[self.at]

    @property
    def bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias[self.at]

    def __call__(self, x: Tensor) -> Tensor:
        if is_plain(self):
            return F.linear(x, self.weight, self.bias)
        return self.module(x)[..., self.at]


Linear = nn.Module | Rows


def to_qkv(attn: nn.Module) -> tuple[Linear, Linear, Linear]:
    """The projections to queries, keys and values."""
    if not hasattr(attn, "qkv_proj"):
        return attn.q_proj, attn.k_proj, attn.v_proj
    kv = attn.config.num_key_value_heads * attn.head_dim
    q = attn.config.num_attention_heads * attn.head_dim
    parts = (slice(0, q), slice(q, q + kv), slice(q + kv, q + 2 * kv))
    return tuple(Rows(attn.qkv_proj, part) for part in parts)


def to_ffn(mlp: nn.Module) -> tuple[Linear, Linear, nn.Module, Callable[[Tensor], Tensor]]:
    """The gate, up and down projections and the activation between them."""
    if not hasattr(mlp, "gate_up_proj"):
        return mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
    size = mlp.config.intermediate_size
    gate, up = (Rows(mlp.gate_up_proj, slice(i * size, (i + 1) * size)) for i in range(2))
    return gate, up, mlp.down_proj, mlp.activation_fn


def is_plain(module: Linear) -> bool:
    """Whether the module's output is x @ weight.T + bias with a weight that can be read here and
    now.
    """
    if isinstance(module, Rows):
        return is_plain(module.module)
    hooked = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    # A weight of another type is a tensor subclass: quantised in place, or sharded.
    plain_weight = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return plain_weight and not hooked and not module.weight.is_meta


def project_to_heads(module: Linear, x: Tensor, index: Tensor | None, head_dim: int) -> Tensor:
    """x (N, d) → (N, H', D): the module's output for the heads `index`, all if None."""
    if index is None:
        return module(x).unflatten(-1, (-1, head_dim))
    if not is_plain(module):
        return module(x).unflatten(-1, (-1, head_dim)).index_select(1, index)

    def kept(rows: Tensor) -> Tensor:  # (H·D, …) → (H'·D, …)
        return rows.unflatten(0, (-1, head_dim)).index_select(0, index).flatten(0, 1)

    bias = None if module.bias is None else kept(module.bias)
    return F.linear(x, kept(module.weight), bias).unflatten(-1, (-1, head_dim))


def project_from_heads(module: nn.Module, x: Tensor, index: Tensor | None, heads: int) -> Tensor:
    """x (N, H', D), the outputs of the heads `index` of `heads`, the others being zero → (N, d)."""
    if index is None:
        return module(x.flatten(1))
    if not is_plain(module):
        full = x.new_zeros(x.shape[0], heads, x.shape[2]).index_copy(1, index, x)
        return module(full.flatten(1))
    kept = module.weight.unflatten(1, (heads, -1)).index_select(1, index).flatten(1)
    return F.linear(x.flatten(1), kept, module.bias)


def gated_ffn(mlp: nn.Module, x: Tensor, n_text: int, neurons: int | None) -> Tensor:
    """x (N, d) → (N, d): rows from `n_text` on use only the first `neurons` of the gate, up and
    down projections; None: all.

    Plain weights are read once: the first neurons multiply all rows, the rest the text rows alone.
    """
    gate, up, down, act = to_ffn(mlp)
    if n_text == x.shape[0] or neurons is None:
        return mlp(x)
    if not all(map(is_plain, (gate, up, down))):
        hidden = act(gate(x)) * up(x)
        used = torch.arange(hidden.shape[1], device=x.device) < neurons
        text = torch.arange(x.shape[0], device=x.device) < n_text
        return down(hidden.masked_fill(~(used[None, :] | text[:, None]), 0))

    def part(rows: Tensor, of: slice) -> Tensor:
        def linear(module: Linear) -> Tensor:
            return F.linear(
                rows, module.weight[of], None if module.bias is None else module.bias[of]
            )

        return F.linear(act(linear(gate)) * linear(up), down.weight[:, of])

    out = part(x, slice(0, neurons))
    text = out[:n_text] + part(x[:n_text], slice(neurons, None))
    out = torch.cat([text, out[n_text:]])
    return out if down.bias is None else out + down.bias
