"""Decoders, layers and parts of layers that somebody gives a model, or takes from it, after a plan
was put on: pruned as asked, or refused by name. Never a dense pass without a word."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import transformers
from layouts import SHAPE, Case, a_plan, build, make_case
from torch import nn
from transformers.models.llama import modeling_llama

import yopo

PLAN = a_plan()
PARTS = ("layer", "self_attn", "mlp")


@pytest.fixture
def case() -> Case:
    rows = [[("text", 2), ("image", 3, 3, False), ("text", 3)], [("text", 4)]]
    return make_case(rows, SHAPE.heads * 8)


def logits(model: Any, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return model(**case.kwargs(), use_cache=False).logits


def part(model: Any, name: str, layer: int = 1) -> nn.Module:
    module = model.model.layers[layer]
    return module if name == "layer" else module.get_submodule(name)


def dropping(module: nn.Module) -> None:
    """Puts a forward on the module that takes any argument and hands `pruned` on to nobody."""
    own = type(module).forward

    def forward(*args: Any, pruned: Any = None, **kwargs: Any) -> Any:
        if isinstance(module, transformers.models.llama.modeling_llama.LlamaMLP):
            return own(module, *args, **kwargs)
        rows = args[0] if args else kwargs["hidden_states"]
        return (rows, None, None)[: 3 if name_of_attention(module) else 1]

    module.forward = forward


def name_of_attention(module: nn.Module) -> bool:
    return hasattr(module, "o_proj")


@pytest.mark.parametrize("name", PARTS)
def test_a_forward_that_drops_what_it_is_to_hand_on_is_refused(name: str, case: Case) -> None:
    model = build(SHAPE, PLAN)
    logits(model, case)
    dropping(part(model, name))
    with pytest.raises(ValueError, match="its pruned forward did not run.*drops the argument"):
        logits(model, case)


@pytest.mark.parametrize("name", PARTS)
def test_a_class_that_was_set_back_is_exchanged_again(name: str, case: Case) -> None:
    model = build(SHAPE, PLAN)
    before = logits(model, case)
    module = part(model, name)
    module.__class__ = type(part(build(SHAPE, None), name))
    assert torch.equal(logits(model, case), before)


@pytest.mark.parametrize("name", PARTS)
def test_the_forward_of_the_class_put_back_on_the_module_is_set_aside(
    name: str, case: Case
) -> None:
    """As Liger's patch of a live model does where its classes are in already."""
    model = build(SHAPE, PLAN)
    before, module = logits(model, case), part(model, name)
    stock = type(part(build(SHAPE, None), name)).forward
    module.forward = types.MethodType(stock, module)
    assert torch.equal(logits(model, case), before)
    yopo.remove(model)
    assert module.forward.__func__ is stock


@pytest.mark.parametrize("name", PARTS)
def test_a_part_replaced_after_the_plan_is_pruned(name: str, case: Case) -> None:
    model = build(SHAPE, PLAN)
    before = logits(model, case)
    twin = part(build(SHAPE, None), name)
    for value in twin.parameters():
        value.data *= 1.1
    expected = build(SHAPE, PLAN)
    for value in part(expected, name).parameters():
        value.data *= 1.1
    if name == "layer":
        model.model.layers[1] = twin
    else:
        setattr(model.model.layers[1], name, twin)
    found = logits(model, case)
    assert torch.equal(found, logits(expected, case)) and not torch.equal(found, before)
    yopo.remove(model)
    assert type(part(model, name)) is type(part(build(SHAPE, None), name))


def test_a_part_of_another_kind_is_refused(case: Case) -> None:
    model = build(SHAPE, PLAN)
    model.model.layers[1].mlp = nn.Identity()
    with pytest.raises(TypeError, match="the mlp of a LlamaDecoderLayer is a Identity without"):
        logits(model, case)
    yopo.remove(model)

    class Doubling(modeling_llama.LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = build(SHAPE, PLAN)
    model.model.layers[1].mlp = Doubling(model.config)
    for _ in range(2):  # it is not let through the second time
        with pytest.raises(TypeError, match="Doubling|does not compute|differ"):
            logits(model, case)


def test_another_linear_for_a_projection_is_called(case: Case) -> None:
    class Half(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    model, expected = build(SHAPE, PLAN), build(SHAPE, PLAN)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        old = model.model.layers[1].get_submodule(name)
        new = Half(old.in_features, old.out_features, bias=False)
        new.load_state_dict(old.state_dict())
        parent, _, child = name.partition(".")
        setattr(model.model.layers[1].get_submodule(parent), child, new)
        expected.model.layers[1].get_submodule(name).weight.data /= 2
    assert (logits(model, case) - logits(expected, case)).abs().max() < 1e-5


def test_layers_appended_are_counted(case: Case) -> None:
    model = build(SHAPE, PLAN)
    model.model.layers.append(build(SHAPE, None).model.layers[0])
    with pytest.raises(ValueError, match="for 3 layers, but the model has 4"):
        logits(model, case)


@pytest.mark.parametrize("first", [False, True])
def test_models_that_share_layers_are_pruned_and_restored_apart(first: bool, case: Case) -> None:
    one, two = build(SHAPE, None), build(SHAPE, None)
    dense = two(inputs_embeds=case.inputs_embeds).logits
    two.model.layers, two.model.embed_tokens = one.model.layers, one.model.embed_tokens
    other = a_plan("drop", "drop")
    yopo.apply(one, PLAN)
    yopo.apply(two, other)
    expected = logits(build(SHAPE, PLAN), case), logits(build(SHAPE, other), case)
    assert torch.equal(logits(one, case), expected[0])
    assert torch.equal(logits(two, case), expected[1])
    gone, stays = (one, two) if first else (two, one)
    yopo.remove(gone)
    assert torch.equal(logits(stays, case), expected[first])
    assert torch.equal(gone(inputs_embeds=case.inputs_embeds).logits, dense)
    text = stays.get_input_embeddings()(torch.tensor([[3, 4, 5]]))
    assert stays(inputs_embeds=text).logits.shape == (1, 3, 31)  # still known to be text
    yopo.remove(stays)
    assert type(one.model.layers[0]) is modeling_llama.LlamaDecoderLayer
    assert not one.model.embed_tokens._forward_hooks


# ------------------------------------------------------------------------- classes of users' own


class OwnDecoder(modeling_llama.LlamaModel):
    """Of another name than transformers knows."""


class Copied(modeling_llama.LlamaPreTrainedModel):
    """As authors copy the code: it does not derive from LlamaModel."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        copied = modeling_llama.LlamaModel(SHAPE.config())
        vars(self).update({k: v for k, v in vars(copied).items() if k != "config"})
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return modeling_llama.LlamaModel.forward(self, *args, **kwargs)


def replaced_layers(self: Any, config: Any) -> None:
    layers = [modeling_llama.LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
    self.model.layers = nn.ModuleList(layers)


def replaced_one_layer(self: Any, config: Any) -> None:
    self.model.layers[1] = modeling_llama.LlamaDecoderLayer(config, 1)


def replaced_decoder(self: Any, config: Any) -> None:
    self.model = OwnDecoder(config)


def copied_decoder(self: Any, config: Any) -> None:
    self.model = Copied(config)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "change", [replaced_layers, replaced_one_layer, replaced_decoder, copied_decoder]
)
def test_what_a_class_of_the_user_s_own_replaces_after_building_is_pruned(
    change: Any, again: bool, case: Case
) -> None:
    class Own(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            change(self, config)
            if again:
                self.post_init()

    from yopo import patch  # not above: importing it enables it

    with patch.patched():
        model = build(SHAPE, PLAN, Own)
    assert torch.equal(logits(model, case), logits(build(SHAPE, PLAN), case))


def test_a_decoder_put_in_later_is_pruned(case: Case) -> None:
    model = yopo.apply(build(SHAPE, None), PLAN)
    before = logits(model, case)
    model.model = build(SHAPE, None).model
    assert torch.equal(logits(model, case), before)
    model.model = build(SHAPE, None).model
    del model.config.yopo
    with pytest.raises(ValueError, match="decoder of this LlamaForCausalLM was replaced"):
        logits(model, case)
    yopo.apply(model, PLAN)
    assert torch.equal(logits(model, case), before)


# --------------------------------------------------------------------------- kept bound methods


def test_methods_kept_from_before_the_plan_was_taken_off_are_stock_s(case: Case) -> None:
    model = yopo.apply(build(SHAPE, None), PLAN)
    ids = torch.tensor([[3, 4, 5]])
    kept = model.forward, model.generate, model.prepare_inputs_for_generation
    inner = model.model.forward
    parts = {name: part(model, name).forward for name in PARTS}
    yopo.remove(model)
    for name, forward in parts.items():
        part(model, name).forward = forward
    dense = build(SHAPE, None)
    with torch.no_grad():
        assert torch.equal(kept[0](ids).logits, dense(ids).logits)
        assert torch.equal(inner(ids)[0], dense.model(ids)[0])
        how = dict(max_new_tokens=3, do_sample=False)
        assert torch.equal(kept[1](ids, **how), dense.generate(ids, **how))
    assert torch.equal(kept[2](ids)["input_ids"], ids)


def test_a_compiled_model_goes_on_when_the_plan_is_taken_off(case: Case) -> None:
    model = yopo.apply(build(SHAPE, None), PLAN)
    compiled = torch.compile(model, backend="eager")
    expected = logits(model, case)
    assert (logits(compiled, case) - expected).abs().max() < 1e-5
    yopo.remove(model)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.allclose(compiled(ids).logits, build(SHAPE, None)(ids).logits, atol=1e-5)


def test_accelerator_prepare_and_remove(case: Case) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = yopo.apply(build(SHAPE, None), PLAN)
    expected = logits(model, case)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert (logits(prepared, case) - expected).abs().max() < 0.3
    yopo.remove(model)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert (prepared(ids).logits - build(SHAPE, None)(ids).logits).abs().max() < 0.3
