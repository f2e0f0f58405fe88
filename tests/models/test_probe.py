"""What a decoder's layers compute is found out by trying, not guessed from names: other arithmetic
is refused by name, the same arithmetic under another name is pruned right."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from layouts import SHAPE, a_plan, build, make_case
from torch import nn

import yopo
from yopo import versions
from yopo.models import families, probe

IMAGE = 5
IDS = torch.tensor([[11, 12] + [IMAGE] * 16 + [13, 14, 15]] * 2)

if not versions.has_families():
    pytest.skip("composites need transformers 4.45", allow_module_level=True)


def composite(model_type: str, **text: Any) -> Any:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"no {model_type} on this transformers")
    sizes = dict(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    text_config = transformers.CONFIG_MAPPING[model_type](**sizes | text)
    tower = dict(
        model_type="clip_vision_model",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        text_config=text_config,
        vision_config=transformers.CLIPVisionConfig(**tower),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def decoder_of(model: Any) -> Any:
    return families.text_stack_of(families.composite_of(model))


@pytest.fixture
def any_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of all decoders are on the list, as somebody who adds one writes them there."""
    names = (
        "Granite Glm Glm4 Helium Ernie4_5 HunYuanDenseV1 Gemma Gemma2 Olmo Olmo2 StableLm SeedOss"
    )
    names += " Ministral Ministral3 Cohere Starcoder2 SmolLM3 Nemotron Phi Persimmon Qwen3 Exaone4"
    known = families.TEXT_STACKS + tuple(f"{name}Model" for name in names.split())
    monkeypatch.setattr(families, "TEXT_STACKS", known)


REFUSED = {
    "granite": dict(residual_multiplier=0.2, attention_multiplier=0.1),
    "glm": {},
    "glm4": {},
    "helium": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "gemma2": {},
    "olmo2": {},
    "qwen3": {},
    "cohere": {},
    "starcoder2": {},
    "nemotron": {},
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
}
ACCEPTED = {
    "gemma": {},
    "olmo": {},
    "stablelm": {},
    "seed_oss": {},
    "ministral": {},
    "llama": {},
    "mistral": {},
    "qwen2": {},
}


@pytest.mark.usefixtures("any_decoder")
@pytest.mark.parametrize("kind", REFUSED)
def test_other_arithmetic_is_refused_by_name(kind: str) -> None:
    model = composite(kind, **REFUSED[kind])
    name, classes = type(decoder_of(model)).__name__, set(map(type, model.modules()))
    with pytest.raises(TypeError, match=name if kind not in ("qwen3",) else "q_norm|k_norm"):
        yopo.apply(model, yopo.PruningPlan(torch.ones(3, 4)))
    assert yopo.plan_of(model) is None and set(map(type, model.modules())) == classes
    assert not hasattr(model.config, "yopo")


@pytest.mark.usefixtures("any_decoder")
@pytest.mark.parametrize("kind", ACCEPTED)
def test_the_same_arithmetic_is_accepted_and_right(kind: str) -> None:
    model = composite(kind, **ACCEPTED[kind])
    if kind == "gemma" and versions.CACHE_FIELD == "past_key_values":
        stack = decoder_of(model)
        scales = not hasattr(stack.embed_tokens, "embed_scale")
        if scales:  # embeddings are scaled by the decoder itself, which the pass does not do
            with pytest.raises(TypeError, match="GemmaModel"):
                yopo.apply(model, yopo.PruningPlan(torch.ones(3, 4)))
            return
    given = dict(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), pixel_values=torch.randn(2, 3, 16, 16)
    )
    with torch.no_grad():
        stock = model(**given).logits
        yopo.apply(model, yopo.PruningPlan(torch.ones(3, 4)))  # prunes nothing
        assert (model(**given).logits - stock).abs().max() <= 1e-4 * stock.abs().max()
        keep = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]])
        yopo.apply(model, yopo.PruningPlan(keep, window=3, layer_cut=2, ffn_ratio=2))
        assert not torch.allclose(model(**given).logits, stock)


@pytest.mark.usefixtures("any_decoder")
@pytest.mark.parametrize("clip", [4.0, 40.0, 400.0])
def test_values_that_are_clipped_are_seen(clip: float) -> None:
    """OLMo's clip_qkv does nothing to values that are smaller."""
    with pytest.raises(TypeError, match="OlmoModel"):
        yopo.apply(composite("olmo", clip_qkv=clip), yopo.PruningPlan(torch.ones(3, 4)))


def ministral3(original: int, longest: int, beta: float) -> Any:
    rope = dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=longest / original,
        original_max_position_embeddings=original,
        llama_4_scaling_beta=beta,
    )
    return composite("ministral3", rope_parameters=rope, max_position_embeddings=longest)


@pytest.mark.usefixtures("any_decoder")
@pytest.mark.parametrize("original,longest", [(64, 512), (8192, 262144), (16384, 16400)])
def test_what_changes_at_later_positions_is_seen(original: int, longest: int) -> None:
    """Ministral 3's queries grow from the original length on."""
    with pytest.raises(TypeError, match="Ministral3Model"):
        yopo.apply(ministral3(original, longest, 0.1), yopo.PruningPlan(torch.ones(3, 4)))
    yopo.apply(ministral3(original, longest, 0.0), yopo.PruningPlan(torch.ones(3, 4)))


ROPES = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "longrope": dict(
        factor=4.0,
        original_max_position_embeddings=16,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[1.0, 2.0, 3.0, 4.0],
    ),
    "llama3": dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_angles_are_accepted_and_right(kind: str, model_type: str) -> None:
    """The row is longer than the length that the angles were made for."""
    rope = dict(ROPES[kind], rope_type=kind)
    if transformers.__version__ >= "5":
        text: dict[str, Any] = dict(rope_parameters=dict(rope, rope_theta=1e4))
    else:
        text = dict(rope_scaling=rope)
    model = composite(model_type, max_position_embeddings=64, **text)
    given = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    given["pixel_values"] = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        stock = model(**given).logits
        yopo.apply(model, yopo.PruningPlan(torch.ones(3, 4)))
        assert (model(**given).logits - stock).abs().max() <= 1e-4 * stock.abs().max()


class OtherFFN(nn.Module):
    """The FFN of a layer with another activation, under the same names."""

    def __init__(self, mlp: Any, act: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act, self.act_fn = act, nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def test_a_part_put_in_after_building_is_compared_by_itself() -> None:
    model = build(SHAPE, None)
    layer = model.model.layers[1]
    layer.mlp = OtherFFN(layer.mlp, nn.functional.silu)
    case = make_case([[("text", 2), ("image", 2, 2, False), ("text", 2)]], 32)
    with torch.no_grad():
        found = yopo.apply(model, a_plan())(**case.kwargs()).logits
        assert torch.equal(found, build(SHAPE, a_plan())(**case.kwargs()).logits)
    model = build(SHAPE, None)
    layer = model.model.layers[1]
    layer.mlp = OtherFFN(layer.mlp, nn.functional.gelu)
    with pytest.raises(TypeError, match="LlamaModel do: one that is made of .*OtherFFN"):
        yopo.apply(model, a_plan())


def test_a_model_built_with_a_plan_is_probed_at_its_first_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    real = probe._verdict
    monkeypatch.setattr(probe, "_VERDICTS", {})
    monkeypatch.setattr(probe, "_verdict", lambda *a: (seen.append(1), real(*a))[1])
    model = build(SHAPE, a_plan())
    case = make_case([[("text", 2), ("image", 2, 2, False), ("text", 2)]], 32)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
        assert not seen
        for _ in range(2):
            model(**case.kwargs())
    assert seen == [1]


def test_probing_disturbs_nothing() -> None:
    model = build(SHAPE, None)
    probe._VERDICTS.clear()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    default = torch.get_default_dtype()
    yopo.apply(model, a_plan())
    assert torch.equal(torch.rand(4), expected) and torch.get_default_dtype() == default
    assert torch.is_grad_enabled()


def test_a_newer_transformers_is_probed_and_said_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "newer_than_tested", lambda: "9.9.0")
    model = build(SHAPE, None)
    with pytest.warns(UserWarning, match="transformers 9.9.0 is newer .* were probed") as caught:
        yopo.apply(model, a_plan())
    assert len(caught) == 1
    case = make_case([[("text", 2), ("image", 2, 2, False), ("text", 2)]], 32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(**case.kwargs())


def test_arguments_of_the_decoder_that_the_pass_does_not_know_are_refused() -> None:
    model = yopo.apply(build(SHAPE, None), a_plan())
    decoder = model.model
    case = make_case([[("text", 2), ("image", 2, 2, False), ("text", 2)]], 32)
    kwargs = dict(case.kwargs(), use_cache=False)
    with torch.no_grad():
        decoder(**kwargs, num_items_in_batch=3)  # says nothing to a decoder
        with pytest.raises(ValueError, match="softcap: a pruned pass"):
            decoder(**kwargs, softcap=30.0)

        def forward(self: Any, *args: Any, deepstack_visual_embeds: Any = None, **k: Any) -> Any:
            raise AssertionError("not for an image")

        stock = type("LlamaModel", (transformers.LlamaModel,), {"forward": forward})
        other = build(SHAPE, None)
        other.model.__class__ = stock
        yopo.apply(
            other,
            a_plan(),
        )
        with pytest.raises(ValueError, match="deepstack_visual_embeds: a pruned pass"):
            other.model(**kwargs, deepstack_visual_embeds=[torch.zeros(1)])
