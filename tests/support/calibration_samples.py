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
    values: list[Tensor] = []
    for layer in layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: hidden.append(args[0][0]))
        layer.self_attn.v_proj.register_forward_hook(lambda m, args, out: values.append(out[0]))
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
    text_mass = []
    for probabilities, v in zip(maps, values, strict=True):
        v = v.unflatten(-1, (shape.kv_heads, -1)).transpose(0, 1)
        v = v.repeat_interleave(shape.heads // shape.kv_heads, 0)  # (H, n, D)
        rows = probabilities[:, behind].double()
        text = rows.masked_fill(visual, 0)
        share = text.sum(-1, keepdim=True)
        text_only, dense = text / share @ v.double(), rows @ v.double()
        assert text_only.shape == dense.shape
        weight = text_only.square().sum(-1)
        text_mass.append((share[..., 0] * weight).sum(-1) / weight.sum(-1))
    norms = [layer.mlp.down_proj.weight.norm(dim=0) for layer in layers]
    return SimpleNamespace(
        ratios=visual_ratio(maps, visual),
        visual_mass=torch.stack([layer.mean(-1) for layer in mass]),
        text_mass=torch.stack(text_mass),
        text_tokens=int(behind.sum()),
        ffn_use=torch.stack(
            [(h[visual].abs() * n).sum(0) for h, n in zip(hidden, norms, strict=True)]
        ),
        logits=out.logits[0, -1],
    )
