"""What calibrating tells of its plan: figures, and the same in words. Computes none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yopo.calibration.search import Found
from yopo.calibration.sink_fit import SinkFit
from yopo.plan.pruning_plan import PruningPlan

FEW = 20  # of fewer questions judged by, a note says that they tell little


@dataclass(frozen=True)
class Report:
    """What there is to tell; None: not known yet, or not asked for. `str` gives the words.

    samples: how many the statistics are of. file: theirs, where it had more than are given now.
    influence: for each layer, KL (nats) of the next token's distribution from the dense model's if
        the visual tokens leave there, averaged over the samples.
    alpha: the threshold of the rule. search: every plan that a search tried. sinks: fitted to the
        plan; None: none were.
    judged: answers that the plan was judged by, which are `judges`. visual_flops: its share of the
        dense model's on these. same: share of them that is as the dense model's. kl: nats a token.
    """

    samples: int | None = None
    file: Path | None = None
    influence: tuple[float, ...] | None = None
    alpha: float | None = None
    search: Found | None = None
    plan: PruningPlan | None = None
    sinks: SinkFit | None = None
    judged: int | None = None
    judges: str | None = None
    visual_flops: float | None = None
    same: float | None = None
    kl: float | None = None

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """In the order in which calibrating comes to know them."""
        lines = []
        if self.file is not None:
            lines.append(
                f"statistics of {self.samples} samples, as many as {self.file} has already"
            )
        if self.influence is not None:
            layers = ", ".join(f"{layer}: {x:.2g}" for layer, x in enumerate(self.influence))
            lines.append(
                "KL (nats) of the next token's distribution from the dense model's, if the visual "
                f"tokens leave at layer … {layers}"
            )
        if self.alpha is not None:
            lines.append(f"alpha: {self.alpha:.4g}")
        if self.plan is not None:
            lines.append(f"plan: {self.plan.summary()}")
        if self.sinks is not None:
            lines.append(str(self.sinks))
        if self.judged is not None:
            lines.append(
                f"visual FLOPs: {100 * self.visual_flops:.1f} % of the dense model's. "
                f"{self.judged} questions {self.judges}: {100 * self.same:.1f} % answered as by "
                f"the dense model, KL {self.kl:.3g} nats per token"
            )
            if self.judged < FEW:
                lines.append("note: so few questions tell little; give more (--samples)")
        return lines


@dataclass
class ReportSoFar:
    """A report that grows, and says each of its lines as soon as that is known."""

    tell: Callable[[str], Any] | None = None
    report: Report = field(default_factory=Report)

    def add(self, **figures: Any) -> None:
        """Figures in the order of `Report.lines`."""
        said = len(self.report.lines())
        self.report = replace(self.report, **figures)
        for line in self.report.lines()[said:]:
            if self.tell is not None:
                self.tell(line)
