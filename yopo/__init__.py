"""Prune the visual computation of a multimodal LLM once per model, and really skip it.

YOPO, "You Only Prune Once", arXiv 2410.06169. `import yopo.patch` before LLaVA, or
`yopo.apply(model, plan)` on a model in hand. Only the public names live here; they load on first
use, so that `import yopo` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yopo.calibration.calibrate import Calibration, calibrate
    from yopo.calibration.config import RuleConfig, SearchConfig
    from yopo.calibration.sink_fit import SinkFit, fit_sinks
    from yopo.models.attach import applied, apply, remove
    from yopo.models.fusing import fuse, unfuse
    from yopo.models.graphs import graphed
    from yopo.models.parts import plan_of
    from yopo.models.trained_sinks import trainable_sinks
    from yopo.models.unpruned import unpruned
    from yopo.plan import recipes
    from yopo.plan.pruning_plan import PruningPlan
    from yopo.training.collator import AnswerCollator
    from yopo.training.distillation import distillation_loss
    from yopo.training.schedule import TightenPlan, tightening
    from yopo.training.teacher import teach
    from yopo.training.trainer import DistillationTrainer, Distilling, Resumable

__version__ = "0.1.0"
__all__ = [
    "AnswerCollator",
    "Calibration",
    "DistillationTrainer",
    "Distilling",
    "PruningPlan",
    "Resumable",
    "RuleConfig",
    "SearchConfig",
    "SinkFit",
    "TightenPlan",
    "__version__",
    "applied",
    "apply",
    "calibrate",
    "distillation_loss",
    "fit_sinks",
    "fuse",
    "graphed",
    "plan_of",
    "recipes",
    "remove",
    "teach",
    "tightening",
    "trainable_sinks",
    "unfuse",
    "unpruned",
]

_HOME = {
    "AnswerCollator": ".training.collator",
    "Calibration": ".calibration.calibrate",
    "DistillationTrainer": ".training.trainer",
    "Distilling": ".training.trainer",
    "PruningPlan": ".plan.pruning_plan",
    "Resumable": ".training.trainer",
    "RuleConfig": ".calibration.config",
    "SearchConfig": ".calibration.config",
    "SinkFit": ".calibration.sink_fit",
    "TightenPlan": ".training.schedule",
    "applied": ".models.attach",
    "apply": ".models.attach",
    "calibrate": ".calibration.calibrate",
    "distillation_loss": ".training.distillation",
    "fit_sinks": ".calibration.sink_fit",
    "fuse": ".models.fusing",
    "graphed": ".models.graphs",
    "plan_of": ".models.parts",
    "remove": ".models.attach",
    "teach": ".training.teacher",
    "tightening": ".training.schedule",
    "trainable_sinks": ".models.trained_sinks",
    "unfuse": ".models.fusing",
    "unpruned": ".models.unpruned",
}
_MODULES = {"families": "yopo.models.families", "recipes": "yopo.plan.recipes"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
