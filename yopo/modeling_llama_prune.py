"""LlamaModel and LlamaForCausalLM to be built from a config that may carry a plan: the installed
ones, pruned as they are built. What pruning is, is said in models/decoder.py and causal_lm.py.
"""

from __future__ import annotations

from typing import Any

from transformers.models.llama import modeling_llama as stock

from yopo.models.building import prune_loaded
from yopo.plan.pruning_plan import PruningPlan


class LlamaModel(stock.LlamaModel):
    """transformers' LlamaModel; with a plan in its config, pruned by it."""

    def __init__(self, config: Any) -> None:
        PruningPlan.from_config(config)  # first: a plan that cannot be costs no loading
        super().__init__(config)
        prune_loaded(self)


class LlamaForCausalLM(stock.LlamaForCausalLM):
    """transformers' LlamaForCausalLM; with a plan in its config, pruned by it."""

    def __init__(self, config: Any) -> None:
        PruningPlan.from_config(config)
        super().__init__(config)
        prune_loaded(self)
