"""What calibrating can be told: `RuleConfig` for a plan by a rule for heads, `SearchConfig` for the
best one found within a budget. Each is checked when it is made and handed on whole. Settings only:
nothing is measured or chosen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass, fields, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yopo.calibration.sample_statistics import Statistics

RULES = ("released",)
Called = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What both ways to a plan have in common.

    mass: HEAD[/CUT], the plan's head_mass and cut_mass.
    tune_sinks: so many steps move the sinks fitted to the plan by gradient (sink_tuning.py).
    reorder_neurons: FFN neurons are put in the order of their use by visual tokens, in place.
    influence: also measure how much visual tokens still matter after each layer, which takes about
        as long as the other statistics.
    limit: take only so many samples.
    answer_tokens: of the dense model's answer at most, where a sample has none.
    called: what a setting is called in an error; a command has its flags.

    Raises ValueError that names the setting, its value and what is allowed.
    """

    mass: str = "sink"
    tune_sinks: int | None = None
    reorder_neurons: bool = False
    influence: bool = False
    limit: int | None = None
    answer_tokens: int = 16
    called: InitVar[Called] = str

    def __post_init__(self, called: Called) -> None:
        # With torch: a parser needs RULES alone.
        from yopo.plan.pruning_plan import split_masses
        from yopo.plan.value_checks import integer

        masses = split_masses(self.mass, called("mass"))
        if self.tune_sinks is not None and "sink" not in masses:
            raise ValueError(
                f"{called('tune_sinks')} tunes sinks, but {called('mass')} is {self.mass}"
            )
        for name in ("tune_sinks", "limit", "answer_tokens", "evaluations"):
            value = getattr(self, name, None)
            if value is not None:
                integer(called(name), value, 1, None)

    def check_fit(self, model_config: Any) -> None:
        """Raises ValueError where a model of this config cannot have what is chosen by hand."""

    @property
    def holds_out(self) -> bool:
        """Whether a plan is chosen by answers to samples held out."""
        return False

    def mass_fields(self, statistics: Statistics) -> dict[str, Any]:
        """The fields of a plan that say where the visual mass goes."""
        from yopo.plan.pruning_plan import split_masses

        masses = split_masses(self.mass)
        sinks = statistics.sinks() if "sink" in masses else None
        return {"head_mass": masses[0], "cut_mass": masses[1], "sinks": sinks}


@dataclass(frozen=True, kw_only=True)
class RuleConfig(CalibrationConfig):
    """The plan by a rule for heads (head_rule.py), the rest of it by hand.

    rule: which. alpha: its threshold; or keep: the share of the heads of all layers that is kept
    (0.5; the first two layers keep theirs whatever it is). layer_cut: None: half the layers.
    window, window_causal, ffn_ratio: as the plan's.
    """

    rule: str = RULES[0]
    alpha: float | None = None
    keep: float | None = None
    window: int | None = 5
    window_causal: bool = False
    layer_cut: int | None = None
    ffn_ratio: float = 2

    def __post_init__(self, called: Called) -> None:
        super().__post_init__(called)
        if self.rule not in RULES:
            raise ValueError(f"{called('rule')} is {self.rule!r}; allowed: {', '.join(RULES)}")
        if self.alpha is not None and self.keep is not None:
            raise ValueError(
                f"{called('alpha')} and {called('keep')} are both given: each decides how many "
                "heads are kept"
            )
        if self.alpha is not None and not isfinite(self.alpha):
            raise ValueError(f"{called('alpha')} is {self.alpha}; allowed: finite numbers")
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise ValueError(
                f"{called('keep')} is {self.keep:g}; allowed: a share of the heads, 0 to 1"
            )

    def check_fit(self, model_config: Any) -> None:
        from yopo.plan.pruning_plan import PruningPlan

        dense = PruningPlan.dense(model_config)
        cut = dense.num_layers if self.layer_cut is None else self.layer_cut
        by_hand = {"window": self.window, "layer_cut": cut, "ffn_ratio": self.ffn_ratio}
        replace(dense, **by_hand).validate(model_config)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CalibrationConfig):
    """The plan under which answers change least (search.py), of those within a budget.

    budget: share of the dense model's visual FLOPs. evaluations: most plans tried.
    """

    budget: float
    evaluations: int = 100

    def __post_init__(self, called: Called) -> None:
        super().__post_init__(called)
        if isinstance(self.budget, bool) or not 0 < self.budget <= 1:
            given = self.budget if isinstance(self.budget, bool) else f"{self.budget:g}"
            raise ValueError(
                f"{called('budget')} is {given}; allowed: above 0, to 1 (all visual FLOPs)"
            )

    @property
    def holds_out(self) -> bool:
        return True


def config_of(settings: dict[str, Any], called: Called = str) -> RuleConfig | SearchConfig:
    """The config with these settings: a search's where a budget is given, else a rule's.

    Raises ValueError for settings that do not go together, TypeError for one that there is not.
    """
    given = {name: x for name, x in settings.items() if name != "budget" or x is not None}
    cls = SearchConfig if "budget" in given else RuleConfig
    names = {one: {field.name for field in fields(one)} for one in (RuleConfig, SearchConfig)}
    for name in given:
        if name not in names[RuleConfig] | names[SearchConfig]:
            raise TypeError(f"calibrate takes no {name!r}")
        if name in names[cls]:
            continue
        if cls is SearchConfig:
            raise ValueError(
                f"{called(name)} and {called('budget')} are both given: a budget chooses the whole "
                "plan"
            )
        raise ValueError(
            f"{called(name)} is given without {called('budget')}: only a search takes it"
        )
    return cls(**given, called=called)
