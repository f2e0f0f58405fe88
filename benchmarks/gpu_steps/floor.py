"""The roofline: seconds under which no prefill and no decode step can come, by the rates measured
in the same run. Arithmetic on shapes only."""

from __future__ import annotations

from collections.abc import Mapping

from gpu_steps.scale import DTYPE
from yopo.counting.flops import Prompt, prefill_flops
from yopo.counting.presets import Shape
from yopo.plan.pruning_plan import PruningPlan


def prefill_floor(
    shape: Shape, prompt: Prompt, plan: PruningPlan | None, batch: int, rates: Mapping[str, float]
) -> float:
    """Of each layer the FLOPs that must be done or the weights that must be read, whichever takes
    longer; and of the last row's logits."""
    rate, bandwidth = rates["product_flops_s"], rates["copy_bytes_s"]
    weights = shape.layer_weights * DTYPE.itemsize / bandwidth
    layers = prefill_flops(shape, prompt, plan)
    head = shape.hidden_size * shape.vocab_size
    logits = max(2 * batch * head / rate, head * DTYPE.itemsize / bandwidth)
    return logits + sum(max(batch * layer.total / rate, weights) for layer in layers)


def decode_floor(shape: Shape, kv_bytes: int, rates: Mapping[str, float]) -> float:
    """All weights and all cached keys and values are read once."""
    weights = shape.num_hidden_layers * shape.layer_weights + shape.hidden_size * shape.vocab_size
    return (weights * DTYPE.itemsize + kv_bytes) / rates["copy_bytes_s"]
