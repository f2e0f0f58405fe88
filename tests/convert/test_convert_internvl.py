"""InternVL2's own format → transformers' InternVLForConditionalGeneration: what the converted model
computes is what the makers' code computes from the files as they lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import random_internvl as internvl
import torch
import transformers
from conversions import convert
from torch import Tensor

from yopo.commands.command_line import main

if not hasattr(transformers, "InternVLForConditionalGeneration"):
    pytest.skip("this transformers has no InternVL", allow_module_level=True)

ARCHITECTURES = list(internvl.TEMPLATES)


def loaded(folder: Path) -> Any:
    """The model in float32; every weight of it came from the files, and no other was there."""
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"]
    return model.float().eval()


def prompt(config: dict[str, Any], folder: Path, tiles: int) -> Tensor:
    """(1, n) ids: text, `tiles` tiles of visual tokens, text."""
    image = json.loads((folder / "config.json").read_text())["image_token_id"]
    assert image < config["llm_config"]["vocab_size"]
    generator = torch.Generator().manual_seed(tiles)
    words = torch.randint(3, 90, (12,), generator=generator)
    visual = torch.full((tiles * internvl.TOKENS,), image)
    return torch.cat([words[:5], visual, words[5:]])[None]


def embeddings(
    weights: dict[str, Tensor], config: dict[str, Any], ids: Tensor, pixels: Tensor
) -> Tensor:
    name = next(
        name for name in weights if name.endswith(("tok_embeddings.weight", "embed_tokens.weight"))
    )
    embeds = weights[name][ids[0]]
    features = internvl.image_features(weights, config, pixels).flatten(0, 1)
    embeds[5 : 5 + len(features)] = features
    return embeds


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_internlm2_logits_are_those_of_the_fused_grouped_projection(
    tmp_path: Path, groups: int, bias: bool
) -> None:
    language = {"num_key_value_heads": groups, "bias": bias}
    source, config, weights = internvl.make(tmp_path / "source", language=language)
    folder = convert(source, tmp_path / "new")
    ids = prompt(config, folder, 2)
    pixels = torch.randn(
        2, 3, internvl.SIDE, internvl.SIDE, generator=torch.Generator().manual_seed(7)
    )
    expected = internvl.internlm2_logits(weights, config, embeddings(weights, config, ids, pixels))
    got = loaded(folder)(input_ids=ids, pixel_values=pixels).logits[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("vit", [internvl.PLAIN_VIT, internvl.LARGE_VIT], ids=["300M", "6B"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Phi3ForCausalLM"])
def test_qwen2_and_phi3_logits_are_those_of_their_own_class(
    tmp_path: Path, architecture: str, vit: dict[str, Any]
) -> None:
    source, config, weights = internvl.make(tmp_path / "source", architecture, vit)
    folder = convert(source, tmp_path / "new")
    ids = prompt(config, folder, 1)
    pixels = torch.randn(
        1, 3, internvl.SIDE, internvl.SIDE, generator=torch.Generator().manual_seed(7)
    )
    model = loaded(folder)
    own = getattr(transformers, architecture)(model.config.text_config).eval()
    inner = {n.removeprefix("language_model."): w for n, w in weights.items() if "language" in n}
    own.load_state_dict(inner, strict=True)
    embeds = embeddings(weights, config, ids, pixels)[None]
    expected = own(inputs_embeds=embeds).logits
    got = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("written_twice", [False, True])
def test_tied_embeddings_stay_tied_and_are_written_once(
    tmp_path: Path, written_twice: bool
) -> None:
    language = {"tie_word_embeddings": True}
    source, config, weights = internvl.make(
        tmp_path / "source", "Qwen2ForCausalLM", language=language
    )
    table = weights["language_model.model.embed_tokens.weight"]
    if written_twice:
        internvl.save(source, {**weights, "language_model.lm_head.weight": table.clone()})
    folder = convert(source, tmp_path / "new")
    model = loaded(folder)
    assert torch.equal(model.lm_head.weight, table)
    ids = prompt(config, folder, 1)[:, :5]
    own = transformers.Qwen2ForCausalLM(model.config.text_config).eval()
    own.model.load_state_dict(
        {n.removeprefix("language_model.model."): w for n, w in weights.items() if "language" in n}
    )
    own.lm_head.weight.data = table
    torch.testing.assert_close(
        model(input_ids=ids).logits, own(input_ids=ids).logits, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_a_plan_comes_along(tmp_path: Path) -> None:
    """from_pretrained after `import yopo.patch` is what yopo.apply makes of the model without."""
    import yopo
    from yopo.patch import patched, undo

    undo()  # importing it enables
    dense, config, _ = internvl.make(tmp_path / "dense")
    keep = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    plan = yopo.PruningPlan(keep, window=3, layer_cut=2, ffn_ratio=2)
    carrier = {"text_config": config["llm_config"]}
    plan.save_to(carrier)
    source, _, _ = internvl.make(tmp_path / "source", yopo=carrier["yopo"])
    folder = convert(source, tmp_path / "new")
    pixels = torch.randn(
        1, 3, internvl.SIDE, internvl.SIDE, generator=torch.Generator().manual_seed(7)
    )
    ids = prompt(config, folder, 1)
    with patched():
        model = loaded(folder)
    assert yopo.plan_of(model) == plan
    applied = loaded(convert(dense, tmp_path / "applied"))
    unpruned = applied(input_ids=ids, pixel_values=pixels).logits
    yopo.apply(applied, plan)
    got = model(input_ids=ids, pixel_values=pixels).logits
    expected = applied(input_ids=ids, pixel_values=pixels).logits
    assert torch.allclose(got, expected, atol=1e-5)  # by fused weights, and by live ones
    assert not torch.allclose(got, unpruned, atol=1e-2)


def test_none_of_the_checkpoints_code_is_run(tmp_path: Path) -> None:
    source, _, _ = internvl.make(tmp_path / "source")
    ran = tmp_path / "ran"
    for name in ("modeling_internvl_chat", "tokenization_internlm2", "configuration_internvl_chat"):
        (source / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')")
    folder = convert(source, tmp_path / "new")
    assert not ran.exists() and not list(folder.glob("*.py"))


def test_phi3s_long_rope_comes_through(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
    language = {
        "rope_scaling": {"type": "su", **factors},
        "original_max_position_embeddings": 128,
    }
    source, _, _ = internvl.make(tmp_path / "source", "Phi3ForCausalLM", language=language)
    text = loaded(convert(source, tmp_path / "new")).config.text_config
    parameters = getattr(text, "rope_parameters", None) or text.rope_scaling
    assert "longrope" in (parameters.get("rope_type"), parameters.get("type"))
    assert {key: parameters[key] for key in factors} == factors
    assert text.original_max_position_embeddings == 128


def test_the_text_configs_angles_and_sizes_come_through(tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "factor": 2.0}
    source, config, _ = internvl.make(
        tmp_path / "source", language={"rope_scaling": scaling, "rope_theta": 123456.0}
    )
    text = loaded(convert(source, tmp_path / "new")).config.text_config
    parameters = getattr(text, "rope_parameters", None) or {
        "rope_theta": text.rope_theta, **text.rope_scaling
    }  # fmt: skip
    assert parameters["rope_theta"] == 123456.0
    assert parameters["factor"] == 2.0
    assert "dynamic" in (parameters.get("rope_type"), parameters.get("type"))
    for name in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert getattr(text, name) == config["llm_config"][name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tokenizer_knows_the_image_tokens_under_their_old_ids(
    tmp_path: Path, architecture: str
) -> None:
    source, _, _ = internvl.make(tmp_path / "source", architecture)
    folder = convert(source, tmp_path / "new")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for token, index in json.loads((source / "added_tokens.json").read_text()).items():
        assert tokenizer.convert_tokens_to_ids(token) == index
        assert tokenizer.encode(token, add_special_tokens=False) == [index]
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert (tokenizer.start_image_token, tokenizer.end_image_token) == ("<img>", "</img>")
    begins = tokenizer.encode("what")[0] == 1  # <s>
    assert begins == (architecture == "InternLM2ForCausalLM")
    text = "what is in this image? a RED\ncircle"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    if architecture != "Qwen2ForCausalLM":
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)


@pytest.mark.parametrize(
    ("architecture", "template", "expected"),
    [
        (
            "InternLM2ForCausalLM",
            "internlm2-chat",
            "<|im_start|>system\nS<|im_end|><|im_start|>user\n<IMG_CONTEXT>\nq<|im_end|>"
            "<|im_start|>assistant\na<|im_end|><|im_start|>user\nr<|im_end|><|im_start|>assistant\n",
        ),
        (
            "Phi3ForCausalLM",
            "phi3-chat",
            "<|system|>\nS<|end|><|user|>\n<IMG_CONTEXT>\nq<|end|><|assistant|>\na<|end|>"
            "<|user|>\nr<|end|><|assistant|>\n",
        ),
        (
            "Qwen2ForCausalLM",
            "internvl2_5",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<IMG_CONTEXT>\nq<|im_end|>\n"
            "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_the_chat_template_is_the_makers_conversation(
    tmp_path: Path, architecture: str, template: str, expected: str
) -> None:
    source, _, _ = internvl.make(tmp_path / "source", architecture, template=template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(convert(source, tmp_path / "new"))
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    options = dict(tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, **options) == expected
    default = tokenizer.apply_chat_template(messages[1:], **options)
    assert "InternVL" in default and default.endswith(expected.split("S", 1)[1])


def test_generation_stops_at_the_end_of_a_message(tmp_path: Path) -> None:
    source, _, _ = internvl.make(tmp_path / "source")
    folder = convert(source, tmp_path / "new")
    ids = json.loads((source / "added_tokens.json").read_text())
    assert loaded(folder).generation_config.eos_token_id == ids["<|im_end|>"]


def test_the_processor_tiles_and_counts_as_the_makers_do(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    import random_llava

    source, _, _ = internvl.make(tmp_path / "source")
    folder = convert(source, tmp_path / "new")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    picture = random_llava.picture(1, 3 * internvl.SIDE, internvl.SIDE)
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    assert inputs["pixel_values"].shape == (4, 3, internvl.SIDE, internvl.SIDE)  # 3 tiles, 1 whole
    image = loaded(folder).config.image_token_id
    assert int((inputs["input_ids"] == image).sum()) == 4 * internvl.TOKENS


# -------------------------------------------------------------------------------------- bad input


def refused(source: Path, target: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(target)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error, error
    assert not target.exists() and not target.with_name(f"{target.name}.partial").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "ps_version is 'v1'"),
        ({"template": "vicuna_v1.1"}, "template is 'vicuna_v1.1'"),
        ({"use_llm_lora": 16}, "use_llm_lora is 16"),
        ({"vision_config": {"patch_size": 7}}, "vision_config lacks hidden_size"),
        ({"llm_config": {"architectures": ["GemmaForCausalLM"]}}, "allowed: InternLM2ForCausalLM"),
        ({"llm_config": None}, "lacks llm_config"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
    ],
)
def test_what_the_new_class_cannot_do_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, config, _ = internvl.make(tmp_path / "source")
    (source / "config.json").write_text(json.dumps({**config, **change}))
    refused(source, tmp_path / "new", message, capsys)


def test_a_config_of_another_grouping_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, config, _ = internvl.make(tmp_path / "source")
    config["llm_config"]["num_key_value_heads"] = 4
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "new", "attention.wqkv.weight", capsys)


def test_a_tokenizer_without_the_image_token_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _, _ = internvl.make(tmp_path / "source")
    (source / "added_tokens.json").unlink()
    (source / "tokenizer_config.json").unlink()
    refused(source, tmp_path / "new", "lacks '<img>'", capsys)
