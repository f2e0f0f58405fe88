"""apply and remove on live models: what they accept, refuse, and put back."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import pytest
import torch
import transformers
from layouts import SHAPE, a_plan, build, left_padded
from torch import nn

import yopo
from yopo.plan.pruning_plan import PruningPlan


class Wrapper(nn.Module):
    """As PEFT's and DDP's: the model is somewhere inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**left_padded().kwargs()).logits


def test_remove_puts_back_the_plan_that_the_model_was_loaded_with() -> None:
    first, second = a_plan(), a_plan("drop", "drop")
    model = build(SHAPE, first)
    before, config = logits(model), model.config.to_dict()
    yopo.apply(model, second)
    assert yopo.plan_of(model) == second and not torch.equal(logits(model), before)
    yopo.remove(model)
    assert yopo.plan_of(model) == first
    assert torch.equal(logits(model), before) and model.config.to_dict() == config
    yopo.remove(model)
    assert yopo.plan_of(model) is None and PruningPlan.from_config(model.config) is None


def test_apply_reaches_a_model_inside_a_wrapper() -> None:
    model = build(SHAPE, None)
    wrapper = Wrapper(model)
    assert yopo.apply(wrapper, a_plan()) is wrapper
    assert yopo.plan_of(wrapper) == a_plan() == yopo.plan_of(model)
    yopo.remove(wrapper)
    assert yopo.plan_of(wrapper) is None


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "a path", None])
def test_what_is_no_llama_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=f"cannot prune a {type(model).__name__}"):
        yopo.apply(model, a_plan())


def test_a_llama_inside_another_familys_model_is_not_taken_for_it() -> None:
    class Composite(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.language_model = transformers.LlamaForCausalLM(config)

    with pytest.raises(TypeError, match="cannot prune a Composite"):
        yopo.apply(Composite(SHAPE.config()), a_plan())


def test_no_plan_is_refused() -> None:
    with pytest.raises(TypeError, match="plan is a NoneType"):
        yopo.apply(build(SHAPE, None), None)
    with pytest.raises(ValueError, match="head_keep has shape"):
        yopo.apply(build(SHAPE, None), PruningPlan(torch.ones(1, 4)))


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    model = build(SHAPE, None)
    model.forward = types.MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), model)
    with pytest.raises(ValueError, match="apply the plan first"):
        yopo.apply(model, a_plan())


def test_copies_of_a_pruned_model_are_pruned_on_their_own() -> None:
    model = build(SHAPE, a_plan())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    yopo.remove(model)
    told = left_padded().kwargs()
    with torch.no_grad():
        dense = model(**{k: v for k, v in told.items() if not k.startswith("visual")}).logits
    assert yopo.plan_of(twin) == a_plan() and not torch.equal(logits(twin), dense)


def test_two_models_with_one_config_object_each_keep_their_plan() -> None:
    config, first, second = SHAPE.config(), a_plan(), a_plan("drop", "drop")
    one, two = (transformers.LlamaForCausalLM(config) for _ in range(2))
    yopo.apply(one, first)
    yopo.apply(two, second)
    found = [PruningPlan.from_config(model.config) for model in (one, two)]
    assert found == [first, second]
    assert all(m.config is two.config for m in two.modules() if hasattr(m, "config"))
    yopo.remove(two)
    assert PruningPlan.from_config(two.config) is None
    assert PruningPlan.from_config(one.config) == first and yopo.plan_of(one) == first
    yopo.remove(one)
    assert PruningPlan.from_config(one.config) is None


def test_a_plan_taken_off_stays_in_the_config_of_a_model_built_from_the_same() -> None:
    from yopo import patch  # not above: importing it enables it

    with patch.patched():
        config = SHAPE.config()
        a_plan().save_to(config)
        one, two = (transformers.LlamaForCausalLM(config) for _ in range(2))
    yopo.remove(one)
    assert PruningPlan.from_config(one.config) is None and yopo.plan_of(one) is None
    assert PruningPlan.from_config(two.config) == a_plan() == yopo.plan_of(two)


class Counted(transformers.LlamaForCausalLM):
    """With a state of its own for pickles."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "note": "packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        assert state.pop("note") == "packed"
        super().__setstate__(state)
        self.unpacked = True


class Remade(transformers.LlamaForCausalLM):
    """Pickled by what makes it anew."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,), vars(self)


@pytest.mark.parametrize("cls", [Counted, Remade])
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_class_s_own_way_to_be_pickled_is_kept(cls: type, protocol: int) -> None:
    model = build(SHAPE, None, cls)
    yopo.apply(model, a_plan())
    copies = pickle.loads(pickle.dumps(model, protocol)), copy.deepcopy(model)
    for made in copies:
        assert yopo.plan_of(made) == a_plan() and torch.equal(logits(made), logits(model))
        assert type(yopo.remove(made)) is cls
        assert cls is not Counted or made.unpacked
