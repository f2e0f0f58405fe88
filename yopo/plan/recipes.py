"""Plans under which published models were made or measured, by name: what the fields of a
PruningPlan are where somebody else has chosen them. Numbers only.

There is no default for a family: which of these a checkpoint needs depends on how it was trained,
and is said in its plan.
"""

from __future__ import annotations

from typing import Any

from yopo.plan.pruning_plan import PruningPlan


def released_llava(head_keep: Any, *, window: int, layer_cut: int, ffn_ratio: float) -> PruningPlan:
    """What the released code computes of LLaVA-1.5, and its checkpoints were fine-tuned under: a
    window in both directions, no visual outputs in pruned heads, visual keys staying in the
    softmax everywhere."""
    return PruningPlan(head_keep, window=window, layer_cut=layer_cut, ffn_ratio=ffn_ratio)


def released_qwen2_vl(head_keep: Any, *, layer_cut: int) -> PruningPlan:
    """What the released code computes of Qwen2-VL, which was never fine-tuned: neither window nor
    FFN slice; pruned heads read no visual values (their keys stay in the softmax), for visual
    queries as for text; from layer_cut on the visual tokens are gone."""
    return PruningPlan(head_keep, layer_cut=layer_cut, cut_mass="drop", prune_visual_queries=False)


def training_free(
    head_keep: Any, *, layer_cut: int | None = None, window: int | None = None, **changes: Any
) -> PruningPlan:
    """For any model that was never fine-tuned with a plan: causal inside the image as it was
    trained, exact in pruned heads, dropped from layer_cut on. `changes`: fields of the plan."""
    values = dict(cut_mass="drop", window_causal=True, prune_visual_queries=False) | changes
    return PruningPlan(head_keep, layer_cut=layer_cut, window=window, **values)
