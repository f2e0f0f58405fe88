"""The roofline: seconds under which no prefill and no decode step can come, by the rates that the
machine reached in the same run. Arithmetic on shapes only."""

from __future__ import annotations

from yopo.counting.flops import Prompt, prefill_flops
from yopo.counting.presets import Shape
from yopo.plan.pruning_plan import PruningPlan

Rates = tuple[float, float]  # FLOP/s and bytes/s


def prefill_floor(
    shape: Shape, prompt: Prompt, plan: PruningPlan | None, batch: int, itemsize: int, rates: Rates
) -> float:
    """Of each layer the FLOPs that must be done or the weights that must be read, whichever takes
    longer; and of the last row's logits."""
    rate, bandwidth = rates
    read = shape.layer_weights * itemsize / bandwidth
    layers = prefill_flops(shape, prompt, plan)
    head = 2 * shape.hidden_size * shape.vocab_size
    last = max(batch * head / rate, head / 2 * itemsize / bandwidth)
    return last + sum(max(batch * layer.total / rate, read) for layer in layers)


def decode_floor(shape: Shape, kv_bytes: int, itemsize: int, rates: Rates) -> float:
    """All weights and all cached keys and values are read once."""
    weights = shape.num_hidden_layers * shape.layer_weights + shape.hidden_size * shape.vocab_size
    return (weights * itemsize + kv_bytes) / rates[1]
