"""Classes of users' own, of any shape that Python allows: a plan exchanges them, and asks neither
their metaclass nor their base class for it; arguments come to the pass by their names."""

from __future__ import annotations

import abc
from functools import partial, partialmethod
from typing import Any, ClassVar

import pytest
import random_families
import torch
import transformers
from layouts import SHAPE, Case, a_plan, build, left_padded
from random_families import KINDS

import yopo
from yopo.plan.pruning_plan import PruningPlan

PLAN = a_plan()
KIND = KINDS["llava-llama"]


@pytest.fixture
def case() -> Case:
    return left_padded()


def logits(model: Any, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return model(**case.kwargs(), use_cache=False).logits


# ------------------------------------------------------------------------------ how they are made


class Asking(type(transformers.LlamaForCausalLM)):
    """A metaclass that must be told something, and keeps a list."""

    made: ClassVar[list[str]] = []

    def __new__(mcs, name: str, bases: Any, names: Any, *, told: str) -> Any:
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, names)

    def __init__(cls, name: str, bases: Any, names: Any, *, told: str) -> None:
        super().__init__(name, bases, names)


class OfAsking(transformers.LlamaForCausalLM, metaclass=Asking, told="a"):
    pass


class AbstractAsking(abc.ABCMeta):
    def __new__(mcs, name: str, bases: Any, names: Any, *, told: str) -> Any:
        return super().__new__(mcs, name, bases, names)

    def __init__(cls, name: str, bases: Any, names: Any, *, told: str) -> None:
        super().__init__(name, bases, names)


class Abstract(transformers.LlamaForCausalLM, metaclass=AbstractAsking, told="a"):
    pass


class Registered(transformers.LlamaForCausalLM):
    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if key in cls.known:
            raise ValueError(f"{key} is there already")
        cls.known[key] = cls


class Leaf(Registered, key="leaf"):
    pass


@pytest.mark.parametrize("cls", [OfAsking, Abstract, Leaf])
def test_nobody_is_asked_for_the_exchanged_class(cls: type, case: Case) -> None:
    model = build(SHAPE, None, cls)
    yopo.apply(model, PLAN)
    assert torch.equal(logits(model, case), logits(build(SHAPE, PLAN), case))
    assert Asking.made == ["OfAsking"] and Registered.known == {"leaf": Leaf}
    assert isinstance(model, cls) and not isinstance(build(SHAPE, None, cls), type(model))
    assert type(yopo.remove(model)) is cls


def test_who_derives_of_a_pruned_class_is_asked_as_before() -> None:
    model = yopo.apply(build(SHAPE, None, Leaf), PLAN)
    with pytest.raises(TypeError, match="key"):
        type("Further", (type(model),), {})


# -------------------------------------------------------------------------- how they are called


def unnamed(function: Any) -> Any:
    """A decorator that does not say what it wraps."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


class Descriptor:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __get__(self, one: Any, cls: Any = None) -> Any:
        return self if one is None else partial(self.function, one)


def decorated(stock: type) -> type:
    class Own(stock):
        forward = unnamed(stock.forward)

    return Own


def by_partialmethod(stock: type) -> type:
    class Own(stock):
        def _forward(self, flag: bool, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

        forward = partialmethod(_forward, True)

    return Own


def by_descriptor(stock: type) -> type:
    class Own(stock):
        forward = Descriptor(stock.forward)

    return Own


def with_rest(stock: type) -> type:
    class Own(stock):
        def forward(self, input_ids: Any = None, *rest: Any, **kwargs: Any) -> Any:
            return super().forward(input_ids, *rest, **kwargs)

    return Own


HOWS = (decorated, by_partialmethod, by_descriptor, with_rest)


@pytest.mark.parametrize("how", HOWS)
def test_a_decoder_s_arguments_are_known_by_their_place(how: Any, case: Case) -> None:
    model = build(SHAPE, None)
    model.model.__class__ = how(type(model.model))
    yopo.apply(model, PLAN)
    expected = build(SHAPE, PLAN).model
    given = case.kwargs()
    told = {name: given.pop(name) for name in ("visual_mask", "visual_grids")}
    args = (None, given["attention_mask"], given["position_ids"], None, given["inputs_embeds"])
    with torch.no_grad():
        found = model.model(*args, **told)[0]
        assert torch.equal(found, expected(**given, **told)[0])
        with pytest.raises(ValueError, match="by their place"):
            model.model(*args, *[None] * 20, **told)
    assert torch.equal(logits(model, case), logits(build(SHAPE, PLAN), case))


@pytest.mark.skipif(not KIND.exists, reason="older than the families' support")
@pytest.mark.parametrize("how", HOWS)
def test_a_composite_s_arguments_are_known_by_their_place(how: Any) -> None:
    model = random_families.build(KIND)
    plan = PruningPlan(torch.ones(3, 4), window=3, layer_cut=2)
    expected = yopo.apply(random_families.build(KIND), plan)
    composite = model.model if hasattr(getattr(model, "model", None), "vision_tower") else model
    composite.__class__ = how(type(composite))
    yopo.apply(model, plan)
    rows = [[("text", 2), ("image", 0), ("text", 3)]]
    given = random_families.make(KIND, rows, seed=1).inputs(model, positions=False)
    ids, pixels = given.pop("input_ids"), given.pop("pixel_values")
    of_expected = expected.model if composite is not model else expected
    with torch.no_grad():
        found = composite(ids, pixels, **given)[0]
        assert torch.equal(found, of_expected(ids, pixels, **given)[0])


@pytest.mark.skipif(not KIND.exists, reason="older than the families' support")
def test_a_composite_s_text_model_replaced_after_the_plan_is_refused() -> None:
    model, other = random_families.build(KIND), random_families.build(KIND)
    plan = PruningPlan(torch.ones(3, 4), window=3, layer_cut=2)
    yopo.apply(model, plan)
    rows = [[("text", 2), ("image", 0), ("text", 3)]]
    given = random_families.make(KIND, rows, seed=1).inputs(model, positions=False)
    with torch.no_grad():
        expected = model(**given).logits
        holder = model.model if hasattr(getattr(model, "model", None), "vision_tower") else model
        theirs = other.model if hasattr(getattr(other, "model", None), "vision_tower") else other
        holder.language_model = theirs.language_model
        with pytest.raises(ValueError, match="put the plan on once more"):
            model(**given)
        assert torch.equal(yopo.apply(model, plan)(**given).logits, expected)
