"""Layers that were changed after they were built: what a pruned pass would not see is refused by
name, on apply or at the first image, and what it honours goes on working."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from layouts import SHAPE, Shape, a_plan, build, make_case, weights
from torch import nn
from transformers.models.llama import modeling_llama

import yopo
from yopo.models.exchange import original_of

CASE = make_case([[("text", 2), ("image", 2, 2, False), ("text", 2)]], 32)
DEEP = Shape(layers=6)
DENSE = yopo.PruningPlan(torch.ones(6, 4))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**CASE.kwargs(), use_cache=False).logits


def attention(model: Any, layer: int = 1) -> Any:
    return model.model.layers[layer].self_attn


CHANGES = {
    "scaling": lambda attn: setattr(attn, "scaling", attn.scaling * 3),
    "attention_dropout": lambda attn: setattr(attn, "attention_dropout", 0.3),
    "is_causal": lambda attn: setattr(attn, "is_causal", False),
}


@pytest.mark.parametrize("moment", ["before the plan", "before an image", "after an image"])
@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_of_one_layer_that_is_not_as_built_is_named(name: str, moment: str) -> None:
    model = build(SHAPE, None if moment == "before the plan" else a_plan())
    if not hasattr(attention(model), name):
        pytest.skip("not an attribute on this transformers")
    if moment == "after an image":
        logits(model)
    before = getattr(attention(model), name)
    CHANGES[name](attention(model))
    with pytest.raises(TypeError, match=f"in layer 1 self_attn.{name} is "):
        yopo.apply(model, a_plan()) if moment == "before the plan" else logits(model)
    assert moment != "before the plan" or yopo.plan_of(model) is None
    setattr(attention(model), name, before)
    assert torch.equal(logits(yopo.apply(model, a_plan())), logits(build(SHAPE, a_plan())))


def test_a_scaling_that_became_a_weight_is_named() -> None:
    model = build(SHAPE, None)
    attn = attention(model)
    if not hasattr(attn, "scaling"):
        pytest.skip("before transformers 4.48 it is no attribute")
    del attn.scaling
    attn.scaling = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(TypeError, match="self_attn.scaling is Parameter"):
        yopo.apply(model, a_plan())


def test_what_a_pass_honours_may_differ() -> None:
    model, expected = build(SHAPE, None), logits(build(SHAPE, a_plan()))
    for layer in model.model.layers:
        layer.self_attn.layer_idx += 4
        layer.gradient_checkpointing = True
        layer.self_attn.my_own_note = "first"
    logits(yopo.apply(model, a_plan()))
    known = model.model._yopo_known
    model.train().eval()
    model.gradient_checkpointing_enable()
    assert not known.changed(model.model), "asked again although nothing that counts was set"
    assert torch.equal(logits(yopo.apply(model, a_plan())), expected)


def test_rotary_angles_of_one_layer_alone_are_named() -> None:
    model = build(SHAPE, None)
    rotary = getattr(attention(model), "rotary_emb", None)
    if rotary is None:
        pytest.skip("the decoder has them from transformers 4.43 on")
    rotary.inv_freq *= 0.5
    with pytest.raises(TypeError, match="layer 1 the buffer self_attn.rotary_emb.inv_freq"):
        yopo.apply(model, a_plan())


class ScaledFFN(modeling_llama.LlamaMLP):
    """An FFN with a buffer, which a checkpoint may fill."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("factor", torch.ones(1), persistent=False)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.factor


def test_a_class_that_counts_its_calls_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = yopo.apply(with_class(monkeypatch, "LlamaMLP", ScaledFFN), DENSE)
    known, calls = model.model._yopo_known, model.model.layers[0].mlp.calls
    assert calls > 0, "a layer of a class of one's own was not tried"
    for _ in range(2):
        logits(model)
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    yopo.apply(model, yopo.PruningPlan(torch.ones(6, 4), layer_cut=3))
    assert model.model.layers[0].mlp.calls == calls + 4  # these plans slice no FFN, so it is called
    yopo.apply(model, DENSE)
    assert model.model._yopo_known is not known and not known.changed(model.model)


class LateLayer(modeling_llama.LlamaDecoderLayer):
    """From layer 4 on its output is another."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.number = layer_idx

    def forward(self, *args: Any, **named: Any) -> Any:
        out = super().forward(*args, **named)
        if self.number < 4:
            return out
        return (1.1 * out[0], *out[1:]) if isinstance(out, tuple) else 1.1 * out


def with_class(monkeypatch: pytest.MonkeyPatch, name: str, cls: type) -> Any:
    """A deep Llama that builds `cls` in place of transformers' own."""
    weights(DEEP)  # kept, and to be made of transformers' own
    monkeypatch.setattr(modeling_llama, name, cls)
    model = build(DEEP, None, transformers.LlamaForCausalLM)
    assert any(original_of(type(module)) is cls for module in model.modules())
    return model


@pytest.mark.parametrize("meta", [False, True])
def test_a_buffer_that_is_not_as_built_counts(meta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_class(monkeypatch, "LlamaMLP", ScaledFFN)
    model(input_ids=torch.ones(1, 3, dtype=torch.long))  # what it counts beside does not matter
    assert yopo.plan_of(yopo.apply(model, DENSE)) == DENSE
    yopo.remove(model)
    mlp = model.model.layers[5].mlp
    mlp.factor.fill_(2)
    mlp.calls = 0
    if meta:
        model.model.layers[5].self_attn.to("meta")
    named = "in layer 5 the buffer mlp.factor" if meta else "ScaledFFN gives outputs that differ by"
    with pytest.raises(TypeError, match=named):
        yopo.apply(model, DENSE)


def test_a_class_that_acts_otherwise_in_deep_layers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_class(monkeypatch, "LlamaDecoderLayer", LateLayer)
    with pytest.raises(TypeError, match="does not compute what the layers of LlamaModel do"):
        yopo.apply(model, DENSE)


class ScaledDecoder(transformers.LlamaModel):
    """A decoder with a scale of its own, which is 1 as built."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = 1.0
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    def forward(self, *args: Any, **named: Any) -> Any:
        out = super().forward(*args, **named)
        out[0].mul_(self.scale).add_(self.shift)
        return out


@pytest.mark.parametrize("name,value", [("scale", 2.0), ("shift", torch.ones(1))])
def test_a_number_of_a_decoder_of_one_s_own_is_compared(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_class(monkeypatch, "LlamaModel", ScaledDecoder)
    yopo.remove(yopo.apply(model, DENSE))
    setattr(model.model, name, value)
    with pytest.raises(TypeError, match=f"ScaledDecoder do: its {name} is not as"):
        yopo.apply(model, DENSE)


class Listening(modeling_llama.LlamaMLP):
    """Its arithmetic hangs on what no attribute tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * getattr(self, "_settings", {"factor": 1})["factor"]


def test_each_live_layer_of_a_class_of_one_s_own_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_class(monkeypatch, "LlamaMLP", Listening)
    model.model.layers[3].mlp._settings = {"factor": 2}
    with pytest.raises(TypeError, match="LlamaDecoderLayer, .*, Listening gives outputs that diff"):
        yopo.apply(model, DENSE)
    model.model.layers[3].mlp._settings = {"factor": 1}
    expected = logits(build(DEEP, DENSE))
    assert torch.allclose(logits(yopo.apply(model, DENSE)), expected, atol=1e-6)


class OtherFFN(nn.Module):
    """The FFN of a layer with another activation, under the same names."""

    def __init__(self, mlp: Any, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act, self.act_fn = act, nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_every_layer_with_a_part_put_in_is_compared(wrong: int) -> None:
    model = build(SHAPE, None)
    for number, layer in enumerate(model.model.layers):
        act = nn.functional.gelu if number == wrong else nn.functional.silu
        layer.mlp = OtherFFN(layer.mlp, act)
    with pytest.raises(TypeError, match="one that is made of .*OtherFFN"):
        yopo.apply(model, a_plan())
