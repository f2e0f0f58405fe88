"""Linear maps of which a pass needs only some heads or the first neurons.

A plain nn.Linear is sliced; anything else (quantised, LoRA, offloaded) is called whole and its
output sliced, or its input filled up with zeros. The weights are always the model's own, read when
they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_plain(module: nn.Module) -> bool:
    """Whether the module's output is x @ weight.T + bias with a weight that can be read here and
    now.
    """
    hooked = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    # A weight of another type is a tensor subclass: quantised in place, or sharded.
    plain_weight = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return plain_weight and not hooked and not module.weight.is_meta


def head_columns(index: Tensor, head_dim: int) -> Tensor:
    """Features (H'·D,) of the heads `index` (H',)."""
    return (index[:, None] * head_dim + torch.arange(head_dim, device=index.device)).flatten()


def project_to_heads(module: nn.Module, x: Tensor, index: Tensor | None, head_dim: int) -> Tensor:
    """x (N, d) → (N, H', D): the module's output for the heads `index`, all if None."""
    if index is None:
        return module(x).unflatten(-1, (-1, head_dim))
    columns = head_columns(index, head_dim)
    shape = (len(index), head_dim)
    if not is_plain(module):
        return module(x)[:, columns].unflatten(-1, shape)
    bias = None if module.bias is None else module.bias[columns]
    return F.linear(x, module.weight[columns], bias).unflatten(-1, shape)


def project_from_heads(module: nn.Module, x: Tensor, index: Tensor | None, heads: int) -> Tensor:
    """x (N, H', D), the outputs of the heads `index` of `heads`, the others being zero → (N, d)."""
    if index is None:
        return module(x.flatten(1))
    if not is_plain(module):
        full = x.new_zeros(x.shape[0], heads, x.shape[2]).index_copy(1, index, x)
        return module(full.flatten(1))
    return F.linear(x.flatten(1), module.weight[:, head_columns(index, x.shape[2])], module.bias)


def gated_ffn(mlp: nn.Module, x: Tensor, n_text: int, neurons: int | None) -> Tensor:
    """x (N, d) → (N, d): rows from `n_text` on use only the first `neurons` of the gate, up and
    down projections; None: all.

    Plain weights are read once: the first neurons multiply all rows, the rest the text rows alone.
    """
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if n_text == x.shape[0] or neurons is None:
        return mlp(x)
    if not all(map(is_plain, (gate, up, down))):
        hidden = mlp.act_fn(gate(x)) * up(x)
        used = torch.arange(hidden.shape[1], device=x.device) < neurons
        text = torch.arange(x.shape[0], device=x.device) < n_text
        return down(hidden.masked_fill(~(used[None, :] | text[:, None]), 0))

    def part(rows: Tensor, of: slice) -> Tensor:
        def linear(module: nn.Linear) -> Tensor:
            return F.linear(
                rows, module.weight[of], None if module.bias is None else module.bias[of]
            )

        return F.linear(mlp.act_fn(linear(gate)) * linear(up), down.weight[:, of])

    out = part(x, slice(0, neurons))
    text = out[:n_text] + part(x[:n_text], slice(neurons, None))
    out = torch.cat([text, out[n_text:]])
    return out if down.bias is None else out + down.bias
