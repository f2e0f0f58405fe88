"""Which part of every layer a process computes where several share them (tensor parallelism): heads
and FFN neurons, in equal parts and in order. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from yopo.plan.pruning_plan import PruningPlan


@dataclass(frozen=True)
class ModelPart:
    """The part `rank` of `count`, from 0 on."""

    rank: int = 0
    count: int = 1

    def of_plan(self, plan: PruningPlan) -> PruningPlan:
        """A plan for the query heads of this part."""
        if self.count == 1:
            return plan
        own = self.among(plan.num_heads)
        sinks = plan.sinks
        if sinks is not None:
            b = None if sinks.b is None else sinks.b[:, own]
            sinks = replace(sinks, a=sinks.a[:, own], b=b)
        return replace(plan, head_keep=plan.head_keep[:, own], sinks=sinks)

    def among(self, whole: int) -> slice:
        """Its heads or neurons, of so many; as torch.chunk parts them."""
        each = -(-whole // self.count)
        return slice(min(self.rank * each, whole), min((self.rank + 1) * each, whole))

    def size(self, whole: int) -> int:
        """How many of so many are its."""
        own = self.among(whole)
        return own.stop - own.start

    def of_first(self, first: int, whole: int) -> int:
        """How many of the first ones are its."""
        own = self.among(whole)
        return min(max(first - own.start, 0), own.stop - own.start)


WHOLE = ModelPart()
