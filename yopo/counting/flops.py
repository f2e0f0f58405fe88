"""Counts the FLOPs of a prefill and of a decode step, dense and under a plan. Arithmetic on shapes
only: nothing is run, loaded or printed.

A multiply-add is two FLOPs; norms, softmax, rotation, the vision tower and its projector are left
out, and so is what a sink adds to the shapes of several queries' attention, a key and 8 features
(text_attention.py); its logit is counted. Which heads, rows and neurons a layer computes is read
off the engine's own LayerPlan, so projections and FFN count what the engine executes, to the FLOP.
Attention counts by the `Work` it is given (pairs.py): the (query, key) pairs that see each other,
or those that the engine computes, which are more (it attends in bands, masked pairs included).

`paper_tflops` counts as the YOPO paper's tables do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yopo.counting.pairs import Work, useful, useful_step
from yopo.engine.layer_plan import LayerPlan, LayerPlans
from yopo.engine.layout import VisualLayout
from yopo.engine.text_attention import Sight
from yopo.plan.pruning_plan import PruningPlan

SYSTEM_TOKENS = 35  # text before the first image, as in LLaVA-1.5's prompt


@dataclass(frozen=True)
class Prompt:
    """A prompt: text tokens before the images, the images' grids, text tokens after them."""

    text_before: int
    grids: tuple[tuple[int, int], ...]
    text_after: int

    @classmethod
    def around(cls, grids: tuple[tuple[int, int], ...], text_tokens: int) -> Prompt:
        """Images after a system prompt; `text_tokens` in all, at least one of them behind them."""
        before = min(SYSTEM_TOKENS, text_tokens - 1)
        return cls(before, grids, text_tokens - before)

    @property
    def text(self) -> int:
        return self.text_before + self.text_after

    @property
    def visual(self) -> int:
        return sum(rows * cols for rows, cols in self.grids)

    def layout(self, batch: int = 1) -> VisualLayout:
        """The layout of a batch of this prompt."""
        mask = torch.zeros(batch, self.text + self.visual, dtype=torch.bool)
        mask[:, self.text_before : self.text_before + self.visual] = True
        return VisualLayout.from_mask(mask, [self.grids] * batch)


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer: of text rows and of visual rows."""

    text_projections: int
    text_attention: int
    text_ffn: int
    visual_projections: int
    visual_attention: int
    visual_ffn: int

    @property
    def visual(self) -> int:
        return self.visual_projections + self.visual_attention + self.visual_ffn

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def prefill_flops(
    shape: Any, prompt: Prompt, plan: PruningPlan | None = None, batch: int = 1
) -> list[LayerFlops]:
    """FLOPs of each layer of one prefill; `shape` has transformers' config names and head_dim."""
    layout = prompt.layout(batch)
    work = useful(layout, _all(layout), plan)
    return count(shape, plan, work)


def decode_flops(
    shape: Any, prompt: Prompt, plan: PruningPlan | None = None, batch: int = 1
) -> list[LayerFlops]:
    """FLOPs of each layer of the decode step after that prefill, its first."""
    layout = prompt.layout(batch)
    return count(shape, plan, useful_step(layout, _all(layout)))


def _all(layout: VisualLayout) -> Tensor:
    return torch.ones(layout.shape, dtype=torch.bool)


def layer_plans_of(shape: Any, plan: PruningPlan | None) -> LayerPlans:
    """What each layer computes; None: as the dense model, where every head sees everything."""
    if plan is None:
        ones = torch.ones(shape.num_hidden_layers, shape.num_attention_heads, dtype=torch.bool)
        plan = PruningPlan(ones, head_mass="drop", cut_mass="drop")
    return LayerPlans.build(shape, plan)


def count(shape: Any, plan: PruningPlan | None, work: Work) -> list[LayerFlops]:
    """FLOPs of each layer in a pass of `work`."""
    return [_layer(shape, layer, work) for layer in layer_plans_of(shape, plan).plans]


def _layer(shape: Any, layer: LayerPlan, work: Work) -> LayerFlops:
    hidden, dim, heads = shape.hidden_size, shape.head_dim, shape.num_attention_heads
    weight = 2 * hidden * dim  # of one row with the weights of one head of q, k, v or o
    vector = 2 * dim  # of a query with a key, or of a probability with a value
    neuron = 6 * hidden  # gate, up and down

    def attention(groups: Any, products: Mapping[Sight, int]) -> int:
        taking = (heads if group.q is None else len(group.q) for group in groups)
        return vector * sum(
            n * products[group.sight] for n, group in zip(taking, groups, strict=True)
        )

    rows = work.visual_rows
    of_visual = work.visual[layer.window if len(work.visual) > 1 else 0]
    queries = visual_queries(layer, heads)
    sink = layer.sink
    logits = 0 if sink is None or sink.b is None else work.text_rows * len(sink.b) * vector
    return LayerFlops(
        text_projections=work.text_rows * weight * 2 * (heads + shape.num_key_value_heads),
        text_attention=attention(layer.text, work.text) + logits,
        text_ffn=work.text_rows * neuron * shape.intermediate_size,
        visual_projections=rows * weight * (2 * queries + visual_vectors(layer)),
        visual_attention=attention(layer.visual, of_visual),
        visual_ffn=rows * neuron * visual_neurons(layer, shape),
    )


def visual_queries(layer: LayerPlan, heads: int) -> int:
    """Heads of which a layer computes queries and outputs of visual rows."""
    return heads if layer.visual_heads is None else len(layer.visual_heads)


def visual_neurons(layer: LayerPlan, shape: Any) -> int:
    """FFN neurons that a layer computes of visual rows."""
    if not layer.runs_visual:
        return 0
    return shape.intermediate_size if layer.neurons is None else layer.neurons


def visual_vectors(layer: LayerPlan) -> int:
    """Keys and values that a layer computes, and its stores hold, of one visual token."""
    if not layer.runs_visual:
        return 0
    stores = zip(layer.kv, layer.visual_keys, layer.visual_values, strict=True)
    return sum(len(heads) * (keys + values) for heads, keys, values in stores)


def lm_head_flops(shape: Any, rows: int) -> int:
    """FLOPs of the logits of `rows` positions; a prefill needs those of the last one of a row."""
    return 2 * rows * shape.hidden_size * shape.vocab_size


def paper_tflops(shape: Any, visual: int, plan: PruningPlan | None = None) -> float:
    """TFLOPs of the visual tokens as the YOPO paper's tables count them (arXiv 2410.06169).

    Per layer 2·(4nd² + 2n²d + 3ndm); under a plan the share of kept heads on both attention terms,
    1/r of the FFN, nothing from the layer cut on. Text, window, mass modes, key/value groups (GQA)
    and causality are not counted.

    LLaVA-1.5, n = 576: dense 7.63 and 14.89; half the layers, half the heads, half the FFN 1.91 and
    3.72, the table's 25 % rows. A published ragged mask gives 1.96 (7b_16) and 3.97 (13b_20).

    The paper's other dense figures come out with one n for all, 3041.7 visual tokens (a mean,
    perhaps), and the FFN widths of LLaMA-7B and -13B in place of the models' own: 25.68 for L, d, m
    = 32, 3072, 8192 (InternVL2-4B, its own sizes), 129.4 for 48, 6144, 13824 (InternVL2-26B, whose
    m is 16384), and 44.25 for 32, 4096, 11008, given both for InternVL2-8B (m 14336) and for
    Qwen2-VL-7B (28, 3584, 18944). This is inferred from the figures alone. By the models' own sizes
    so many tokens are 143.2 (26B), 52.21 (8B) and 47.16 (Qwen2-VL-7B).
    Of the pruned figures, 33.19 (8B) is 24 of 32 layers and 64.7 (26B) 24 of 48, all heads and
    neurons kept. 30.51 (Qwen2-VL-7B) and 18.42 (4B) fit no layer cut alone. A cut at 24 of 32 with
    80 and 90 % of the heads would give them, and so would other pairs; their head masks, which
    would tell, are not at hand: these two are not matched.
    """
    n, d, m = visual, shape.hidden_size, shape.intermediate_size
    attention, ffn = 4 * n * d * d + 2 * n * n * d, 3 * n * d * m
    if plan is None:
        return 2 * shape.num_hidden_layers * (attention + ffn) / 1e12
    kept = plan.head_keep[: plan.layer_cut].sum(1) / plan.num_heads
    total = 0.0
    for k, attends, used in zip(kept, plan.visual_attends, plan.ffn_neurons(m), strict=False):
        total += float(k) * (attention if attends else 2 * n * d * d) + ffn * used / m
    return 2 * total / 1e12
