"""transformers' Trainer under a plan: `DistillationTrainer`, whose loss is distillation.py's, and
`TightenPlan`, which puts tighter plans on as training goes on. All else is the Trainer's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import Trainer, TrainerCallback

from yopo.models.attach import apply
from yopo.models.exchange import original_of
from yopo.plan.pruning_plan import PruningPlan
from yopo.training.distillation import distillation_loss


class DistillationTrainer(Trainer):
    """A Trainer of a model with a plan that is taught by itself without it.

    temperature, weight: as of `distillation_loss`. Evaluation reports the same loss. Raises
    ValueError for another loss (label smoothing, compute_loss_func)."""

    def __init__(
        self, *args: Any, temperature: float = 1.0, weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None or getattr(self, "compute_loss_func", None) is not None:
            raise ValueError(
                "label_smoothing_factor or compute_loss_func is given, but the loss is "
                "distillation's: leave it out, or take transformers' own Trainer"
            )
        self.temperature, self.weight = temperature, weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        # Of a model without them the Trainer itself divides by the batches of a step.
        counts = getattr(self, "model_accepts_loss_kwargs", False)
        num_items = kwargs.get("num_items_in_batch") if counts else None
        loss, outputs = distillation_loss(
            model,
            inputs,
            temperature=self.temperature,
            weight=self.weight,
            num_items=num_items,
        )
        if num_items is not None and getattr(self.args, "average_tokens_across_devices", False):
            loss = loss * self._that_count_together()
        return (loss, outputs) if return_outputs else loss

    def _that_count_together(self) -> int:
        """How many processes' items are in num_items_in_batch: gradients are averaged over them."""
        if self.args.n_gpu > 1:
            return int(self.args.n_gpu)
        shared = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
        return int(self.accelerator.num_processes // shared)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The Trainer's; and weights that it would pass over: transformers 5 saves those of LLaVA
        and its like under the names that older versions had, which the Trainer does not know."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        files = sorted(Path(resume_from_checkpoint).glob("model*.safetensors"))
        saved = {name for file in files for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118
        if saved and not saved <= model.state_dict().keys():
            cls = original_of(type(model))
            loaded = cls.from_pretrained(resume_from_checkpoint, torch_dtype=model.dtype)
            model.load_state_dict(loaded.state_dict())


class TightenPlan(TrainerCallback):
    """Puts a plan on at the beginning of the steps that `plans` names, 0 being the first: from one
    that prunes little to the one that the model will run under. Training that is resumed begins
    with the plan of the step it has come to."""

    def __init__(self, plans: Mapping[int, PruningPlan]) -> None:
        if any(not isinstance(plan, PruningPlan) for plan in plans.values()):
            raise TypeError("plans has values that are no PruningPlan; load them first")
        if not plans or min(plans) != 0:
            raise ValueError(f"plans begin at steps {sorted(plans)}; there must be one at step 0")
        self._plans = dict(sorted(plans.items()))
        self._begun: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = None
        self._put(kwargs["model"], state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._put(kwargs["model"], state.global_step)

    def _put(self, model: Any, step: int) -> None:
        begun = max(start for start in self._plans if start <= step)
        if begun != self._begun:
            apply(model, self._plans[begun])
            self._begun = begun
