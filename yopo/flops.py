"""Counts the FLOPs of a prefill, dense and under a plan. Arithmetic on shapes only.

A multiply-add is two FLOPs. What is counted is what must be done: the products with the weights,
and for attention the (query, key) pairs that see each other; norms, softmax and rotation are left
out. `paper_tflops` counts as the YOPO paper's table does instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .plan import PruningPlan


@dataclass(frozen=True)
class Prompt:
    """A prompt: text tokens before the images, the images' grids, text tokens after them."""

    text_before: int
    grids: tuple[tuple[int, int], ...]
    text_after: int

    @property
    def text(self) -> int:
        return self.text_before + self.text_after

    @property
    def visual(self) -> int:
        return sum(rows * cols for rows, cols in self.grids)


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer: of text rows and of visual rows."""

    text_projections: float
    text_attention: float
    text_ffn: float
    visual_projections: float
    visual_attention: float
    visual_ffn: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def prefill_flops(shape: Any, prompt: Prompt, plan: PruningPlan | None = None) -> list[LayerFlops]:
    """FLOPs of each layer of one prefill; `shape` has transformers' config names and head_dim."""
    if plan is None:
        return [_dense_layer(shape, prompt)] * shape.num_hidden_layers
    return [_pruned_layer(shape, prompt, plan, layer) for layer in range(plan.num_layers)]


def _dense_layer(shape: Any, prompt: Prompt) -> LayerFlops:
    heads, dim = shape.num_attention_heads, shape.head_dim
    text, visual, before, after = prompt.text, prompt.visual, prompt.text_before, prompt.text_after
    row = 4 * shape.hidden_size * dim * (heads + shape.num_key_value_heads)
    text_pairs = text * (text + 1) / 2 + after * visual
    visual_pairs = visual * (visual + 1) / 2 + visual * before
    ffn = 6 * shape.hidden_size * shape.intermediate_size
    pair = 4 * heads * dim
    return LayerFlops(
        text * row, pair * text_pairs, text * ffn, visual * row, pair * visual_pairs, visual * ffn
    )


def _pruned_layer(shape: Any, prompt: Prompt, plan: PruningPlan, layer: int) -> LayerFlops:
    heads, kv_heads, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    text, visual, before, after = prompt.text, prompt.visual, prompt.text_before, prompt.text_after
    keep = plan.head_keep[layer]
    kept = int(keep.sum())
    below_cut = layer < plan.layer_cut
    exact = (plan.head_mass if below_cut else plan.cut_mass) == "exact"
    seeing = kept if below_cut else 0  # heads whose text queries read visual values
    blind = heads - seeing
    dense = _dense_layer(shape, prompt)
    half_pair = 2 * dim  # of one head: a query with a key, or a probability with a value
    text_attention = half_pair * 2 * heads * text * (text + 1) / 2
    text_attention += half_pair * after * visual * (2 * seeing + (blind if exact else 0))
    if not below_cut and plan.cut_mass != "exact":
        return LayerFlops(dense.text_projections, text_attention, dense.text_ffn, 0, 0, 0)

    per_kv = heads // kv_heads
    groups = keep.view(kv_heads, per_kv)
    seeing_kv = int(groups.any(1).sum()) if below_cut else 0
    blind_kv = int((~groups).any(1).sum()) if below_cut else kv_heads
    seeing_q = seeing
    blind_q = kept if not below_cut else 0
    if not plan.prune_visual_queries:
        blind_q = blind
    columns = 2 * (seeing_q + blind_q) + 2 * seeing_kv + (blind_kv if exact else 0)
    pairs = _window_pairs(prompt.grids, plan) if plan.window else visual * (visual + 1) / 2
    attention = half_pair * 2 * (seeing_q + blind_q) * visual * before
    attention += half_pair * pairs * (2 * seeing_q + (blind_q if exact else 0))
    neurons = plan.ffn_neurons(shape.intermediate_size)
    return LayerFlops(
        dense.text_projections,
        text_attention,
        dense.text_ffn,
        2 * visual * shape.hidden_size * dim * columns,
        attention,
        6 * visual * shape.hidden_size * neurons,
    )


def _window_pairs(grids: Sequence[tuple[int, int]], plan: PruningPlan) -> float:
    """Pairs of visual tokens that see each other, over all grids."""
    reach = (plan.window - 1) // 2

    def near(size: int) -> int:
        return sum(min(size, i + reach + 1) - max(0, i - reach) for i in range(size))

    pairs = sum(near(rows) * near(cols) for rows, cols in grids)
    cells = sum(rows * cols for rows, cols in grids)
    return (pairs + cells) / 2 if plan.window_causal else pairs


def paper_tflops(shape: Any, visual: int, plan: PruningPlan | None = None) -> float:
    """TFLOPs of the visual tokens as the YOPO paper's table counts them.

    Per layer 2·(4nd² + 2n²d + 3ndm); under a plan the share of kept heads on both attention terms,
    1/r of the FFN, nothing from the layer cut on. The window is not counted.
    """
    n, d, m = visual, shape.hidden_size, shape.intermediate_size
    attention, ffn = 4 * n * d * d + 2 * n * n * d, 3 * n * d * m
    if plan is None:
        return 2 * shape.num_hidden_layers * (attention + ffn) / 1e12
    kept = plan.head_keep[: plan.layer_cut].sum(1) / plan.num_heads
    return 2 * sum(float(k) * attention + ffn / plan.ffn_ratio for k in kept) / 1e12
