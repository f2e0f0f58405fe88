"""Trainers that go on from a checkpoint: weights that transformers saves under older names, and
sinks that learn, are back, and the steps after are those of a run that was never stopped."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_checks import a_plan, some_sinks
from packaging.version import Version
from random_families import KINDS, build, make
from transformers import Trainer, TrainingArguments

import yopo

pytest.importorskip("accelerate")
KIND = KINDS["llava-llama"]
pytestmark = pytest.mark.skipif(not KIND.exists, reason="older than the families' support")
ROWS = [[("text", 3), ("image", 0), ("text", 4)], [("image", 0), ("text", 6)]]


class Resumed(yopo.Resumable, Trainer):
    """transformers' own, that can be stopped."""


def run(folder: Path, steps: int, sinks: bool, cls: type = Resumed, **more: Any) -> Any:
    plan = a_plan(head_mass="sink", cut_mass="sink", sinks=some_sinks(KIND))
    model = yopo.apply(build(KIND), plan)
    model.config.use_cache = False
    batch = make(KIND, ROWS, seed=0)
    whole = {**batch.inputs(None, positions=False), "labels": batch.ids}
    rows = [{name: value[n % 2, None] for name, value in whole.items()} for n in range(4)]

    def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    values = dict(save_steps=2, logging_steps=1, use_cpu=True, report_to=[], learning_rate=1e-2)
    values |= dict(remove_unused_columns=False, lr_scheduler_type="constant", max_steps=steps)
    resume = more.pop("resume", None)
    args = TrainingArguments(output_dir=str(folder), **(values | more))
    with yopo.trainable_sinks(model) if sinks else nullcontext():
        given = dict(train_dataset=rows, eval_dataset=rows, data_collator=together)
        trainer = cls(model=model, args=args, **given)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.46"),
    reason="its Trainer cannot load the random states that it saved, with a newer torch",
)
@pytest.mark.parametrize("sinks", [False, True], ids=["weights", "sinks"])
def test_stopped_and_resumed_steps_are_those_of_a_whole_run(tmp_path: Path, sinks: bool) -> None:
    whole = run(tmp_path / "whole", 4, sinks)
    run(tmp_path / "parts", 2, sinks)
    resumed = run(tmp_path / "parts", 4, sinks, resume=True)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    ends = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6) for name in ends[0])
    found = [yopo.plan_of(trainer.model).sinks.a for trainer in (whole, resumed)]
    assert torch.allclose(*found, atol=1e-6)
    assert torch.equal(found[0], some_sinks(KIND).a) != sinks


def test_the_best_weights_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    # A rate at which the later steps are the worse ones.
    trainer = run(tmp_path, 4, False, **best, learning_rate=1.0)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = type(build(KIND)).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    now = trainer.model.state_dict()
    assert all(torch.equal(now[name], saved[name]) for name in saved)


def test_sinks_are_not_taken_from_a_plan_that_has_none(tmp_path: Path) -> None:
    trainer = run(tmp_path, 2, False)
    yopo.apply(trainer.model, a_plan())
    trainer.save_model(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="has none: that checkpoint is of another run"):
        run(tmp_path, 4, True, resume=True)
