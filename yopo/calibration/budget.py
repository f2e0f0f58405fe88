"""What share of a dense model's visual FLOPs a plan leaves, over given prompts. Arithmetic only.

Visual FLOPs are those of visual rows (projections, attention, FFN) in a prefill, as flops.py counts
them: what is computed, with the window and the true heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from types import SimpleNamespace
from typing import Any

from yopo.counting.flops import Prompt, prefill_flops
from yopo.plan.config_fields import head_sizes
from yopo.plan.pruning_plan import PruningPlan


class VisualCost:
    """Counts plans of the model that `config` describes on `prompts`."""

    def __init__(self, config: Any, prompts: Iterable[Prompt]) -> None:
        heads, kv_heads, head_dim = head_sizes(config)
        self.shape = SimpleNamespace(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
        )
        # Visual rows see nothing of what comes after: prompts often differ in that alone.
        self._prompts = Counter(Prompt(p.text_before, p.grids, 0) for p in prompts)
        self._dense = self._flops(None)

    def share(self, plan: PruningPlan) -> float:
        """The plan's visual FLOPs relative to the dense model's: 0 to 1."""
        return self._flops(plan) / self._dense

    def ffn_ratio_within(self, plan: PruningPlan, budget: float) -> float | None:
        """The least ffn_ratio with which `plan` stays within `budget`; None if none does."""
        size = self.shape.intermediate_size
        # Linear in the number of neurons.
        one, all_ = (self.share(replace(plan, ffn_ratio=ratio)) for ratio in (size, 1))
        if all_ <= budget:
            return 1.0
        if one > budget:
            return None
        neurons = 1 + int((budget - one) / (all_ - one) * (size - 1))
        ratio = min(size, ceil(1000 * size / neurons) / 1000)  # a number that people can read
        return float(ratio)

    def _flops(self, plan: PruningPlan | None) -> float:
        return sum(
            times * (layer.visual_projections + layer.visual_attention + layer.visual_ffn)
            for prompt, times in self._prompts.items()
            for layer in prefill_flops(self.shape, prompt, plan)
        )
