"""Bytes that a model needs under a plan: the KV cache of a prompt, as visual_cache.py's stores hold
it, and the weights. Arithmetic on shapes only; FLOPs are flops.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from yopo.counting.flops import layer_plans_of, visual_neurons, visual_queries, visual_vectors
from yopo.engine.head_store import GROWTH, SPARE
from yopo.plan.pruning_plan import PruningPlan


@dataclass(frozen=True)
class KVBytes:
    """Bytes of one layer's keys and values.

    text, visual: of filled slots, both kinds as VisualCache.nbytes counts them.
    room: of the slots kept free for tokens to come (0 for the dense model: stock keeps none).
    """

    text: int
    visual: int
    room: int

    @property
    def filled(self) -> int:
        return self.text + self.visual


def kv_bytes(
    shape: Any,
    plan: PruningPlan | None,
    text_slots: int,
    visual_slots: int,
    batch: int = 1,
    itemsize: int = 2,
) -> list[KVBytes]:
    """Of each layer after a prefill of `text_slots` text and `visual_slots` visual tokens a row."""
    token = batch * shape.head_dim * itemsize
    room = 0 if plan is None else int(GROWTH * text_slots) + SPARE - text_slots
    layers = []
    for layer in layer_plans_of(shape, plan).plans:
        held = sum(map(len, layer.kv))
        visual = visual_slots * visual_vectors(layer)
        layers.append(
            KVBytes(2 * text_slots * held * token, visual * token, 2 * room * held * token)
        )
    return layers


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a language model's weights.

    total: all parameters. forward: read by any forward, each matrix once; besides, a row of the
    embedding for each text token. visual: those that visual rows are multiplied with. A plan
    shrinks `visual` alone: text rows go through everything.
    """

    total: int
    forward: int
    visual: int


def weight_bytes(shape: Any, plan: PruningPlan | None, itemsize: int = 2) -> WeightBytes:
    """Of a Llama-like model of `shape` (presets.Shape)."""
    layers = shape.num_hidden_layers * shape.layer_parameters
    table = shape.vocab_size * shape.hidden_size
    total = layers + shape.hidden_size + table * (1 if shape.tied else 2)
    forward = layers + shape.hidden_size + table
    visual = 0
    for layer in layer_plans_of(shape, plan).plans:
        heads = 2 * visual_queries(layer, shape.num_attention_heads) + visual_vectors(layer)
        neurons = visual_neurons(layer, shape)
        visual += shape.hidden_size * (heads * shape.head_dim + 3 * neurons)
    return WeightBytes(total * itemsize, forward * itemsize, visual * itemsize)
