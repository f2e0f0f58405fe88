"""Sinks as parameters: the gradient is that of the logit they predict, nothing else learns, every
checkpoint has them as they are, and the model is otherwise what it was."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import a_plan, some_sinks
from process_pair import Processes
from random_families import KINDS, build, make
from torch import Tensor

import yopo
from yopo.models.peft_adapters import PLAN_FILE
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

KIND = KINDS["llava-llama"]
pytestmark = pytest.mark.skipif(not KIND.exists, reason="older than the families' support")
ROWS = [[("text", 3), ("image", 0), ("text", 4)], [("image", 0), ("text", 6)]]


def plan(**changes: Any) -> PruningPlan:
    values = dict(head_mass="sink", cut_mass="sink", sinks=some_sinks(KIND))
    return a_plan(**(values | changes))


def inputs() -> dict[str, Any]:
    batch = make(KIND, ROWS, seed=0)
    return {**batch.inputs(None, positions=False), "labels": batch.ids}


def pruned(**changes: Any) -> Any:
    return yopo.apply(build(KIND), plan(**changes))


def loss_under(sinks: Sinks) -> float:
    return float(pruned(sinks=sinks)(**inputs()).loss.double())


def test_gradients_are_those_of_the_loss_and_reach_sinks_alone() -> None:
    model, known = pruned(), some_sinks(KIND)
    with yopo.trainable_sinks(model) as (a, b):
        assert [p for p in model.parameters() if p.requires_grad] == [a, b]
        model(**inputs()).loss.backward()
        grads = a.grad.clone(), b.grad.clone()
        assert all(p.grad is None for p in model.parameters() if p is not a and p is not b)
    step = 1e-2
    for at in ((2, 1), (0, 1)):  # past the cut, and a pruned head
        moved = [known.a.clone() for _ in range(2)]
        for sign, values in zip((1, -1), moved, strict=True):
            values[at] += sign * step
        up, down = (loss_under(Sinks(values, known.b)) for values in moved)
        assert float(grads[0][at]) == pytest.approx((up - down) / (2 * step), rel=0.05, abs=1e-5)
    seen = a_plan().head_keep[:2]
    assert (grads[0][:2][seen] == 0).all() and (grads[0] != 0).any() and (grads[1] != 0).any()


def test_gradients_are_the_same_with_checkpointed_layers() -> None:
    found: list[Tensor] = []
    for checkpointed in (False, True):
        model = pruned().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with yopo.trainable_sinks(model) as (a, _):
            model(**inputs(), use_cache=False).loss.backward()
            found.append(a.grad.clone())
    assert torch.allclose(*found, atol=1e-6) and found[0].abs().max() > 0


def test_every_checkpoint_has_the_sinks_as_they_are_then(tmp_path: Path) -> None:
    model = pruned()
    names, own = set(model.state_dict()), yopo.plan_of(model)
    with yopo.trainable_sinks(model) as (a, b):
        assert set(model.state_dict()) == names
        for number in (1, 2):
            with torch.no_grad():
                a += 1
                b += 0.1
            model.save_pretrained(tmp_path / str(number))
            expected = replace(own, sinks=Sinks(own.sinks.a + number, b.detach().clone()))
            assert PruningPlan.load(tmp_path / str(number)) == expected
            saved = model(**inputs()).logits.detach()
        assert model.load_state_dict(model.state_dict()).missing_keys == []
    assert yopo.plan_of(model) == expected and set(dict(model.named_parameters())) <= names
    assert all(weight.requires_grad for weight in model.parameters())
    again = type(build(KIND)).from_pretrained(tmp_path / "2").eval()
    yopo.apply(again, PruningPlan.from_config(again.config))
    assert torch.allclose(again(**inputs()).logits, saved, atol=1e-5)


def test_after_an_error_the_model_is_as_it_was() -> None:
    model = pruned()
    model.get_output_embeddings().weight.requires_grad_(False)
    before = model(**inputs()).logits
    with pytest.raises(KeyError), yopo.trainable_sinks(model) as (a, _):
        a.data += 1
        raise KeyError("stop")
    assert torch.equal(model(**inputs()).logits, before) and yopo.plan_of(model) == plan()
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert len(frozen) == 1 and frozen[0].endswith("lm_head.weight")


def test_a_plan_put_on_meanwhile_goes_by_the_sinks_that_learn() -> None:
    model = pruned()
    with yopo.trainable_sinks(model) as (a, _):
        a.data += 1
        yopo.apply(model, plan(layer_cut=1))
        model(**inputs()).loss.backward()
        assert a.grad is not None
    found = yopo.plan_of(model)
    assert found.layer_cut == 1 and torch.equal(found.sinks.a, some_sinks(KIND).a + 1)


def test_without_the_patch_and_with_an_adapter_around_it_they_are_saved(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = pruned()
    with yopo.trainable_sinks(model) as (a, _):
        lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
        adapted = peft.get_peft_model(model, lora)
        a.data += 2
        adapted.save_pretrained(tmp_path)
    saved = PruningPlan.load(tmp_path / PLAN_FILE)
    assert torch.equal(saved.sinks.a, some_sinks(KIND).a + 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_mass": "drop", "cut_mass": "exact"}, "a plan of mass drop/exact"),
        ({"head_mass": "drop", "cut_mass": "drop", "sinks": None}, "there are no sinks to train"),
    ],
)
def test_a_plan_without_sinks_in_use_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said), yopo.trainable_sinks(pruned(**changes)):
        pass
    model = build(KIND)
    with pytest.raises(ValueError, match="the model has no plan"), yopo.trainable_sinks(model):
        pass


def test_a_plan_taken_off_meanwhile_stays_off() -> None:
    model = pruned()
    with yopo.trainable_sinks(model):
        with (
            pytest.raises(ValueError, match="are being trained already"),
            yopo.trainable_sinks(model),
        ):
            pass
        yopo.remove(model)
    assert type(model) is type(build(KIND)) and yopo.plan_of(model) is None
    assert torch.equal(model(**inputs()).logits, build(KIND)(**inputs()).logits)
    assert set(model.state_dict()) == set(build(KIND).state_dict())


def step_in_ddp(rank: int, ranks: int) -> list[Tensor]:
    """Sinks' gradients of the batch's rows, of which this process has its own."""
    model, given = pruned(), inputs()
    with yopo.trainable_sinks(model) as made:
        runs = model
        if ranks > 1:
            runs = torch.nn.parallel.DistributedDataParallel(model)
            given = {name: value[rank : rank + 1] for name, value in given.items()}
        runs(**given).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in made]


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_sinks(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    try:
        found = processes.run(step_in_ddp, 2)
    finally:
        processes.stop()
    rows = [{name: value[n : n + 1] for name, value in inputs().items()} for n in range(2)]
    alone = []
    for row in rows:
        model = pruned()
        with yopo.trainable_sinks(model) as made:
            model(**row).logits.square().mean().backward()
            alone.append([parameter.grad.clone() for parameter in made])
    for number in range(2):
        mean = (alone[0][number] + alone[1][number]) / 2
        assert all(torch.allclose(one[number], mean, atol=1e-5) for one in found)


def test_a_block_that_fails_leaves_the_sinks_of_before_also_after_a_save(tmp_path: Path) -> None:
    model = pruned()
    with pytest.raises(RuntimeError, match="stopped"), yopo.trainable_sinks(model) as (a, _):
        with torch.no_grad():
            a.add_(1)
        model.save_pretrained(tmp_path)
        raise RuntimeError("stopped")
    assert torch.equal(yopo.plan_of(model).sinks.a, some_sinks(KIND).a)
    assert PruningPlan.from_config(model.config).sinks == yopo.plan_of(model).sinks


def test_a_model_is_copied_between_its_steps_and_another_plan_may_be_put_on() -> None:
    model, without = pruned(), a_plan(head_mass="drop", cut_mass="drop")
    with yopo.trainable_sinks(model) as (a, _):
        model(**inputs()).loss.backward()
        copied = deepcopy(model)
        with torch.no_grad():
            a.add_(1)
            assert not torch.equal(copied(**inputs()).logits, model(**inputs()).logits)
        with yopo.applied(model, without):
            model(**inputs())
    assert torch.equal(yopo.plan_of(model).sinks.a, a.detach())
