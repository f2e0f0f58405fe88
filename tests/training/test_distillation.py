"""Distillation under a plan: the teacher is the model without it, to the bit, and the student's
gradients are those of two models; the Trainer takes its steps by it, and plans tighten on time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import a_plan
from random_families import KINDS, build, make
from torch.nn import functional as F

import yopo

KIND = KINDS["llava-llama"]
pytestmark = pytest.mark.skipif(not KIND.exists, reason="older than the families' support")
ROWS = [[("text", 3), ("image", 0), ("text", 4)], [("text", 6)]]


def inputs() -> dict[str, Any]:
    batch = make(KIND, ROWS, seed=0)
    given = batch.inputs(None, positions=False)
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    labels[:, :2] = -100
    return {**given, "labels": labels}


def test_without_its_plan_a_model_is_stock_to_the_bit_and_afterwards_pruned_again() -> None:
    given = inputs()
    dense = build(KIND)(**given).logits
    model = yopo.apply(build(KIND), a_plan())
    pruned = model(**given).logits
    with yopo.unpruned():
        assert torch.equal(model(**given).logits, dense)
        assert not torch.equal(pruned, dense)
    assert torch.equal(model(**given).logits, pruned)


def test_a_cache_of_a_pruned_pass_is_refused_without_the_plan() -> None:
    given = inputs()
    model = yopo.apply(build(KIND), a_plan())
    past = model(**given, use_cache=True).past_key_values
    with yopo.unpruned(), pytest.raises(ValueError, match="filled by a pruned pass"):
        model(input_ids=torch.ones(2, 1, dtype=torch.long), past_key_values=past)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.25)])
def test_loss_and_gradients_are_those_of_a_student_and_a_teacher_apart(
    temperature: float, weight: float
) -> None:
    given = inputs()
    model = yopo.apply(build(KIND), a_plan(head_mass="drop", cut_mass="drop"))
    loss, _ = yopo.distillation_loss(model, given, temperature=temperature, weight=weight)
    loss.backward()
    teacher = build(KIND)(**given).logits.detach()
    student = yopo.apply(build(KIND), a_plan(head_mass="drop", cut_mass="drop"))
    out = student(**given)
    seen = given["labels"][:, 1:] != -100
    q, p = (
        F.log_softmax(logits[:, :-1][seen] / temperature, -1) for logits in (out.logits, teacher)
    )
    kl = F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2
    entropy = F.cross_entropy(out.logits[:, :-1][seen], given["labels"][:, 1:][seen])
    expected = weight * kl + (1 - weight) * entropy
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-6) and loss > 0
    ours, theirs = (dict(each.named_parameters()) for each in (model, student))
    for name, weight_of in ours.items():
        assert (weight_of.grad is None) == (theirs[name].grad is None), name
        if weight_of.grad is not None:
            assert torch.allclose(weight_of.grad, theirs[name].grad, atol=1e-6), name


def test_an_adapter_is_taught_by_the_model_without_it() -> None:
    peft = pytest.importorskip("peft")
    given = inputs()
    model = yopo.apply(build(KIND), a_plan())
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*[qv]_proj")
    adapted = peft.get_peft_model(model, lora)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(0))
    loss, out = yopo.distillation_loss(adapted, given)
    seen = given["labels"][:, 1:] != -100
    p = build(KIND)(**given).logits.detach()[:, :-1][seen].log_softmax(-1)
    q = out.logits[:, :-1][seen].log_softmax(-1)
    assert torch.allclose(loss, F.kl_div(q, p, log_target=True, reduction="batchmean"), atol=1e-5)
    loss.backward()
    learning = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert any(adapted.get_parameter(name).grad.abs().max() > 0 for name in learning)


def test_a_model_whose_plan_prunes_nothing_has_nothing_to_learn() -> None:
    model = yopo.apply(build(KIND), yopo.PruningPlan(torch.ones(3, 4), window=None, layer_cut=3))
    loss, _ = yopo.distillation_loss(model, inputs())
    assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({"labels": None}, {}, "inputs have no labels"),
        ({}, {"temperature": 0.0}, "temperature is 0.0"),
        ({}, {"weight": 1.5}, "weight 1.5"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    model = yopo.apply(build(KIND), a_plan())
    with pytest.raises(ValueError, match=said):
        yopo.distillation_loss(model, {**inputs(), **changes}, **settings)


def trainer_of(
    folder: Path,
    steps: int,
    unlike: bool = False,
    sizes: tuple[int, int] = (2, 1),
    smoothing: float = 0.0,
    **more: Any,
) -> Any:
    from transformers import TrainingArguments

    pytest.importorskip("accelerate")
    model = yopo.apply(build(KIND), a_plan(head_mass="drop", cut_mass="drop"))
    model.config.use_cache = False
    whole = inputs()
    rows = [{name: value[:1].clone() for name, value in whole.items()} for _ in range(4)]
    for number, row in enumerate(rows if unlike else ()):
        row["labels"][:, : 2 + 3 * number] = -100

    def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=sizes[0],
        gradient_accumulation_steps=sizes[1],
        label_smoothing_factor=smoothing,
        learning_rate=1e-2,
        report_to=[],
        save_steps=2,
        logging_steps=1,
        use_cpu=True,
        remove_unused_columns=False,
        lr_scheduler_type="constant",
    )
    return yopo.DistillationTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=together, **more
    )


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_the_trainer_brings_answers_nearer_and_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", 6)
    with pytest.warns(UserWarning, match="once before .rows = yopo.teach"):
        whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    begun = trainer_of(tmp_path / "parts", 4)
    begun.train()
    resumed = trainer_of(tmp_path / "parts", 6)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], rel=1e-4)
    loaded = type(build(KIND)).from_pretrained(tmp_path / "parts" / "checkpoint-6")
    assert yopo.PruningPlan.from_config(loaded.config) == yopo.plan_of(resumed.model)


def test_batches_of_a_step_count_as_one_large_batch(tmp_path: Path) -> None:
    """Loss and gradients, with answers of unlike lengths."""
    found = []
    for name, size, batches in (("one", 4, 1), ("four", 1, 4)):
        trainer = trainer_of(
            tmp_path / name, 1, weight=0.5, unlike=True, sizes=(size, batches), callbacks=[]
        )
        trainer.train()
        found.append((losses(trainer)[0], trainer.model.lm_head.weight.detach().clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


def test_another_loss_is_refused_by_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor or compute_loss_func"):
        trainer_of(tmp_path, 1, smoothing=0.1)


def test_gpus_that_one_process_shares_a_batch_among_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(ValueError, match="one process has 2 GPUs"):
        trainer_of(tmp_path, 1)


def test_a_teacher_drops_nothing_and_modes_are_back() -> None:
    model = yopo.apply(build(KIND), a_plan()).train()
    model.lm_head.eval()
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    yopo.distillation_loss(model, inputs())
    assert modes == [False, True]
    assert model.training and not model.lm_head.training


def test_plans_tighten_at_their_steps(tmp_path: Path) -> None:
    loose, tight = a_plan(ffn_ratio=1), a_plan(head_mass="drop", cut_mass="drop")
    callback = yopo.TightenPlan({0: loose, 2: tight})
    trainer = trainer_of(tmp_path, 3, callbacks=[callback])
    seen: list[Any] = []
    compute = trainer.compute_loss

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(yopo.plan_of(model))
        return compute(model, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert seen == [loose, loose, tight]
    with pytest.raises(ValueError, match="there must be one at step 0"):
        yopo.TightenPlan({1: tight})
