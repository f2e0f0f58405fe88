"""A training script as users have them, run by torchrun or alone: transformers' Trainer on the
checkpoint in a folder. Writes the losses of its steps, and saves what it has trained.

    trainer_script.py CHECKPOINT OUTPUT STAGE

STAGE: of DeepSpeed's ZeRO, 0 for none. Two samples a step, however many processes there are."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from random_families import KINDS, make
from sharded import PICTURE, Setting
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import yopo.patch  # noqa: F401

ROWS = [PICTURE, [("image", 0), ("text", 9)], [("text", 2), *PICTURE], [*PICTURE, ("text", 5)]]


def sample(number: int) -> dict[str, Any]:
    given = make(KINDS["llava-llama"], [ROWS[number]], seed=number).inputs(None, positions=False)
    return given | {"labels": given["input_ids"]}


def main(checkpoint: str, output: str, stage: str) -> None:
    torch.set_num_threads(1)
    count = int(os.environ.get("WORLD_SIZE", 1))
    zero = {"stage": int(stage), "stage3_gather_16bit_weights_on_model_save": True}
    config = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 0.0,  # without a value accelerate clips at 1
    }
    args = TrainingArguments(
        output,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2 // count,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        deepspeed=config if int(stage) else None,
    )
    # After the arguments: these say that weights are partitioned as they are loaded.
    model = Setting().frozen(AutoModelForImageTextToText.from_pretrained(checkpoint))
    trainer = Trainer(
        model,
        args,
        data_collator=lambda samples: samples[0],
        train_dataset=[sample(number) for number in range(len(ROWS))],
    )
    trainer.train()
    trainer.save_model(output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        with open(os.path.join(output, "losses.json"), "w", encoding="utf-8") as file:
            json.dump(losses, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
