"""`yopo.calibrate`: from a model and samples to a plan, and to all that was found on the way. Puts
the parts together: statistics (collect.py), a rule for heads (head_rule.py) or a search within a
budget (search.py), the order of FFN neurons (neurons.py), sinks fitted to the plan (sink_fit.py),
what the plan changes (divergence.py). Reads and writes no file but that of the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from yopo.calibration import neurons
from yopo.calibration.budget import VisualCost
from yopo.calibration.calibration_report import Report, ReportSoFar
from yopo.calibration.collect import collect
from yopo.calibration.config import RuleConfig, SearchConfig, config_of
from yopo.calibration.divergence import divergence, references
from yopo.calibration.head_rule import plan_by_rule
from yopo.calibration.processes import agree, is_first, shared
from yopo.calibration.sample_split import SampleSplit, split_for
from yopo.calibration.sample_statistics import Statistics
from yopo.calibration.search import search
from yopo.calibration.sink_fit import fit_sinks
from yopo.checkpoint.neuron_order import checksum
from yopo.models.attach import ffn_order_of
from yopo.models.trial import decoder_of
from yopo.plan.pruning_plan import PruningPlan
from yopo.prompts.sample import Sample


@dataclass(frozen=True, eq=False)
class Calibration:
    """What calibrating a model came to.

    plan: for the model as it is now.
    statistics: of the model as it was given, before its neurons were put in order.
    neuron_order: (L, I), the permutation that was put on the model (`neurons.undo` takes it back);
        None: none was.
    report: figures, and in words what they say.
    """

    plan: PruningPlan
    statistics: Statistics
    neuron_order: Tensor | None
    report: Report


def calibrate(
    model: nn.Module,
    samples: Iterable[Sample] = (),
    config: RuleConfig | SearchConfig | None = None,
    *,
    held_out: Iterable[Sample] | None = None,
    statistics: Statistics | None = None,
    statistics_path: str | Path | None = None,
    search_path: str | Path | None = None,
    progress: bool = False,
    tell: Callable[[str], Any] | None = None,
    distributed: bool = False,
    **settings: Any,
) -> Calibration:
    """A plan for `model`, made from `samples`, model inputs of one prompt each (sample.py).

    config: a RuleConfig or a SearchConfig; or their fields as `settings`: with `budget` the plan
        under which answers change least, of those that take at most this share of the dense model's
        visual FLOPs; without, the plan by a rule for heads.
    held_out: other samples, by whose answers a search chooses; None: every second sample, of which
        no statistics are taken then. Every third of those held out judges the plan and chooses
        nothing.
    statistics: of this model, in place of taking them. statistics_path: a file that is kept up to
        date with them: the same call goes on from where it was stopped. search_path: the same of
        the plans that a search tries.
    tell: is given each line of the report as soon as it is known.
    distributed: the processes that torch.distributed joined, each of which calls this with the same
        arguments, share the samples; each gets the plan that one alone would get, to the bit (on as
        many threads), and the first writes and speaks.

    The model and its plan stay as they are, but for the order of its FFN neurons, and that only
    where `reorder_neurons` is set and the call succeeds.

    Raises ValueError naming what does not fit (CannotGoOn: of an earlier run), TypeError for a
    setting that there is not, or FFNs that cannot be put in another order.
    """
    if config is None:
        config = config_of(settings)
    elif settings:
        raise TypeError(f"config and {next(iter(settings))} are both given: put it in the config")
    if statistics is not None and statistics_path is not None:
        raise ValueError("statistics and statistics_path are both given: none are taken then")
    split = split_for(config, samples, held_out, measured=statistics is not None)
    with shared(distributed):
        report = ReportSoFar(tell if is_first() else None)
        run = _Run(model, config, split, report, search_path, progress)
        return run.all(statistics, statistics_path)


@dataclass(frozen=True)
class _Run:
    """One call of `calibrate`: all of it, and its steps in the order in which they are taken."""

    model: nn.Module
    config: RuleConfig | SearchConfig
    split: SampleSplit
    report: ReportSoFar
    search_path: str | Path | None
    progress: bool

    def all(self, statistics: Statistics | None, path: str | Path | None) -> Calibration:
        agree("settings", self.config)
        self.config.check_fit(decoder_of(self.model).config)
        before = self.order_before()
        if statistics is None:
            statistics = self.measure(path)
        statistics.check(self.model)
        order, seen = self.reorder(statistics)
        try:
            plan = self.fit(self.choose(seen))
            self.judge(plan)
        except BaseException:
            if order is not None:
                neurons.undo(self.model, order)
            raise
        plan = replace(plan, ffn_order=before if order is None else checksum(order))
        return Calibration(plan, statistics, order, self.report.report)

    def order_before(self) -> str | None:
        """Which order FFN neurons are in already. Raises ValueError if it is to be changed."""
        before = ffn_order_of(self.model)
        if before is not None and self.config.reorder_neurons:
            name = getattr(decoder_of(self.model).config, "_name_or_path", "") or "this model"
            raise ValueError(
                f"the FFN neurons of {name} are in another order already: calibrate the checkpoint "
                "that it was made of, or keep their order (--first-neurons; in Python "
                "reorder_neurons=False)"
            )
        return before

    def measure(self, path: str | Path | None) -> Statistics:
        taken, influence = self.split.taken, self.config.influence
        found = collect(self.model, taken, path=path, influence=influence, progress=self.progress)
        figures: dict[str, Any] = {"samples": len(found)}
        if path is not None and isinstance(taken, Sized) and len(found) > len(taken):
            figures["file"] = Path(path)
        if influence:
            figures["influence"] = tuple(found.influence.double().nanmean(0).tolist())
        self.report.add(**figures)
        return found

    def reorder(self, statistics: Statistics) -> tuple[Tensor | None, Statistics]:
        """The order put on the model, and the statistics as they are of it then."""
        if not self.config.reorder_neurons:
            return None, statistics
        try:
            return neurons.reorder(self.model, statistics)
        except TypeError as error:
            raise TypeError(
                f"{error}; or keep their order: --first-neurons (in Python reorder_neurons=False)"
            ) from error

    def choose(self, statistics: Statistics) -> PruningPlan:
        """The plan by the rule or the search, its sinks those of the statistics."""
        model, config = self.model, self.config
        known = references(model, self.split.choosing, config.answer_tokens)
        if isinstance(config, SearchConfig):
            path, progress = self.search_path, self.progress
            found = search(model, known, statistics, config, path=path, progress=progress)
            plan = found.plan
            self.report.add(search=found)
        else:
            plan, alpha = plan_by_rule(statistics, config)
            self.report.add(alpha=alpha)
        self.report.add(plan=plan)
        return plan

    def fit(self, plan: PruningPlan) -> PruningPlan:
        """`plan` with sinks fitted to it; as it is where it has none, or there are no samples."""
        samples, config = self.split.fitting, self.config
        if plan.sinks is None:
            return plan
        if not len(samples):
            if config.tune_sinks is not None:
                raise ValueError("tune_sinks is given, but no samples to tune by")
            return plan
        fit = fit_sinks(
            self.model,
            samples,
            plan,
            target="dense",
            tune=config.tune_sinks,
            answer_tokens=config.answer_tokens,
            progress=self.progress,
        )
        self.report.add(sinks=fit, plan=fit.plan)
        return fit.plan

    def judge(self, plan: PruningPlan) -> None:
        """Reports what `plan` changes of the answers to the samples that judge it."""
        known = references(self.model, self.split.judging, self.config.answer_tokens)
        if not known:
            return
        cost = VisualCost(decoder_of(self.model).config, (r.prompt for r in known))
        change = divergence(self.model, plan, known)
        self.report.add(
            judged=len(known),
            judges=self.split.judges,
            visual_flops=cost.share(plan),
            same=float(change.same.double().mean()),
            kl=float(change.kl.mean()),
        )
