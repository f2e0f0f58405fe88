"""The short dense oracle: what a pruned Llama computes, written from the design text alone.

Explicit (n x n) masks, every head of every layer, no cache, no packing, float64 by default.
Shares no code with yopo's engine and must stay so: it is what the engine is judged by.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class OracleOutput(NamedTuple):
    logits: Tensor  # (B, n, V)
    last_hidden_state: Tensor  # (B, n, d), after the final norm
    hidden_states: tuple[Tensor, ...]  # L + 1: the embeddings, after each layer, last one normed


def rope_theta(config: Any) -> float:
    """The rotary base; transformers 5 keeps it in rope_parameters."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def inv_freq(config: Any) -> Tensor:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / rope_theta(config) ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, heads, n, D), angles (B, n, R/2): of the first R features."""
    x, rest = x[..., : 2 * angles.shape[-1]], x[..., 2 * angles.shape[-1] :]
    cos = torch.cat([angles, angles], -1).cos()[:, None].to(x.dtype)
    sin = torch.cat([angles, angles], -1).sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([x * cos + torch.cat([-b, a], -1) * sin, rest], -1)


def masked_softmax(scores: Tensor, sees: Tensor) -> Tensor:
    """Softmax over the keys seen; all zero where none is."""
    return scores.masked_fill(~sees, torch.finfo(scores.dtype).min).softmax(-1) * sees


def oracle_forward(
    model: Any,
    plan: Any,
    inputs_embeds: Tensor,
    layout: Any,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    angles: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> OracleOutput:
    """One pass over everything. inputs_embeds (B, n, d); layout: visual, image, row, col (B, n);
    attention_mask (B, n), 0 is padding (rows there are unspecified); position_ids (B or 1, n);
    angles (B, n, R/2) replaces the rotary angles (mrope, partial)."""
    config, layers, keep = model.config, model.model.layers, plan.head_keep.bool()
    B, n, _ = inputs_embeds.shape
    L, H = keep.shape
    D = getattr(config, "head_dim", None) or config.hidden_size // H
    C = L if plan.layer_cut is None else plan.layer_cut
    neurons = plan.ffn_neurons(config.intermediate_size)

    def linear(module: Any, x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.to(dtype)
        return F.linear(x, module.weight.to(dtype), bias)

    def norm(module: Any, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, True) + config.rms_norm_eps).rsqrt() * module.weight.to(dtype)

    def heads(x: Tensor) -> Tensor:  # (B, n, heads * D) -> (B, H, n, D)
        x = x.view(B, n, -1, D).transpose(1, 2)
        return x.repeat_interleave(H // x.shape[1], 1)

    valid = torch.ones(B, n, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    visual, text = layout.visual & valid, valid & ~layout.visual
    before = torch.ones(n, n, dtype=torch.bool).tril()  # [query, key]: the key is not later

    def apart(place: Tensor) -> Tensor:  # (B, query, key)
        return (place[:, :, None] - place[:, None, :]).abs()

    def near(window: int | None) -> Tensor:
        if window is None:
            return before.expand(B, n, n)
        rho = (window - 1) // 2
        near = (apart(layout.image) == 0) & (apart(layout.row) <= rho) & (apart(layout.col) <= rho)
        return near & before if plan.window_causal else near

    sees_text = (before & text[:, None, :])[:, None]  # (B, 1, query, key)
    visual_query = visual[:, None, :, None]

    if angles is None:
        positions = torch.arange(n)[None] if position_ids is None else position_ids
        angles = positions.expand(B, n)[..., None].float() * inv_freq(config)

    h = inputs_embeds.to(dtype)
    states = [h]
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        seen = torch.where(visual[:, :, None], near(plan.windows[index]), before)
        sees_visual = (seen & visual[:, None, :])[:, None]
        x = norm(layer.input_layernorm, h)
        q_still = heads(linear(attention.q_proj, x))
        q = rotate(q_still, angles)
        k = rotate(heads(linear(attention.k_proj, x)), angles)
        v = heads(linear(attention.v_proj, x))
        scores = q @ k.transpose(-1, -2) / D**0.5

        seeing = masked_softmax(scores, sees_text | sees_visual)  # a head that is not blind
        mass = plan.cut_mass if index >= C else plan.head_mass
        if mass == "exact":  # visual probabilities are zeroed after the softmax
            blind = seeing * sees_text
        else:
            blind = masked_softmax(scores, sees_text)
            if mass == "sink":  # text queries: one more logit, without a value
                a, b = plan.sinks.a[index].to(dtype), plan.sinks.b
                s = a[None, :, None].expand(B, H, n)
                if b is not None:
                    s = s + (q_still * b[index].to(dtype)[:, None]).sum(-1)
                count = sees_visual.sum(-1).to(dtype)  # (B, 1, query)
                if plan.sinks.tokens is not None:
                    s = s + (count.clamp(min=1) / plan.sinks.tokens).log()
                s = s[..., None]
                hidden = ~sees_text & sees_text.any(-1, keepdim=True)  # of no key at all: nan
                lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1, True)
                sinks = (count > 0)[..., None] & ~visual_query
                blind = torch.where(sinks, torch.sigmoid(lse - s), 1) * blind
        kept = keep[index][None, :, None, None]
        weights = torch.where(kept & torch.tensor(index < C), seeing, blind)
        if plan.prune_visual_queries:
            weights = weights * ~(~kept & visual_query)
        out = linear(attention.o_proj, (weights @ v).transpose(1, 2).reshape(B, n, H * D))
        out = h + (out if plan.visual_attends[index] else out * ~visual[..., None])

        x = norm(layer.post_attention_layernorm, out)
        inner = F.silu(linear(mlp.gate_proj, x)) * linear(mlp.up_proj, x)
        used = torch.arange(inner.shape[-1]) < neurons[index]  # the neurons visual tokens use
        fed = linear(mlp.down_proj, inner * (used | ~visual[..., None]))
        out = out + (fed if neurons[index] else fed * ~visual[..., None])

        stopped = index >= C and plan.cut_mass != "exact"
        h = torch.where(visual[..., None], h, out) if stopped else out
        states.append(h)
    states[-1] = norm(model.model.norm, h)
    return OracleOutput(linear(model.lm_head, states[-1]), states[-1], tuple(states))


def oracle_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross entropy over labels that are not -100."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def extended(layout: Any, k: int) -> Any:
    """The layout with k text tokens after it."""
    return SimpleNamespace(
        visual=F.pad(layout.visual, (0, k), value=False),
        **{
            name: F.pad(getattr(layout, name), (0, k), value=-1) for name in ("image", "row", "col")
        },
    )


def oracle_greedy(
    model: Any,
    plan: Any,
    inputs_embeds: Tensor,
    layout: Any,
    steps: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Greedy tokens (B, steps) by full recomputation; new tokens are text."""
    tokens: list[Tensor] = []
    embeds = inputs_embeds
    for step in range(steps):
        mask = None if attention_mask is None else F.pad(attention_mask, (0, step), value=1)
        logits = oracle_forward(model, plan, embeds, extended(layout, step), mask).logits
        tokens.append(logits[:, -1].argmax(-1))
        embedded = model.model.embed_tokens.weight[tokens[-1]][:, None]
        embeds = torch.cat([embeds, embedded], 1)
    return torch.stack(tokens, 1)
