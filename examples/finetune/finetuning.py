"""One run of a recipe: load, put the plan on, measure, train, measure again. Which Trainer is
sft.py's or sft_trl.py's choice."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for yopo where it is not installed

import torch
from measures import LossPicture, Results, last_checkpoint, right_answers
from recipe import Recipe, read, rows_of
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, set_seed

import yopo
from yopo.errors import BadInput
from yopo.prompts.loading import kind_of


def main(argv: Sequence[str], arguments: type, trainer_of: Callable[..., Any]) -> int:
    """Runs CONFIG.yaml [--name value …]; says in a line what is wrong with what was given."""
    try:
        finetune(*read(argv, arguments), trainer_of)
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from its last checkpoint", file=sys.stderr)
        return 130
    return 0


def finetune(
    recipe: Recipe, args: Any, given: dict[str, Any], trainer_of: Callable[..., Any]
) -> dict[str, Any]:
    """Trains, saves into args.output_dir, and returns what results.json has. The same call goes on
    where an earlier one was stopped.

    trainer_of: (recipe, Trainer's keyword arguments) → the Trainer.
    """
    rows = rows_of(recipe.train_file, recipe, recipe.max_train_samples)
    held_out = rows_of(recipe.eval_file, recipe, recipe.max_eval_samples)
    folder, main = Path(args.output_dir), args.process_index == 0
    with args.main_process_first():
        last = last_checkpoint(folder, given, [recipe.train_file, recipe.eval_file])
    set_seed(args.seed)
    model, processor = load(recipe, args.device)
    plan = yopo.plan_of(model)
    collate = yopo.AnswerCollator(processor)
    results = Results(folder, main)

    def measured(name: str) -> float:
        return right_answers(model, held_out, collate, args.per_device_eval_batch_size, name)

    results.put("plan", plan.summary)
    results.put("questions", lambda: len(held_out))
    with yopo.unpruned():
        results.put("dense", lambda: measured("dense"))
    results.put("pruned", lambda: measured("pruned"))
    # Adapters and sinks are switched off for the teacher's pass; weights that learn cannot be.
    moving = not (recipe.use_peft or recipe.train_sinks)
    began = time.perf_counter()
    if recipe.objective == "distill" and recipe.fixed_teacher and moving:
        all_words = model.get_input_embeddings().num_embeddings  # a temperature needs them all
        most = 64 if recipe.temperature == 1 else all_words
        batch = args.train_batch_size
        rows = yopo.teach(model, rows, collate, batch=batch, most=most, progress=main)
    callbacks: list[Any] = [LossPicture()]
    if recipe.tighten_stages > 1:
        steps = args.max_steps if args.max_steps > 0 else steps_of(args, len(rows))
        plans = yopo.tightening(plan, model.config, steps, recipe.tighten_stages)
        callbacks.append(yopo.TightenPlan(plans))
    model = with_adapter(model, recipe) if recipe.use_peft else model
    with yopo.trainable_sinks(model) if recipe.train_sinks else nullcontext():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trainer = trainer_of(
            recipe,
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=rows,
            callbacks=callbacks,
            processing_class=processor,
        )
        trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    history = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    results.put("seconds", lambda: round(time.perf_counter() - began, 1))
    results.put("steps", lambda: trainer.state.global_step)
    results.put("trained parameters", lambda: trained)
    results.put("losses", lambda: history)
    results.put("fine-tuned", lambda: measured("fine-tuned"))
    with yopo.unpruned():
        results.put("fine-tuned, plan off", lambda: measured("fine-tuned, plan off"))
    if main:
        print(results.table())
        print(f"written: {folder}")
    return results.values


def load(recipe: Recipe, device: torch.device) -> tuple[Any, Any]:
    """The model under its plan, with what is not to learn frozen, and its processor."""
    path = recipe.model_name_or_path
    more: dict[str, Any] = {}
    if recipe.load_in_4bit:
        from transformers import BitsAndBytesConfig

        dtype = getattr(torch, recipe.dtype)
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        more["device_map"] = {"": device}
    if kind_of(path) == "llava":
        raise BadInput(
            f"{path} is in the original LLaVA's own format: make one of transformers' of it, "
            f"python -m yopo convert {path} DST"
        )
    try:
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=recipe.dtype, **more)
        processor = AutoProcessor.from_pretrained(path)
        own = yopo.PruningPlan.from_config(config)
        plan = yopo.PruningPlan.load(recipe.plan) if recipe.plan else own
        if plan is None:
            raise ValueError("the model has no plan of its own: give one (plan: FILE)")
        yopo.unfuse(yopo.apply(model, plan))
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise BadInput(f"{path} under {recipe.plan or 'its plan'}: {error}") from error
    if not recipe.train_vision:
        for name, weight in model.named_parameters():
            if "vision" in name or "visual." in name:
                weight.requires_grad_(False)
    model.config.use_cache = False
    return (model if recipe.load_in_4bit else model.to(device)), processor


def with_adapter(model: Any, recipe: Recipe) -> Any:
    """The model with new LoRA adapters, which alone learn."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if recipe.load_in_4bit:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def steps_of(args: Any, rows: int) -> int:
    """How many optimiser steps the epochs of `args` are."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return int(args.num_train_epochs * -(-rows // batch))
