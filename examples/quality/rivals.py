"""Rivals that have fewer visual tokens: FastV, random dropping, and a coarser picture.

The first two are one thing: read the picture densely up to a layer, choose which visual tokens go
on from there, and let the layers above see no others. FastV (arXiv 2403.06764) keeps those that the
last token attends to most; the control keeps random ones. Their own short pass over the Llama
layers; right for what it computes, and not made to be fast. A coarser picture is `Reader.grid`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from answers import Batch, Guess
from network import GRID, VISUAL, Reader
from torch import Tensor

from yopo.bench.simulation import rotate
from yopo.counting import flops
from yopo.versions import rope

Choose = Callable[[Tensor], Tensor]  # (q, 64) attention of the last token → (q, 64) scores


def by_attention(attention: Tensor) -> Tensor:
    """FastV."""
    return attention


def at_random(attention: Tensor) -> Tensor:
    return torch.rand(attention.shape, generator=torch.Generator().manual_seed(7))


# The coarser picture of each budget: whole parts of the 8 x 8 as long as it affords them.
COARSE = {50: (8, 4), 25: (4, 4), 12: (3, 2), 4: (2, 1)}
CHOICES = {"FastV": by_attention, "random after layer": at_random, "random tokens": at_random}


def _layer(
    reader: Reader, index: int, rows: Tensor, at: Tensor, past: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """One decoder layer: rows (b, n, d) at positions (b, n), after `past` keys and values.

    Returns the rows, the keys and values of all, and the queries (b, heads, n, head_dim).
    """
    layer, heads = reader.llama.model.layers[index], reader.config.num_attention_heads
    cos, sin = rope(reader.llama.model, rows, at, int(at.max()) + 1)
    cos, sin = cos[:, None], sin[:, None]
    normed, attention = layer.input_layernorm(rows), layer.self_attn

    def project(linear: torch.nn.Module) -> Tensor:
        return linear(normed).unflatten(-1, (heads, -1)).transpose(1, 2)

    q = rotate(project(attention.q_proj), cos, sin)
    k, v = rotate(project(attention.k_proj), cos, sin), project(attention.v_proj)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
    rows = rows + attention.o_proj(out.transpose(1, 2).flatten(2))
    return rows + layer.mlp(layer.post_attention_layernorm(rows)), (k, v), q


@torch.inference_mode()
def dropping(reader: Reader, layer: int, keep: int, choose: Choose = by_attention) -> Guess:
    """Answers with `keep` visual tokens from `layer` on; those that `choose` scores highest."""

    def guess(batch: Batch) -> Tensor:
        picture = reader.prefix(batch.features)
        text = reader.llama.get_input_embeddings()(batch.ids)
        place = torch.arange(1 + VISUAL + text.shape[1])
        before = place[None, : 1 + VISUAL].expand(len(picture), -1)
        after = place[None, 1 + VISUAL :].expand(len(text), -1)
        attention = torch.zeros(len(text), VISUAL)
        ends = torch.arange(len(text)), batch.last
        for index in range(layer):
            picture, past, _ = _layer(reader, index, picture, before, None)
            past = tuple(t[batch.owner] for t in past)
            text, (keys, _), q = _layer(reader, index, text, after, past)
        if layer:
            last = q.transpose(1, 2)[ends][:, :, None]  # (q, heads, 1, head_dim)
            sees = torch.arange(keys.shape[2]) <= 1 + VISUAL + batch.last[:, None]
            scores = (last @ keys.transpose(2, 3))[:, :, 0] * last.shape[-1] ** -0.5
            shares = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
            attention = shares[:, :, 1 : 1 + VISUAL].mean(1)
        chosen = choose(attention).topk(keep).indices.sort().values + 1
        kept = torch.cat([torch.zeros(len(text), 1, dtype=torch.long), chosen], 1)
        rows = picture[batch.owner[:, None], kept]
        rows, at = torch.cat([rows, text], 1), torch.cat([kept, after], 1)
        for index in range(layer, reader.config.num_hidden_layers):
            rows, _, _ = _layer(reader, index, rows, at, None)
        end = rows[:, 1 + keep :][ends]
        return reader.llama.lm_head(reader.llama.model.norm(end)).argmax(-1)

    return guess


def visual_flops(config: Any, layer: int, keep: int) -> float:
    """FLOPs of visual tokens in one prefill: all up to `layer`, `keep` from there on."""

    def each(tokens: int) -> float:
        grid = GRID if tokens == VISUAL else (1, tokens)
        one = flops.prefill_flops(config, flops.Prompt(1, (grid,), 0))[0]
        return one.visual_projections + one.visual_attention + one.visual_ffn

    return layer * each(VISUAL) + (config.num_hidden_layers - layer) * (each(keep) if keep else 0)


def affordable(config: Any, layer: int, budget: float) -> int | None:
    """How many tokens may go on from `layer` at `budget` of the dense FLOPs; None: not even 0."""
    most = budget * visual_flops(config, 0, VISUAL)
    fits = [keep for keep in range(VISUAL + 1) if visual_flops(config, layer, keep) <= most]
    return max(fits, default=None)


def kept(config: Any, rule: str, budget: float) -> tuple[int, int]:
    """From which layer on there are fewer tokens, and how many: what `budget` affords.

    FastV's layer is 2, or 1 where two dense layers are beyond the budget."""
    layer, keep = 0, affordable(config, 0, budget)
    if rule in ("FastV", "random after layer"):
        able = [n for n in range(3) if affordable(config, n, budget) is not None]
        layer, keep = able[-1], affordable(config, able[-1], budget)
    assert keep is not None
    return layer, keep
