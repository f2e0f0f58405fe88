"""Plans tried: each is run once, and what came out is kept, in a file too where there is one, so
that a search that was stopped goes on. Chooses no plan.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from yopo.calibration.budget import VisualCost
from yopo.calibration.divergence import Reference, divergence
from yopo.calibration.processes import by_first, is_first
from yopo.calibration.sample_statistics import digest_of
from yopo.errors import CannotGoOn
from yopo.plan.pruning_plan import PruningPlan
from yopo.prompts.sample import ANSWER

# Of answers that a model is sure of, as of what it was trained on, KL tells little until they turn:
# at 4 plans come in the order of what they get right of unseen questions, at 1 they do not.
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Evaluation:
    """One plan tried. why: which move led to it. visual_flops: share of the dense model's.
    divergence, same: means over the held-out samples (divergence.Change), KL at
    TEMPERATURE."""

    why: str
    plan: PruningPlan
    visual_flops: float
    divergence: float
    same: float


class Trials:
    """Runs plans.

    cost: counts them. most: so many, and no more. path: a file to keep them in, JSON lines; what it
    holds of an earlier run is not run again. log: told of each plan tried.

    Raises CannotGoOn where the file is of another model or other samples.
    """

    def __init__(
        self,
        model: nn.Module,
        known: Sequence[Reference],
        cost: VisualCost,
        most: int,
        *,
        mark: str = "",
        path: Path | None = None,
        log: Callable[[Evaluation], None] | None = None,
        progress: bool = False,
    ) -> None:
        self._model, self._known, self._cost = model, known, cost
        self._most, self._log = most, log
        self._by_plan: dict[PruningPlan, Evaluation] = {}
        self._file = None if path is None else _TrialsFile(path, _mark(mark, known))
        self._bar = tqdm(desc="search", total=most, disable=not (progress and is_first()))

    @property
    def done(self) -> tuple[Evaluation, ...]:
        """All plans tried, in order."""
        return tuple(self._by_plan.values())

    @property
    def left(self) -> int:
        """How many more may be tried."""
        return self._most - len(self._by_plan)

    def known(self, plan: PruningPlan) -> bool:
        """Whether running it costs nothing."""
        return plan in self._by_plan

    def run(self, why: str, plan: PruningPlan) -> Evaluation:
        """What comes out under `plan`."""
        if plan not in self._by_plan:
            earlier = self._file and self._file.find(plan)
            kl, same = earlier or self._measure(plan)
            if self._file is not None and not earlier:
                self._file.add(plan, kl, same)
            kl = kl if math.isfinite(kl) else math.inf  # NaN would pass for the least
            tried = Evaluation(why, plan, self._cost.share(plan), kl, same)
            self._by_plan[plan] = tried
            self._bar.update()
            if self._log is not None:
                self._log(tried)
        return self._by_plan[plan]

    def close(self) -> None:
        """No more are tried."""
        self._bar.total = len(self._by_plan)
        self._bar.close()

    def _measure(self, plan: PruningPlan) -> tuple[float, float]:
        change = divergence(self._model, plan, self._known, TEMPERATURE)
        return float(change.kl.mean()), float(change.same.double().mean())


class _TrialsFile:
    """JSON lines: first what the trials are of, then each plan's key with what came out. A line
    that was not written whole, the last, does not count."""

    def __init__(self, path: Path, mark: str) -> None:
        self._path = path
        self._found = by_first(partial(_begun, path, mark))

    def find(self, plan: PruningPlan) -> tuple[float, float] | None:
        return self._found.get(_key(plan))

    def add(self, plan: PruningPlan, kl: float, same: float) -> None:
        line = json.dumps({"plan": _key(plan), "kl": kl, "same": same})
        if is_first():
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def _begun(path: Path, mark: str) -> dict[str, tuple[float, float]]:
    """What the file holds, by the keys of plans; from now on it is of `mark`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        read = [json.loads(line) for line in whole]
        begun = read[0]["of"] if read else mark
        found = {one["plan"]: (one["kl"], one["same"]) for one in read[1:]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotGoOn(f"{path} is no file of a search: {error!r}") from error
    if begun != mark:
        raise CannotGoOn(
            f"{path} was begun with another model or other samples: give the same in the same "
            "order, or start anew"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(whole) or json.dumps({"of": mark}) + "\n", encoding="utf-8")
    return found


def _key(plan: PruningPlan) -> str:
    holder: dict[str, Any] = {}
    plan.save_to(holder)
    return hashlib.sha256(json.dumps(holder, sort_keys=True).encode()).hexdigest()[:32]


def _mark(model: str, known: Sequence[Reference]) -> str:
    digest = hashlib.sha256(f"{model} {TEMPERATURE}".encode())
    for reference in known:
        digest.update(digest_of({**reference.inputs, ANSWER: reference.answer}).encode())
    return digest.hexdigest()[:32]
