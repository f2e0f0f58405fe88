"""Statistics against the n × n way: stock's eager attention maps, values and hidden neurons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_samples import inputs, naive, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import SHAPE, Segment, Shape, a_plan, build, make_case, segments, shapes
from oracle import oracle_forward
from torch import Tensor, nn
from torch.nn import functional as F

import yopo
from yopo.calibration import collect as collecting
from yopo.calibration.collect import collect
from yopo.calibration.sample_statistics import Statistics
from yopo.plan.pruning_plan import PruningPlan


def close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def ends_in_text_behind_an_image(row: list[Segment]) -> bool:
    return row[-1][0] == "text" and any(s[0] == "image" for s in row)


@settings(max_examples=25)
@given(st.data())
def test_statistics_are_those_of_stock_s_attention_maps(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    row = data.draw(segments().filter(ends_in_text_behind_an_image))
    case = make_case(
        [row],
        shape.heads * 8,
        truncate=[data.draw(st.sampled_from([0, 0, 1, 3]))],
        positions=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**16)),
    )
    found, expected = collect(build(shape), [inputs(case)]), naive(shape, case)
    close(found.ratios[0], expected.ratios)
    close(found.visual_mass[0], expected.visual_mass)
    close(found.sinks().a, expected.sinks, 1e-4)
    close(found.ffn_use, expected.ffn_use)
    assert found.text_tokens.tolist() == [expected.text_tokens]
    assert found.visual_tokens.tolist() == [int(case.visual.sum())]


def test_blocks_of_queries_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = build(SHAPE), [sample(0)]
    whole = collect(model, one)
    monkeypatch.setattr(collecting, "BLOCK", 5 * SHAPE.heads * 18)  # five queries at a time
    blocks = collect(model, one)
    for name in ("ratios", "visual_mass", "sink_sums"):
        close(getattr(blocks, name), getattr(whole, name))


def test_influence_is_what_the_next_token_loses_with_the_image_at_each_layer() -> None:
    case = make_case([[("text", 2), ("image", 3, 3, False), ("text", 3)]], SHAPE.heads * 8)
    model = build(SHAPE)
    found = collect(model, [inputs(case)]).influence[0]
    dense = naive(SHAPE, case).logits.double().log_softmax(-1)
    ones = torch.ones(SHAPE.layers, SHAPE.heads)
    for cut in range(SHAPE.layers):
        plan = PruningPlan(ones, layer_cut=cut, head_mass="drop", cut_mass="drop")
        out = oracle_forward(model, plan, case.inputs_embeds, case.layout).logits[0, -1]
        kl = F.kl_div(out.log_softmax(-1), dense, log_target=True, reduction="sum")
        close(found[cut], kl.detach())
    assert torch.isnan(collect(model, [inputs(case)], influence=False).influence).all()


def test_samples_add_up() -> None:
    model, some = build(SHAPE), [sample(0), sample(1, after=1), sample(2)]
    together = collect(model, some)
    alone = [collect(model, [one]) for one in some]
    assert len(together) == 3 and together.text_tokens.tolist() == [4, 1, 4]
    for name in ("ratios", "visual_mass", "influence"):
        joined = torch.cat([getattr(one, name) for one in alone])
        assert torch.equal(getattr(together, name), joined)
    close(together.ffn_use, sum(one.ffn_use for one in alone), 1e-12)


@pytest.mark.parametrize("before", [None, "applied", "loaded"])
def test_the_model_is_left_as_it_was(before: str | None) -> None:
    plan = a_plan("drop", "drop")
    model = build(SHAPE, plan if before == "loaded" else None).train()
    if before == "applied":
        yopo.apply(model, plan)
    config, cls = model.config.to_dict(), type(model.model)
    collect(model, [sample(0)])
    assert yopo.plan_of(model) == (None if before is None else plan)
    assert model.training and model.config.to_dict() == config and type(model.model) is cls
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_plan_does_not_change_what_is_measured() -> None:
    dense, pruned = (collect(build(SHAPE, plan), [sample(0)]) for plan in (None, a_plan()))
    for name in ("ratios", "visual_mass", "sink_sums", "ffn_use", "influence"):
        assert torch.equal(getattr(dense, name), getattr(pruned, name))


# ------------------------------------------------------------------------ interrupted, and resumed


class Stopped(Exception):
    pass


def until(stop: int) -> Iterator[dict[str, Any]]:
    for seed in range(stop):
        yield sample(seed)
    raise Stopped


def passes(model: nn.Module) -> list[int]:
    """Gets an entry for each forward of the model's first layer's FFN."""
    counted: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: counted.append(1))
    return counted


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    path, model = tmp_path / "statistics.safetensors", build(SHAPE)
    with pytest.raises(Stopped):
        collect(model, until(3), path=path)
    assert len(Statistics.load(path)) == 3
    counted = passes(model)
    resumed = collect(model, [sample(seed) for seed in range(5)], path=path, influence=False)
    assert len(counted) == 2
    whole = collect(build(SHAPE), [sample(seed) for seed in range(5)])
    for found in (resumed, Statistics.load(path)):
        assert found.samples == whole.samples
        for name in ("ratios", "visual_mass", "sink_sums", "ffn_use"):
            assert torch.equal(getattr(found, name), getattr(whole, name)), name


def test_other_samples_than_a_run_began_with_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "statistics.safetensors", build(SHAPE)
    collect(model, [sample(0), sample(1)], path=path)
    with pytest.raises(ValueError, match="sample 1 is not the one"):
        collect(model, [sample(0), sample(2)], path=path)


def test_statistics_of_another_model_are_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    collect(build(SHAPE), [sample(0)], path=path)
    other = build(SHAPE)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        collect(other, [sample(0)], path=path)
    larger = Shape(layers=2)
    with pytest.raises(ValueError, match="one of 3x4x2x24 .* not 2x4x2x24"):
        collect(build(larger), [sample(0, larger)], path=path)


def test_fewer_samples_than_known_are_enough() -> None:
    known = collect(build(SHAPE), [sample(0), sample(1)])
    assert len(collect(build(SHAPE), [sample(0)], known=known)) == 2


# -------------------------------------------------------------------------------------- bad input


def no_image(given: dict[str, Any]) -> None:
    given["visual_mask"] = torch.zeros_like(given["visual_mask"])
    given.pop("visual_grids", None)


def no_question(given: dict[str, Any]) -> None:
    for name in ("inputs_embeds", "visual_mask", "attention_mask"):
        if name in given:
            given[name] = given[name][:, :14]


def two_rows(given: dict[str, Any]) -> None:
    given["inputs_embeds"] = given["inputs_embeds"].repeat(2, 1, 1)


def padded(given: dict[str, Any]) -> None:
    given["attention_mask"] = torch.ones(1, 18, dtype=torch.long)
    given["attention_mask"][0, 0] = 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_image, "shows no image"),
        (no_question, "nothing is asked"),
        (two_rows, "has 2 rows"),
        (padded, "padding"),
        (lambda given: given.pop("inputs_embeds"), "input_ids or inputs_embeds"),
    ],
)
def test_what_is_no_sample_is_refused(spoil: Any, message: str) -> None:
    given, model = sample(0), build(SHAPE)
    spoil(given)
    with pytest.raises(ValueError, match=message):
        collect(model, [given])
    assert yopo.plan_of(model) is None


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no sample"):
        collect(build(SHAPE), [])
    with pytest.raises(ValueError, match="no sample"):
        collect(build(SHAPE), [sample(0)], limit=0)


def test_what_is_no_dict_is_refused() -> None:
    with pytest.raises(ValueError, match="dict of model inputs.*Tensor"):
        collect(build(SHAPE), [torch.zeros(1, 3)])


def test_a_model_that_gives_nan_is_refused() -> None:
    model = build(SHAPE)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        collect(model, [sample(0)])
