"""What is counted or timed: a model's shape, a plan, a prompt, a batch of it, a dtype. Holds the
dataclass alone; commands make it of arguments and checkpoints, counts.py counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

from yopo.counting.flops import Prompt
from yopo.counting.presets import Shape
from yopo.plan.pruning_plan import PruningPlan

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a weight or a cached number


@dataclass(frozen=True)
class Setting:
    """plan_name: what the user called the plan, None for the checkpoint's own."""

    name: str
    shape: Shape
    plan: PruningPlan | None
    plan_name: str | None
    prompt: Prompt
    batch: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]
