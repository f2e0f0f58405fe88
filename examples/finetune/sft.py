"""Fine-tunes a vision-language model under a plan with transformers' Trainer:

    python examples/finetune/sft.py examples/finetune/distill.yaml [--name value …]

Names are those of recipe.py and of transformers' TrainingArguments.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from finetuning import main
from transformers import Trainer, TrainingArguments

import yopo


class PlainTrainer(yopo.Resumable, Trainer):
    """transformers' own, whose loss is cross entropy with the labels."""


def trainer_of(recipe: Any, **given: Any) -> Trainer:
    if recipe.objective == "plain":
        return PlainTrainer(**given)
    taught = {"temperature": recipe.temperature, "weight": recipe.distill_weight}
    return yopo.DistillationTrainer(**given, **taught)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], TrainingArguments, trainer_of))
