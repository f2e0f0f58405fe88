"""The released code's outputs, recorded in tests/golden: judged here are the oracle and the engine.

Every row, visual ones too, to 1e-4 in float32; decode with a cache; both ways to say where the
image is.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_files import CASES, GOLDEN, close, one_image, plan_of, read
from oracle import extended, inv_freq, oracle_forward
from safetensors.torch import load_file
from torch import Tensor

from yopo import apply
from yopo.plan.pruning_plan import PruningPlan


def bare_model(record: dict[str, Any], weights: dict[str, Tensor]) -> SimpleNamespace:
    """Just enough of a model for the oracle, straight from the tensors."""

    def module(name: str) -> SimpleNamespace:
        return SimpleNamespace(weight=weights[f"{name}.weight"], bias=weights.get(f"{name}.bias"))

    def children(prefix: str, names: str) -> SimpleNamespace:
        return SimpleNamespace(**{n: module(f"{prefix}.{n}") for n in names.split()})

    layers = []
    for index in range(record["model"]["num_hidden_layers"]):
        layer = children(f"model.layers.{index}", "input_layernorm post_attention_layernorm")
        layer.self_attn = children(f"model.layers.{index}.self_attn", "q_proj k_proj v_proj o_proj")
        layer.mlp = children(f"model.layers.{index}.mlp", "gate_proj up_proj down_proj")
        layers.append(layer)
    inner = children("model", "norm embed_tokens")
    inner.layers = layers
    config = SimpleNamespace(**record["model"])
    return SimpleNamespace(config=config, model=inner, lm_head=module("lm_head"))


def compare(out: Any, states: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> None:
    close(out.logits, tensors["logits"])
    close(states[-1], tensors["last_hidden_state"])
    rows = tensors["hidden_rows"]
    for index, golden in enumerate(tensors["layer_hidden"]):
        close(states[index + 1][:, rows], golden)


@pytest.mark.parametrize("name", CASES)
def test_oracle(name: str) -> None:
    record, tensors = read(name)
    model = bare_model(record, load_file(GOLDEN / record["weights_file"]))
    embeds, plan = tensors["inputs_embeds"], plan_of(record, tensors)
    layout = one_image(*embeds.shape[:2], record["S"], tuple(record["grid"]))
    out = oracle_forward(model, plan, embeds, layout)
    compare(out, out.hidden_states, tensors)
    assert torch.equal(inv_freq(model.config), tensors["inv_freq"])
    if record["decode_steps"]:  # decode is one long prefill
        tokens = tensors["decode_tokens"]
        longer = torch.cat([embeds, model.model.embed_tokens.weight[tokens]], 1)
        out = oracle_forward(model, plan, longer, extended(layout, tokens.shape[1]))
        close(out.logits[:, embeds.shape[1] :], tensors["decode_logits"])
        assert torch.equal(out.logits[:, embeds.shape[1] - 1 : -1].argmax(-1), tokens)


def test_oracle_qwen() -> None:
    """Released Qwen2-VL: head mask exact and not zeroing, layer cut dropping, no window, mrope."""
    record, tensors = read("qwen_p1")
    prefix = "weights."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model = bare_model(record, weights)
    keep = tensors["head_keep"].bool()
    keep[: record["headcut_from_layer"]] = True
    plan = PruningPlan(
        keep, layer_cut=record["layercut_idx"], cut_mass="drop", prune_visual_queries=False
    )
    tokens, embeds = tensors["decode_tokens"], tensors["inputs_embeds"]
    n, steps = embeds.shape[1], tokens.shape[1]
    layout = extended(one_image(1, n, record["offset"], tuple(record["grid_merged"])), steps)
    later = tensors["position_ids"].max() + 1 + torch.arange(steps)
    positions = torch.cat([tensors["position_ids"], later.expand(3, 1, steps)], -1)
    sections = torch.tensor(record["model"]["mrope_section"])
    angles = positions.float()[torch.arange(3).repeat_interleave(sections)].permute(1, 2, 0)
    longer = torch.cat([embeds, model.model.embed_tokens.weight[tokens]], 1)
    out = oracle_forward(model, plan, longer, layout, angles=angles * tensors["inv_freq"])
    text = ~layout.visual[0, :n]  # the reference cuts visual rows at the wrong place
    close(out.logits[:, :n][:, text], tensors["logits"][:, text])
    close(out.last_hidden_state[:, :n][:, text], tensors["last_hidden_state"][:, text])
    close(out.logits[:, n:], tensors["decode_logits"])
    assert torch.equal(out.logits[:, n - 1 : -1].argmax(-1), tokens)


def engine_model(record: dict[str, Any], plan: PruningPlan, **config: Any) -> Any:
    from transformers import LlamaConfig

    from yopo.modeling_llama_prune import LlamaForCausalLM

    settings = LlamaConfig(**record["model"], eos_token_id=None, pad_token_id=0, **config)
    plan.save_to(settings)
    model = LlamaForCausalLM(settings)
    loaded = model.load_state_dict(load_file(GOLDEN / record["weights_file"]), strict=False)
    assert not loaded.unexpected_keys
    return model.eval()


@pytest.mark.parametrize("route", ["visual_mask", "released"])
@pytest.mark.parametrize("name", CASES)
def test_engine(name: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image's place from the argument, and from sprompt_len alone as in the released code."""
    record, tensors = read(name)
    embeds = tensors["inputs_embeds"]
    layout = one_image(*embeds.shape[:2], record["S"], tuple(record["grid"]))
    if route == "visual_mask":
        model, told = engine_model(record, plan_of(record, tensors)), {"visual_mask": layout.visual}
    else:
        model = engine_model(record, plan_of(record, tensors), sprompt_len=record["S"])
        told = {}
        monkeypatch.setenv("YOPO_LAYOUT", "released")
    with torch.no_grad():
        out = model(inputs_embeds=embeds, output_hidden_states=True, use_cache=True, **told)
        compare(out, out.hidden_states, tensors)
        tokens = tensors.get("decode_tokens")
        for step in range(record["decode_steps"]):
            out = model(
                inputs_embeds=model.model.embed_tokens(tokens[:, step : step + 1]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            close(out.logits[:, 0], tensors["decode_logits"][:, step])


@pytest.mark.parametrize("name", ["p1_w5_c2_r2", "p6_t1"])
def test_engine_generates_the_recorded_tokens(name: str) -> None:
    record, tensors = read(name)
    embeds = tensors["inputs_embeds"]
    model = engine_model(record, plan_of(record, tensors))
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        visual_mask=one_image(*embeds.shape[:2], record["S"], tuple(record["grid"])).visual,
        max_new_tokens=record["decode_steps"],
        do_sample=False,
    )
    tokens = out[:, -record["decode_steps"] :]  # 4.36 puts the bos token first
    assert torch.equal(tokens, tensors["decode_tokens"])


@torch.no_grad()
def test_embeddings_of_which_nothing_is_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    record, tensors = read("p6_t1")
    model = engine_model(record, plan_of(record, tensors), sprompt_len=record["S"])
    monkeypatch.delenv("YOPO_LAYOUT", raising=False)
    with pytest.raises(ValueError, match="Pass visual_mask .*YOPO_LAYOUT=released"):
        model(inputs_embeds=tensors["inputs_embeds"])
    with pytest.raises(ValueError, match="layout is 'guess'; allowed: None, 'released'"):
        apply(model, plan_of(record, tensors), layout="guess")
    apply(model, plan_of(record, tensors), layout="released")
    close(model(inputs_embeds=tensors["inputs_embeds"]).logits, tensors["logits"])
    apply(model, plan_of(record, tensors))
    with monkeypatch.context() as patch:
        patch.setenv("YOPO_LAYOUT", "exact")
        with pytest.raises(ValueError, match="YOPO_LAYOUT is 'exact'; allowed: released"):
            model(inputs_embeds=tensors["inputs_embeds"])
    model = engine_model(record, plan_of(record, tensors))
    with pytest.raises(ValueError, match="Pass visual_mask .* text alone$"):
        model(inputs_embeds=tensors["inputs_embeds"])


@torch.no_grad()
def test_released_fallback_counts_from_the_first_valid_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows padded on the left have their image later; rows too short for one have none."""
    record, tensors = read("p6_t1")
    embeds, n = tensors["inputs_embeds"], tensors["inputs_embeds"].shape[1]
    model = engine_model(record, plan_of(record, tensors), sprompt_len=record["S"])
    monkeypatch.setenv("YOPO_LAYOUT", "released")
    rows = torch.zeros(3, n + 7, embeds.shape[2])
    mask = torch.zeros(3, n + 7, dtype=torch.long)
    rows[0, 7:], mask[0, 7:] = embeds[0], 1
    rows[1, :n], mask[1, :n] = embeds[0], 1
    rows[2, -50:], mask[2, -50:] = embeds[0, :50], 1
    logits = model(inputs_embeds=rows, attention_mask=mask).logits
    close(logits[0, 7:], tensors["logits"][0])
    close(logits[1, :n], tensors["logits"][0])
    close(logits[2, -50:], model(inputs_embeds=embeds[:, :50]).logits[0])


def test_rotary_frequencies_are_the_recorded_ones() -> None:
    record, tensors = read("p6_t1")
    model = engine_model(record, plan_of(record, tensors))
    found = [value for name, value in model.named_buffers() if name.endswith("inv_freq")]
    assert found and all(torch.equal(value, tensors["inv_freq"]) for value in found)
