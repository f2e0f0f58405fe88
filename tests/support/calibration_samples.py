"""Samples for calibration, and the attention of a stock model over them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from layouts import SHAPE, Case, Shape, make_case, weights
from torch import Tensor

from yopo.calibration.head_rule import visual_ratio


def inputs(case: Case) -> dict[str, Any]:
    return {name: value for name, value in case.kwargs().items() if value is not None}


def sample(seed: int, shape: Shape = SHAPE, after: int = 4) -> dict[str, Any]:
    row = [("text", 2), ("image", 3, 4, False), ("text", after)]
    return inputs(make_case([row], shape.heads * 8, seed=seed))


def eager(shape: Shape) -> Any:
    """Stock's model of the same weights, which returns its attention probabilities."""
    from transformers import LlamaForCausalLM

    config = shape.config()
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights(shape), strict=False)
    return model.eval()


def naive(shape: Shape, case: Case) -> SimpleNamespace:
    """All that `collect` measures of one sample, from n × n attention maps."""
    model, visual = eager(shape), case.visual[0]
    layers = model.model.layers
    hidden: list[Tensor] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    for layer in layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: hidden.append(args[0][0]))
        layer.self_attn.q_proj.register_forward_hook(lambda m, args, out: queries.append(out[0]))
        layer.self_attn.k_proj.register_forward_hook(lambda m, args, out: keys.append(out[0]))
    with torch.no_grad():
        out = model(
            inputs_embeds=case.inputs_embeds,
            attention_mask=case.attention_mask,
            position_ids=case.position_ids,
            output_attentions=True,
            use_cache=False,
        )
    maps = [layer[0] for layer in out.attentions]
    behind = ~visual & (visual.cumsum(0) > 0)
    mass = [layer[:, behind][..., visual].sum(-1) for layer in maps]  # (H, queries)
    sinks = []
    before = visual.cumsum(0)[behind].double()
    for probabilities, q, k in zip(maps, queries, keys, strict=True):
        q = q.unflatten(-1, (shape.heads, -1)).double()
        k = k.unflatten(-1, (shape.kv_heads, -1)).double()
        k = k.repeat_interleave(shape.heads // shape.kv_heads, 1)
        # A token's score with itself, at which both rotations are the same, and its probability
        # give the log-sum-exp of all its scores.
        own = (q * k).sum(-1).T / q.shape[-1] ** 0.5  # (H, n)
        whole = own - probabilities.double().diagonal(dim1=1, dim2=2).log()
        share = probabilities[:, behind][..., visual].double().sum(-1)
        weight = share * (1 - share) + 0.03
        logits = whole[:, behind] + share.log() - before.log()
        sinks.append((weight * logits).sum(-1) / weight.sum(-1))
    norms = [layer.mlp.down_proj.weight.norm(dim=0) for layer in layers]
    return SimpleNamespace(
        ratios=visual_ratio(maps, visual),
        visual_mass=torch.stack([layer.mean(-1) for layer in mass]),
        sinks=torch.stack(sinks),
        text_tokens=int(behind.sum()),
        ffn_use=torch.stack(
            [(h[visual].abs() * n).sum(0) for h, n in zip(hidden, norms, strict=True)]
        ),
        logits=out.logits[0, -1],
    )
