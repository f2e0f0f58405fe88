"""The masked simulation: what the released code computes and costs, for benchmarks to compare with.

Everything is computed for all tokens, with n × n masks and probabilities, and what the plan prunes
is then zeroed. Only exact mass, only a prefill: the pass that skips the work is engine.py's.
Source: released modeling_llama_prune.py (LLaVA/llava/model/language_model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from yopo.engine.layout import VisualLayout
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import rope


@torch.no_grad()
def simulate(model: Any, plan: PruningPlan, layout: VisualLayout, inputs_embeds: Tensor) -> Tensor:
    """inputs_embeds (B, n, d), no padding → last hidden state (B, n, d) of a Llama model's
    stack.
    """
    if (plan.head_mass, plan.cut_mass) != ("exact", "exact") or not can_simulate(plan):
        raise ValueError(
            "the released code knows exact/exact mass with pruned visual queries only, and one "
            "window and one number of neurons for all layers"
        )
    batch, n, _ = inputs_embeds.shape
    device = inputs_embeds.device
    heads = model.config.num_attention_heads
    visual = layout.visual.to(device)  # (B, n)
    sees = _sees(layout, plan).to(device)[:, None]  # (B, 1, n, n)
    bias = torch.zeros_like(sees, dtype=inputs_embeds.dtype).masked_fill(~sees, -torch.inf)
    cos, sin = rope(model, inputs_embeds, torch.arange(n, device=device).expand(batch, -1), n)
    neurons = plan.ffn_neurons(model.config.intermediate_size)[0]
    rows = inputs_embeds
    for index, layer in enumerate(model.layers):
        attn, x = layer.self_attn, layer.input_layernorm(rows)
        q, k, v = (
            p(x).unflatten(-1, (-1, cos.shape[-1])) for p in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = (rotate(t, cos[:, :, None], sin[:, :, None]) for t in (q, k))
        per_kv = heads // k.shape[2]
        q, k, v = (
            q.transpose(1, 2),
            *(t.repeat_interleave(per_kv, 2).transpose(1, 2) for t in (k, v)),
        )
        scores = q @ k.transpose(2, 3) * cos.shape[-1] ** -0.5 + bias
        share = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        keep = plan.head_keep[index].to(device)[:, None, None]
        blind = ~keep if index < plan.layer_cut else torch.ones_like(keep)
        share = share.masked_fill(blind & visual[:, None, None, :], 0)
        out = (share @ v).masked_fill(~keep & visual[:, None, :, None], 0)
        rows = rows + attn.o_proj(out.transpose(1, 2).flatten(2))
        x, mlp = layer.post_attention_layernorm(rows), layer.mlp
        gate, up = mlp.gate_proj.weight[:neurons], mlp.up_proj.weight[:neurons]
        small = mlp.act_fn(F.linear(x, gate)) * F.linear(x, up)
        small = F.linear(small, mlp.down_proj.weight[:, :neurons])
        rows = rows + torch.where(visual[:, :, None], small, mlp(x))
    return model.norm(rows)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (…, D) by angles that broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin)


def can_simulate(plan: PruningPlan) -> bool:
    """Whether the released code could compute the plan, were its masses exact."""
    per_layer = (plan.window, plan.ffn, plan.visual_attention)
    same = not any(isinstance(value, tuple) for value in per_layer)
    return same and plan.visual_attention is True and plan.prune_visual_queries


def _sees(layout: VisualLayout, plan: PruningPlan) -> Tensor:
    """(B, n, n) bool: which key each query may see."""
    n = layout.visual.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    window = plan.windows[0]
    if window is None:
        return causal.expand(layout.visual.shape[0], -1, -1)
    both = layout.visual[:, :, None] & layout.visual[:, None, :]
    near = both & (layout.image[:, :, None] == layout.image[:, None, :])
    for axis in (layout.row, layout.col):
        near &= (axis[:, :, None] - axis[:, None, :]).abs() <= (window - 1) // 2
    return torch.where(both, near & causal if plan.window_causal else near, causal)
