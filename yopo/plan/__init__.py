"""What is pruned: the plan, its file format, head masks, published plans. Knows no model, and of a
checkpoint's files only head masks."""

from yopo.plan.pruning_plan import PruningPlan

__all__ = ["PruningPlan"]
