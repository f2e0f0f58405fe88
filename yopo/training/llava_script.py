"""LLaVA's own llava/train/train.py on a transformers that is newer than it knows: its trainer is
made over a Trainer with the arguments and names of its time. Unchanged are transformers, and
LLaVA's files; which programs want it is run_program.py's business.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer
from transformers import trainer as trainer_module
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from yopo.versions import llava_trainer_fits

TRAINER = "llava.train.llava_trainer"
MODELS = "llava.model"


def is_llava_training(target: str) -> bool:
    """Whether a program is LLaVA's: its module's name, or its script's file."""
    return target.startswith("llava.train.") or Path(target).resolve().parts[-3:-1] == (
        "llava",
        "train",
    )


def accommodate() -> None:
    """Has llava.train.llava_trainer work with this transformers. Does nothing where it does so by
    itself, or where it was imported before."""
    if TRAINER in sys.modules or llava_trainer_fits():
        return
    transformers.Trainer = TrainerOfThatTime
    added = not hasattr(trainer_module, "ALL_LAYERNORM_LAYERS")
    if added:
        trainer_module.ALL_LAYERNORM_LAYERS = [nn.LayerNorm, LlamaRMSNorm]
    try:
        module, models = import_module(TRAINER), import_module(MODELS)
    except ModuleNotFoundError as error:
        if not any(f"{name}.".startswith(f"{error.name}.") for name in (TRAINER, MODELS)):
            raise
        return  # somebody's own package of that name
    finally:
        transformers.Trainer = Trainer
        if added:
            del trainer_module.ALL_LAYERNORM_LAYERS
    _take_a_dataset(module.LLaVATrainer)
    for model in vars(models).values():
        if isinstance(model, type) and issubclass(model, transformers.PreTrainedModel):
            _load_in_float32(model)


class TrainerOfThatTime(Trainer):
    """transformers' Trainer with the arguments that LLaVATrainer passes."""

    def __init__(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs["processing_class"] = tokenizer
        super().__init__(*args, **kwargs)
        self.deepspeed = self.is_deepspeed_enabled or None  # by which it saves sharded weights

    def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None:
        super()._save_checkpoint(model, trial)


def _take_a_dataset(cls: Any) -> None:
    """The Trainer passes the dataset; LLaVA's method takes self.train_dataset, the same."""
    theirs = cls._get_train_sampler

    @functools.wraps(theirs)
    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return theirs(self)

    cls._get_train_sampler = _get_train_sampler


def _load_in_float32(cls: Any) -> None:
    """torch_dtype=None, which train.py passes without --bf16, was float32 up to 4.57; later it is
    whatever the checkpoint is stored in, which the projector is not."""
    theirs = cls.from_pretrained.__func__

    @functools.wraps(theirs)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if "torch_dtype" in kwargs and kwargs["torch_dtype"] is None:
            kwargs["torch_dtype"] = torch.float32
        return theirs(cls, *args, **kwargs)

    cls.from_pretrained = classmethod(from_pretrained)
