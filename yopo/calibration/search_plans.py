"""The plans that a search goes through: where it stands, as a `Point`, and the moves that lead to
cheaper and to dearer ones. Runs no model and chooses nothing; that is search.py's.

Of a point, heads are taken in units that share a key and value (GQA): less saves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from yopo.calibration.budget import VisualCost
from yopo.calibration.config import SearchConfig
from yopo.calibration.head_rule import released_head_keep, solve_alpha
from yopo.calibration.sample_statistics import Statistics
from yopo.plan.pruning_plan import PruningPlan

FFN_SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 0)  # of the neurons of a layer
WINDOWS = (None, 9, 5, 3)  # they hide later tokens: what the model was trained without seeing
HAND_MADE_WINDOW = 5

Move = tuple[str, int, int]  # what changes, in which layer (-1: all), to what


@dataclass(frozen=True)
class Point:
    """Where the search stands.

    reads: for each layer the units that text reads the image in, in order. attends: whether visual
    tokens attend there. neurons: how many of the FFN they use. window: of all layers.
    """

    reads: tuple[tuple[int, ...], ...]
    attends: tuple[bool, ...]
    neurons: tuple[int, ...]
    window: int | None = None

    def but(self, field: str, layer: int, value: object) -> Point:
        """This point with another `value` of one layer."""
        old = getattr(self, field)
        return replace(self, **{field: (*old[:layer], value, *old[layer + 1 :])})


class PlanMaker:
    """Makes plans of points, and points of points."""

    def __init__(self, statistics: Statistics, cost: VisualCost, config: SearchConfig) -> None:
        self._statistics, self._cost, self._budget = statistics, cost, config.budget
        self.masses = config.mass_fields(statistics)
        _, self.layers, self.heads = statistics.ratios.shape
        self.units = cost.shape.num_key_value_heads
        self._sizes = [int(share * cost.shape.intermediate_size) for share in FFN_SHARES]
        self._sizes = list(dict.fromkeys(self._sizes))  # of a tiny FFN some are the same
        # How much of their attention text queries give the image through each unit.
        mass = statistics.visual_mass.double().mean(0)
        self._mass = mass.unflatten(1, (self.units, -1)).mean(2)
        self._ranked = [
            tuple(row) for row in self._mass.argsort(dim=1, descending=True, stable=True).tolist()
        ]

    @property
    def dense(self) -> Point:
        """The point that prunes nothing of what can matter."""
        every = (tuple(range(self.units)),) * self.layers
        return self._living(Point(every, (True,) * self.layers, (self._sizes[0],) * self.layers))

    @property
    def least(self) -> Point:
        """The cheapest point: one unit reads the image in the first layer."""
        reads = ((self._ranked[0][0],), *((),) * (self.layers - 1))
        return Point(reads, (False,) * self.layers, (0,) * self.layers)

    def plan(self, point: Point) -> PruningPlan:
        """The plan that a point stands for."""
        keep = torch.zeros(self.layers, self.units, dtype=torch.bool)
        for layer, units in enumerate(point.reads):
            keep[layer, list(units)] = True
        return PruningPlan(
            keep.repeat_interleave(self.heads // self.units, 1),
            window=point.window,
            window_causal=True,
            ffn=point.neurons,
            visual_attention=point.attends,
            **self.masses,
        )

    def point(self, plan: PruningPlan) -> Point:
        """The point that prunes what `plan` does, or less where none is like it."""
        read = plan.head_keep.unflatten(1, (self.units, -1)).any(2)
        read[plan.layer_cut :] = False
        reads = tuple(tuple(row.nonzero()[:, 0].tolist()) for row in read)
        counts = plan.ffn_neurons(self._sizes[0])
        neurons = tuple(min(size for size in self._sizes if size >= count) for count in counts)
        passed = zip(plan.windows, plan.visual_attends, strict=True)
        widest = max((window or math.inf for window, on in passed if on), default=math.inf)
        windows = [window for window in WINDOWS if window is not None and window >= widest]
        return self._living(Point(reads, plan.visual_attends, neurons, min(windows, default=None)))

    def share(self, point: Point) -> float:
        """Its visual FLOPs relative to the dense model's."""
        return self._cost.share(self.plan(point))

    def removals(self, point: Point) -> Iterator[tuple[Move, Point]]:
        """Every point that is one thing cheaper. One unit that reads always stays."""
        reading = sum(map(len, point.reads))
        for layer in range(self.layers):
            units = point.reads[layer]
            for left in sorted({len(units) * quarters // 4 for quarters in range(4)}):
                if units and reading > len(units) - left:
                    stay = [unit for unit in self._ranked[layer] if unit in units][:left]
                    fewer = point.but("reads", layer, tuple(sorted(stay)))
                    yield ("reads", layer, left), self._living(fewer)
            if point.attends[layer]:
                yield ("attends", layer, 0), self._living(point.but("attends", layer, False))
            if point.neurons[layer]:
                smaller = self._sizes[self._sizes.index(point.neurons[layer]) + 1 :]
                for count in sorted({*smaller[:2], 0}):
                    fewer = point.but("neurons", layer, count)
                    yield ("neurons", layer, count), self._living(fewer)
        narrower = WINDOWS.index(point.window) + 1
        if narrower < len(WINDOWS) and any(point.attends):
            yield ("window", -1, narrower), replace(point, window=WINDOWS[narrower])

    def additions(self, point: Point) -> Iterator[tuple[Move, Point]]:
        """Every point that is one thing dearer."""
        for layer in range(self.layers):
            units = point.reads[layer]
            missing = [unit for unit in self._ranked[layer] if unit not in units]
            for more in sorted({min(1, len(missing)), len(missing)} - {0}):
                added = point.but("reads", layer, tuple(sorted((*units, *missing[:more]))))
                yield ("reads", layer, len(units) + more), self._living(added)
            if not point.attends[layer]:
                yield ("attends", layer, 1), self._living(point.but("attends", layer, True))
            size = self._sizes.index(point.neurons[layer])
            if size:
                added = point.but("neurons", layer, self._sizes[size - 1])
                yield ("neurons", layer, self._sizes[size - 1]), self._living(added)

    def guess(self, point: Point, move: Move, then: Point) -> float:
        """Before anything is measured: what `move` loses, on a scale of its own. A head's reading
        is worth the attention it gives the image; what changes visual tokens in a layer, the
        attention that is given them behind it."""
        field, layer, _ = move
        weights = [float(self._mass[i, list(units)].sum()) for i, units in enumerate(point.reads)]
        if field == "reads":
            return weights[layer] - float(self._mass[layer, list(then.reads[layer])].sum())
        behind = sum(weights[layer + 1 :]) / self.layers
        if field == "neurons":
            behind *= (point.neurons[layer] - then.neurons[layer]) / self._sizes[0]
        return behind

    def _living(self, point: Point) -> Point:
        """`point` without what no head sees: visual tokens need not change in the last layer that
        reads them, nor behind it, and attend with no head but those that read."""
        if self.masses["cut_mass"] == "exact":
            return point  # their keys count to the last layer
        last = max((i for i, units in enumerate(point.reads) if units), default=-1)
        attends = [on and i < last and bool(point.reads[i]) for i, on in enumerate(point.attends)]
        neurons = [count if i < last else 0 for i, count in enumerate(point.neurons)]
        return replace(point, attends=tuple(attends), neurons=tuple(neurons))

    # -- by hand -------------------------------------------------------------------------------

    def hand_made(self) -> PruningPlan | None:
        """Half the layers, and of heads and FFN so much that the budget holds: half and half for a
        quarter of the FLOPs. Where that is no plan: fewer heads, then fewer layers; None where that
        does not help either."""
        share = min(1.0, 2 * self._budget)
        for cut in range(max(1, self.layers // 2), 0, -1):
            for first in (2, 1, 0):
                for part in (1.0, 0.75, 0.5, 0.25, 0.0):
                    heads = max(1 / (cut * self.heads), part * share)
                    plan = self._by_rule(cut, heads, first)
                    ratio = self._cost.ffn_ratio_within(plan, self._budget)
                    if ratio is not None:
                        even = min(1 / heads, self._cost.shape.intermediate_size)
                        return replace(plan, ffn_ratio=max(ratio, even))
        return None

    def _by_rule(self, cut: int, heads: float, first: int) -> PruningPlan:
        """The share `heads` of those below the layer `cut`; the first layers keep all of theirs."""
        scores = self._statistics.ratios[:, :cut]
        keep = torch.zeros(self.layers, self.heads, dtype=torch.bool)
        alpha = solve_alpha(scores, heads, keep_first=first)
        keep[:cut] = released_head_keep(scores, alpha, keep_first=first)
        return PruningPlan(
            keep, window=HAND_MADE_WINDOW, window_causal=True, layer_cut=cut, **self.masses
        )

    def refuse_unreachable(self) -> None:
        """Raises ValueError unless some plan with these masses is within the budget."""
        least = self.share(self.least)
        if least > self._budget:
            masses = f"{self.masses['head_mass']}/{self.masses['cut_mass']}"
            raise ValueError(
                f"budget is {self._budget:g}, which no plan with mass {masses} reaches: its least "
                f"is {least:.4f} of the visual FLOPs, one head that reads the image. Give more"
                + ("; drop and sink take less" if "exact" in masses else "")
            )
