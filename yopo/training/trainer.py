"""Mixins for transformers' Trainer and others that derive from it, as TRL's do: `Resumable`, which
goes on from a checkpoint to the same numbers, and `Distilling`, whose loss is distillation.py's.
`DistillationTrainer` is the Trainer with both. All else is the Trainer's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer

from yopo.models.exchange import original_of
from yopo.models.peft_adapters import PLAN_FILE
from yopo.models.trained_sinks import is_training_sinks, set_sinks
from yopo.plan.pruning_plan import PruningPlan
from yopo.training.distillation import TAUGHT, distillation_loss


class Resumable:
    """Before a Trainer's class: `class MyTrainer(yopo.Resumable, SFTTrainer)`. Takes from a
    checkpoint that it resumes from, or that is its best, what the Trainer passes over: weights that
    transformers 5 saves under the names that older versions had (LLaVA and its like), and sinks
    that are being trained (`yopo.trainable_sinks`)."""

    model: Any
    state: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        _load_rest(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        _load_rest(self.model, Path(self.state.best_model_checkpoint))


def _load_rest(model: Any, folder: Path) -> None:
    files = sorted(folder.glob("model*.safetensors"))
    saved = {name for file in files for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118
    if saved and not saved <= model.state_dict().keys():
        cls = original_of(type(model))
        loaded = cls.from_pretrained(folder, torch_dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
    if is_training_sinks(model):
        with_adapter = folder / PLAN_FILE
        sinks = PruningPlan.load(with_adapter if with_adapter.exists() else folder).sinks
        if sinks is None:
            raise ValueError(
                f"sinks are being trained, but the plan in {folder} has none: that checkpoint is "
                "of another run; take another output_dir, or train without yopo.trainable_sinks"
            )
        set_sinks(model, sinks)


class Distilling(Resumable):
    """Before a Trainer's class: it trains a model with a plan, taught by itself without it.

    temperature, weight: as of `distillation_loss`. Evaluation reports the same loss. Warns where
    the teacher's own weights learn. Raises ValueError for another loss (label smoothing,
    compute_loss_func)."""

    args: Any
    accelerator: Any
    _asked: bool = False  # whether the teacher stays what it is

    def __init__(
        self, *args: Any, temperature: float = 1.0, weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        smoothing = getattr(self, "label_smoother", None)
        if smoothing is not None or getattr(self, "compute_loss_func", None) is not None:
            raise ValueError(
                "label_smoothing_factor or compute_loss_func is given, but the loss is "
                "distillation's: leave it out, or take transformers' own Trainer"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process has {self.args.n_gpu} GPUs, among which torch's DataParallel shares "
                "a batch in threads that a plan cannot be switched off for: start one process for "
                "each (torchrun, accelerate launch)"
            )
        self.temperature, self.weight = temperature, weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        if not self._asked and torch.is_grad_enabled():
            self._asked = True
            _warn_of_moving(self.model, inputs)
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
        shared = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
        return int(self.accelerator.num_processes // shared)


def _warn_of_moving(model: nn.Module, inputs: Any) -> None:
    adapted = any(hasattr(part, "disable_adapter") for part in model.modules())
    if TAUGHT[0] in inputs or adapted or is_training_sinks(model):
        return
    warnings.warn(
        "the weights that learn are the teacher's, too, which may get worse with its pupil: ask it "
        "once before (rows = yopo.teach(model, rows, collator), yopo.AnswerCollator)",
        stacklevel=4,
    )


class DistillationTrainer(Distilling, Trainer):
    """transformers' Trainer of a model with a plan that is taught by itself without it; where all
    its weights learn, give it rows of `yopo.teach`, or the teacher moves with its pupil.

    temperature, weight: as of `distillation_loss`. Evaluation reports the same loss. Stopped and
    resumed, losses go on as they would have. Raises ValueError for another loss (label smoothing,
    compute_loss_func)."""
