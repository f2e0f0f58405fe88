"""The same as sft.py with TRL's SFTTrainer and its SFTConfig:

python examples/finetune/sft_trl.py examples/finetune/trl.yaml [--name value …]
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from datasets import Dataset
from finetuning import main
from trl import SFTConfig, SFTTrainer

import yopo


class PlainSFTTrainer(yopo.Resumable, SFTTrainer):
    """TRL's own, whose loss is cross entropy with the labels."""


class DistillingSFTTrainer(yopo.Distilling, SFTTrainer):
    """TRL's, of a model that is taught by itself without its plan."""


def trainer_of(recipe: Any, train_dataset: list[Any], **given: Any) -> SFTTrainer:
    given["train_dataset"] = Dataset.from_list(train_dataset)
    if recipe.objective == "plain":
        return PlainSFTTrainer(**given)
    taught = {"temperature": recipe.temperature, "weight": recipe.distill_weight}
    return DistillingSFTTrainer(**given, **taught)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], SFTConfig, trainer_of))
