"""FFN neurons in another order: the model's function stays, and pruned it comes nearer to dense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_samples import sample
from layouts import SHAPE, Shape, build
from torch import Tensor, nn

import yopo
from yopo.calibration import neurons
from yopo.calibration.collect import collect
from yopo.calibration.head_rule import released_head_keep
from yopo.checkpoint import neuron_order
from yopo.models.attach import ffn_order_of
from yopo.plan.pruning_plan import PruningPlan

BIASED = Shape(layers=2, attention_bias=True)


def lopsided(seed: int = 0) -> Any:
    """A model in which a random half of each layer's neurons hardly matter."""
    model = build(SHAPE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            idle = torch.randperm(24, generator=generator)[:12]
            layer.mlp.down_proj.weight[:, idle] *= 0.01
    return model


def logits(model: Any, given: dict[str, Any]) -> Tensor:
    if yopo.plan_of(model) is None:  # then it is stock's, which up to 4.47 takes no visual_mask
        given = {name: value for name, value in given.items() if not name.startswith("visual")}
    with torch.no_grad():
        return model(**given).logits


def a_plan(**changes: Any) -> PruningPlan:
    return PruningPlan(torch.ones(3, 4), ffn_ratio=2, **changes)


def test_reordering_leaves_the_dense_model_and_brings_the_pruned_one_nearer() -> None:
    model, given = lopsided(), sample(7)
    dense = logits(model, given)
    first = (logits(yopo.apply(model, a_plan()), given) - dense).abs().max()
    yopo.remove(model)
    statistics = collect(model, [sample(seed) for seed in range(3)])
    order, _ = neurons.reorder(model, statistics)
    assert not torch.equal(order, torch.arange(24).expand(3, -1))
    torch.testing.assert_close(logits(model, given), dense, rtol=1e-5, atol=1e-5)
    ranked = (logits(yopo.apply(model, a_plan()), given) - dense).abs().max()
    assert ranked < 0.2 * first


def test_neurons_are_ranked_by_use_and_equal_ones_stay_in_order() -> None:
    statistics = collect(build(SHAPE), [sample(0)])
    use = torch.zeros(3, 24, dtype=torch.float64)
    use[1, 5], use[1, 3], use[2, 23] = 2, 1, 1
    order = neurons.ranked(replace(statistics, ffn_use=use))
    assert order[0].tolist() == list(range(24))
    assert order[1].tolist()[:4] == [5, 3, 0, 1] and order[2].tolist()[:2] == [23, 0]


def test_statistics_follow_the_model() -> None:
    model = lopsided()
    before = collect(model, [sample(0)])
    _, after = neurons.reorder(model, before)
    again = collect(model, [sample(0)])
    torch.testing.assert_close(after.ffn_use, again.ffn_use, rtol=1e-5, atol=1e-6)
    assert after.model == again.model != before.model
    assert torch.equal(neurons.ranked(after), torch.arange(24).expand(3, -1))
    with pytest.raises(ValueError, match="other weights"):
        neurons.reorder(model, before)


def test_undo_brings_back_every_bit() -> None:
    model = lopsided()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    order, _ = neurons.reorder(model, collect(model, [sample(0)]))
    with pytest.raises(ValueError, match="already: undo"):
        neurons.put(model, order)
    with pytest.raises(ValueError, match="not this one"):
        neurons.undo(model, order.flip(1))
    neurons.undo(model, order)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="not this one"):
        neurons.undo(model, order)


def some_order(layers: int = 3, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(24, generator=generator) for _ in range(layers)])


def test_a_plan_for_an_order_is_refused_on_weights_in_another() -> None:
    order, model = some_order(), build(SHAPE)
    plan = a_plan(ffn_order=neuron_order.checksum(order))
    with pytest.raises(ValueError, match="this model's are as trained"):
        yopo.apply(model, plan)
    neurons.put(model, order)
    yopo.apply(model, plan)
    with pytest.raises(ValueError, match=r"yopo\.remove it first"):
        neurons.undo(model, order)
    other = a_plan(ffn_order=neuron_order.checksum(some_order(seed=4)))
    with pytest.raises(ValueError, match="are in the order sha256"):
        yopo.apply(model, other)
    yopo.apply(model, a_plan())  # which says nothing of an order


def test_the_order_goes_along_with_a_saved_model(tmp_path: Path) -> None:
    order, model, given = some_order(), build(SHAPE), sample(1)
    neurons.put(model, order)
    plan = a_plan(ffn_order=neuron_order.checksum(order))
    expected = logits(yopo.apply(model, plan), given)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert yopo.plan_of(loaded) == plan
    assert torch.equal(logits(loaded, given), expected)
    yopo.apply(yopo.remove(loaded), plan)  # it is still in that order
    yopo.remove(loaded)
    neurons.undo(loaded, order)
    torch.testing.assert_close(logits(loaded, given), logits(build(SHAPE), given))
    # Stock's own class knows of the order by the config alone.
    from transformers import LlamaForCausalLM

    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(yopo.apply(stock, plan), given), expected)


@pytest.mark.parametrize("how", ["no plan", "removed", "a plan without an order"])
def test_the_order_is_not_lost_with_the_plan(tmp_path: Path, how: str) -> None:
    order, model = some_order(), build(SHAPE)
    neurons.put(model, order)
    if how != "no plan":
        yopo.apply(model, a_plan(ffn_order=neuron_order.checksum(order)))
        model.save_pretrained(tmp_path / "first")
        model = type(model).from_pretrained(tmp_path / "first")
        yopo.remove(model)
    if how == "a plan without an order":
        yopo.apply(model, a_plan())
    model.save_pretrained(tmp_path / "second")
    loaded = type(model).from_pretrained(tmp_path / "second")
    assert ffn_order_of(loaded) == neuron_order.checksum(order)
    with pytest.raises(ValueError, match="already: undo"):
        neurons.put(loaded, order)
    neurons.undo(loaded, order)
    loaded.save_pretrained(tmp_path / "third")
    assert ffn_order_of(type(model).from_pretrained(tmp_path / "third")) is None


def test_what_is_no_plain_linear_is_refused_before_anything_is_moved() -> None:
    class Wrapped(nn.Linear):
        pass

    model = build(SHAPE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.layers[2].mlp.up_proj.__class__ = Wrapped
    with pytest.raises(TypeError, match="up_proj of layer 2 is Wrapped, no plain"):
        neurons.put(model, some_order())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("order", [some_order(2), some_order() // 2, some_order()[:, :12]])
def test_what_is_no_order_of_this_model_is_refused(order: Tensor) -> None:
    with pytest.raises(ValueError, match="the order (has shape|does not name each)"):
        neurons.put(build(SHAPE), order)


def test_head_masks_do_not_depend_on_the_order() -> None:
    model = lopsided()
    before = collect(model, [sample(0)])
    _, after = neurons.reorder(model, before)
    assert torch.equal(
        released_head_keep(before.ratios, 1.0), released_head_keep(after.ratios, 1.0)
    )
