"""How a plan gets onto a model of a family and off it: apply, remove, adapters, save and load,
yopo.patch; and what is refused, with what words."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from family_checks import a_plan, check, compare, later, mixed, run, same, some_sinks, truth
from golden_files import close, one_image, read
from random_families import (
    HEADS,
    HERE,
    IMAGE,
    KINDS,
    LAYERS,
    Kind,
    build,
    config,
    head_of,
    into_stack,
    make,
    places,
    stack_of,
    visual_inputs,
)
from torch import Tensor, nn

import yopo
from yopo.models import families
from yopo.models.told import during, told
from yopo.plan import recipes as semantics
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import CACHE_FIELD

every_kind = pytest.mark.parametrize("kind", [pytest.param(KINDS[n], id=n) for n in HERE])
pytestmark = pytest.mark.skipif(not HERE, reason="no families on this transformers")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"]
LINEARS += ["gate_proj", "up_proj", "down_proj", "gate_up_proj"]


@pytest.fixture
def patch() -> Iterator[Any]:
    """yopo.patch, enabled; undone afterwards."""
    import yopo.patch

    yopo.patch.enable()
    yield yopo.patch
    yopo.patch.undo()


def logits(model: Any, kind: Kind) -> Tensor:
    batch = make(kind, mixed(kind))
    return run(model, batch.inputs(model)).logits


def near(fused: Tensor, live: Tensor) -> bool:
    """A model that was loaded goes by fused weights, one in hand by live ones: to rounding."""
    return torch.allclose(fused, live, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------- apply, remove


@every_kind
def test_a_plan_in_the_text_config_gives_way_to_the_one_applied(kind: Kind) -> None:
    model = build(kind)
    if getattr(model.config, "text_config", None) is None:
        pytest.skip("this transformers has one flat config for both")
    a_plan(layer_cut=1).save_to(model.config.text_config)
    yopo.apply(model, a_plan())
    assert "yopo" not in vars(model.config.text_config)
    yopo.remove(model)
    assert model.config.text_config.yopo["layer_cut"] == 1


@pytest.mark.feature("apply, remove")
@every_kind
def test_apply_and_remove_leave_no_trace(kind: Kind) -> None:
    model = build(kind)
    dense = logits(model, kind)
    modules = list(model.modules())
    before = [type(m) for m in modules], [sorted(vars(m)) for m in modules]
    settings = copy.deepcopy(model.config.to_dict())
    weights = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert yopo.plan_of(model) is None and yopo.apply(model, a_plan()) is model
    pruned = logits(model, kind)
    assert yopo.plan_of(model) == a_plan() and not torch.equal(pruned, dense)
    assert type(model).__name__ == kind.cls
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == weights
    other = a_plan(window=None, head_mass="drop", cut_mass="drop")
    yopo.apply(yopo.apply(model, other), other)  # another plan, and the same again
    assert yopo.plan_of(model) == other and not torch.equal(logits(model, kind), pruned)
    assert yopo.remove(model) is model
    assert [type(m) for m in modules] == before[0]
    # Positions that Qwen's forward keeps on the module are not ours.
    assert [sorted({*vars(m)} - {"rope_deltas"}) for m in modules] == [
        sorted({*names} - {"rope_deltas"}) for names in before[1]
    ]
    assert model.config.to_dict() == settings and yopo.plan_of(model) is None
    assert torch.equal(logits(yopo.remove(model), kind), dense)


@pytest.mark.feature("apply, remove")
@every_kind
def test_copies_and_wrappers(kind: Kind) -> None:
    wrapped = nn.ModuleDict({"base_model": build(kind)})  # as PEFT and DDP hold it
    assert yopo.apply(wrapped, a_plan()) is wrapped
    model = wrapped["base_model"]
    twin = copy.deepcopy(model)
    pruned = logits(model, kind)
    yopo.remove(wrapped)
    assert yopo.plan_of(wrapped) is None and yopo.plan_of(twin) == a_plan()
    assert torch.equal(logits(twin, kind), pruned)


@pytest.mark.feature("apply, remove")
@every_kind
def test_the_part_without_a_head_can_be_pruned_alone(kind: Kind) -> None:
    """…Model, from 4.52 on; before, there is none."""
    if "lm_head" not in build(kind)._modules or "visual" in build(kind)._modules:
        pytest.skip("no …Model of its own before 4.52")
    whole, part = yopo.apply(build(kind), a_plan()), build(kind).model
    batch = make(kind, mixed(kind))
    states = run(yopo.apply(part, a_plan()), batch.inputs(whole)).last_hidden_state
    assert torch.equal(whole.lm_head(states), run(whole, batch.inputs(whole)).logits)
    assert yopo.plan_of(yopo.remove(part)) is None


# ------------------------------------------------------------------------------------- adapters


def with_adapter(model: Any) -> Any:
    """LoRA on every linear of the text model, by peft itself, with weights that matter."""
    import torch.distributed.tensor  # peft takes it for granted that transformers did so

    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=LINEARS, lora_dropout=0.0)
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


@pytest.mark.feature("LoRA before and after apply")
@pytest.mark.parametrize("masses", [("exact", "exact"), ("drop", "drop")], ids="/".join)
@pytest.mark.parametrize("when", ["before", "after"])
@every_kind
def test_an_adapter_works_as_if_merged(kind: Kind, when: str, masses: tuple[str, str]) -> None:
    plan = a_plan(head_mass=masses[0], cut_mass=masses[1])
    merged = with_adapter(build(kind)).merge_and_unload()
    expected = logits(yopo.apply(merged, plan), kind)
    if when == "before":
        adapted = yopo.apply(with_adapter(build(kind)), plan)
    else:
        adapted = with_adapter(yopo.apply(build(kind), plan))
    assert yopo.plan_of(adapted) == plan
    inner = adapted.get_base_model()
    # Merged weights round otherwise than two products do.
    assert (logits(inner, kind) - expected).abs().max() < 1e-3
    batch = make(kind, mixed(kind))
    adapted.train()
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    adapted(**batch.inputs(inner), labels=labels).loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n and stack_part(n, kind)]
    assert grads and all(g is not None and g.isfinite().all() for g in grads)


def stack_part(name: str, kind: Kind) -> bool:
    return ".layers." in name and "vision" not in name and "visual" not in name


# --------------------------------------------------------------------------------- save and load


@pytest.mark.feature("save, load, yopo.patch")
@every_kind
def test_a_saved_plan_comes_back(kind: Kind, patch: Any, tmp_path: Path) -> None:
    plan = a_plan(cut_mass="sink", sinks=some_sinks(kind))
    patch.undo()
    model, dense = yopo.apply(build(kind), plan), logits(build(kind), kind)
    pruned = logits(model, kind)
    model.save_pretrained(tmp_path / "first")
    cls = getattr(transformers, kind.cls)
    build(kind).save_pretrained(tmp_path / "stock")
    files = [tmp_path / name / "config.json" for name in ("first", "stock")]
    written, stocks = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert written.pop("yopo") and written == stocks
    assert torch.equal(logits(cls.from_pretrained(tmp_path / "first").eval(), kind), dense)
    patch.enable()
    loaded = cls.from_pretrained(tmp_path / "first").eval()
    assert yopo.plan_of(loaded) == plan and near(logits(loaded, kind), pruned)
    loaded.save_pretrained(tmp_path / "second")
    again = cls.from_pretrained(tmp_path / "second").eval()
    assert yopo.plan_of(again) == plan and near(logits(again, kind), pruned)
    for name in ("AutoModelForImageTextToText", "AutoModelForVision2Seq"):
        if hasattr(transformers, name):
            auto = getattr(transformers, name).from_pretrained(tmp_path / "first").eval()
            assert near(logits(auto, kind), pruned)
            break
    yopo.apply(again, a_plan())
    yopo.remove(again)
    assert yopo.plan_of(again) == plan and near(logits(again, kind), pruned)
    yopo.remove(again)
    assert yopo.plan_of(again) is None and PruningPlan.from_config(again.config) is None
    assert torch.equal(logits(again, kind), dense)


@every_kind
def test_loading_with_a_device_map(kind: Kind, patch: Any, tmp_path: Path) -> None:
    """accelerate's hooks, and half precision asked for at loading."""
    accelerate = pytest.importorskip("accelerate")
    model = yopo.apply(build(kind), a_plan())
    model.save_pretrained(tmp_path)
    cls = getattr(transformers, kind.cls)
    loaded = cls.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert yopo.plan_of(loaded) == a_plan()
    assert near(logits(loaded, kind), logits(model, kind))
    accelerate.cpu_offload(loaded, execution_device="cpu")
    assert torch.allclose(logits(loaded, kind), logits(model, kind), atol=1e-5)
    half = cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert next(half.parameters()).dtype == torch.bfloat16 and yopo.plan_of(half) == a_plan()


@pytest.mark.feature("save, load, yopo.patch")
@every_kind
def test_a_plan_in_the_text_config_is_found(kind: Kind, patch: Any, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    holder: dict[str, Any] = settings.get("text_config", settings)
    a_plan().save_to(model.config)
    holder["yopo"] = model.config.yopo
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = getattr(transformers, kind.cls).from_pretrained(tmp_path).eval()
    assert yopo.plan_of(loaded) == a_plan()
    assert near(logits(loaded, kind), logits(yopo.apply(build(kind), a_plan()), kind))
    yopo.remove(loaded)
    assert PruningPlan.from_config(loaded.config) is None


@pytest.mark.feature("save, load, yopo.patch")
@every_kind
def test_undo_builds_stock_models_again(kind: Kind, patch: Any) -> None:
    settings = config(kind)
    a_plan().save_to(settings)
    cls = getattr(transformers, kind.cls)
    assert yopo.plan_of(cls(settings)) == a_plan()
    patch.undo()
    model = cls(settings)
    assert yopo.plan_of(model) is None and type(model) is cls


# ------------------------------------------------------------------------ the released Qwen2-VL


@torch.no_grad()
def test_released_qwen2_vl_gives_the_recorded_numbers() -> None:
    """tests/golden/qwen_p1: text rows of the prefill, and six greedy steps with a cache."""
    record, tensors = read("qwen_p1")
    kind, sizes = KINDS["qwen2_vl"], record["model"]
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads")
    settings = config(kind, **{name: sizes[name] for name in names})
    text = getattr(settings, "text_config", None) or settings
    rope = getattr(text, "rope_parameters", None) or text.rope_scaling
    rope["mrope_section"] = sizes["mrope_section"]
    settings.vision_config.hidden_size = sizes["hidden_size"]
    model = transformers.Qwen2VLForConditionalGeneration(settings).eval()
    weights = {k[len("weights.") :]: v for k, v in tensors.items() if k.startswith("weights.")}
    inner = {k[len("model.") :]: v for k, v in weights.items() if k.startswith("model.")}
    missing, surplus = stack_of(model).load_state_dict(inner, strict=False)
    assert not surplus and all("inv_freq" in name for name in missing)
    head_of(model).weight.copy_(weights["lm_head.weight"])
    keep = tensors["head_keep"].bool()
    keep[: record["headcut_from_layer"]] = True
    yopo.apply(model, semantics.released_qwen2_vl(keep, layer_cut=record["layercut_idx"]))

    embeds = tensors["inputs_embeds"]
    layout = one_image(*embeds.shape[:2], record["offset"], tuple(record["grid_merged"]))
    with during(told(layout.visual, [[tuple(record["grid_merged"])]])):
        out = model(
            inputs_embeds=embeds,
            position_ids=tensors["position_ids"],
            past_key_values=transformers.DynamicCache(),
            use_cache=True,
        )
    rows = ~layout.visual[0]  # the reference cuts visual rows at the wrong place
    close(out.logits[:, rows], tensors["logits"][:, rows])
    start = tensors["position_ids"].max() + 1
    for step in range(record["decode_steps"]):
        assert torch.equal(out.logits[:, -1].argmax(-1), tensors["decode_tokens"][:, step])
        out = model(
            input_ids=tensors["decode_tokens"][:, step : step + 1],
            position_ids=(start + step).expand(3, 1, 1),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        close(out.logits[:, 0], tensors["decode_logits"][:, step])


def test_named_semantics_are_what_they_say() -> None:
    keep = torch.ones(4, 4)
    llava = semantics.released_llava(keep, window=5, layer_cut=2, ffn_ratio=2)
    assert llava == PruningPlan(keep, window=5, layer_cut=2, ffn_ratio=2)
    assert (llava.head_mass, llava.cut_mass, llava.window_causal) == ("exact", "exact", False)
    qwen = semantics.released_qwen2_vl(keep, layer_cut=3)
    assert (qwen.head_mass, qwen.cut_mass) == ("exact", "drop")
    assert (qwen.window, qwen.ffn_ratio) == (None, 1) and not qwen.prune_visual_queries
    free = semantics.training_free(keep, window=7, ffn_ratio=2)
    assert (free.head_mass, free.cut_mass, free.window_causal) == ("exact", "drop", True)
    assert (free.window, free.ffn_ratio, free.layer_cut) == (7, 2, 4)


# ------------------------------------------------------------------------------------ bad input


@every_kind
def test_a_plan_of_another_shape_is_refused(kind: Kind) -> None:
    model = build(kind)
    before = model.config.to_dict()
    for shape in ((LAYERS + 1, HEADS), (LAYERS, HEADS * 2)):
        with pytest.raises(ValueError, match=r"head_keep has shape.*\(3, 4\)"):
            yopo.apply(model, PruningPlan(torch.ones(*shape)))
    assert yopo.plan_of(model) is None and model.config.to_dict() == before


@every_kind
def test_images_that_do_not_fill_their_tokens_are_refused(kind: Kind) -> None:
    """A prompt cut inside an image; an image without tokens; tokens of another size."""
    model = yopo.apply(build(kind), a_plan())
    batch = make(kind, [[("text", 2), ("image", 0), ("text", 2)]])
    inputs = batch.inputs(model, positions=False)
    ids = inputs["input_ids"].clone()
    at = (ids == IMAGE).nonzero()[-1]
    ids[at[0], at[1]] = 11
    inputs["input_ids"] = ids
    positions = torch.arange(ids.shape[1])[None]
    with pytest.raises(ValueError, match="which the images given do not fill"):
        run(model, inputs, position_ids=positions)
    inputs["input_ids"] = ids.masked_fill(ids == IMAGE, 11)
    with pytest.raises(ValueError, match="1 of 1 images given have no image tokens"):
        run(model, inputs, position_ids=positions)


@torch.no_grad()
def test_a_class_token_that_is_kept_is_a_grid_of_its_own() -> None:
    """vision_feature_select_strategy "full": one feature more, in front of the patches."""
    kind = KINDS["llava-llama"]
    settings = config(kind)
    settings.vision_feature_select_strategy = "full"
    model = transformers.LlavaForConditionalGeneration(settings).eval()
    ids = torch.tensor([[11] * 2 + [IMAGE] * 17 + [12] * 3])
    picture = visual_inputs(kind, [("image", None, 0)])
    out = yopo.apply(model, a_plan())(input_ids=ids, use_cache=True, **picture)
    assert out.past_key_values.layout.grids == (((1, 1), (4, 4)),)
    assert out.past_key_values.layout.image[0, 2:5].tolist() == [0, 1, 1]


@torch.no_grad()
def test_pictures_of_a_pixtral_tower_have_grids_of_their_own() -> None:
    if not hasattr(transformers, "PixtralVisionModel"):
        pytest.skip("no Pixtral on this transformers")
    kind = KINDS["llava-llama"]
    settings = config(kind)
    tower = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    settings = transformers.LlavaConfig(
        text_config=settings.text_config,
        vision_config=transformers.PixtralVisionConfig(**tower, image_size=32, patch_size=4),
        image_token_index=IMAGE,
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(settings).eval()
    if "image_sizes" not in inspect.signature(model.forward).parameters:
        pytest.skip("LLaVA takes no image_sizes on this transformers")
    ids = torch.tensor([[11, 12] + [IMAGE] * 6 + [13] + [IMAGE] * 12])
    given = dict(
        pixel_values=torch.randn(2, 3, 12, 16), image_sizes=torch.tensor([[8, 12], [12, 16]])
    )
    out = yopo.apply(model, a_plan())(input_ids=ids, use_cache=True, **given)
    assert out.past_key_values.layout.grids == (((2, 3), (3, 4)),)


@every_kind
def test_embeddings_of_unknown_origin_are_refused_and_a_mask_describes_them(kind: Kind) -> None:
    stock, model = build(kind), yopo.apply(build(kind), a_plan())
    # (Positions, since some of stock's Qwen2.5-VL count them from ids alone.)
    embeds = dict(inputs_embeds=torch.randn(1, 6, 32), position_ids=torch.arange(6)[None])
    with pytest.raises(ValueError, match="nothing is known of these inputs_embeds"):
        run(model, embeds)
    with during(told(torch.zeros(1, 6, dtype=torch.bool), None)):
        found = run(model, embeds)
    same(found, run(stock, embeds))
    mask = torch.tensor([[False, True, True, True, True, False]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with during(told(mask, None)):
            described = run(model, embeds)
    assert not torch.equal(described.logits, found.logits)
    inner = model if "lm_head" not in model._modules or "visual" in model._modules else model.model
    if "visual" in model._modules or inner is not model:  # whose forward takes visual_mask itself
        states = run(inner, embeds, visual_mask=mask)[0]
        states = states if inner is model else head_of(model)(states)
        assert torch.equal(states, described.logits)


@every_kind
def test_images_with_embeddings_for_text_are_found_by_their_embedding(kind: Kind) -> None:
    model = build(kind)
    batch = make(kind, [[("text", 2), ("image", 0), ("text", 2)]])
    inputs = batch.inputs(model)
    dense = run(model, inputs).logits
    expected = run(yopo.apply(model, a_plan()), inputs).logits
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = stack_of(model).embed_tokens(ids).detach()
    try:
        same_way = torch.equal(run(yopo.remove(model), inputs).logits, dense)
    except (ValueError, IndexError, TypeError) as error:
        pytest.skip(f"stock does not take both: {error}")
    if not same_way:
        pytest.skip("stock passes the pixels over")
    assert torch.equal(run(yopo.apply(model, a_plan()), inputs).logits, expected)


@every_kind
def test_flash_attention_that_is_not_installed_is_refused(kind: Kind) -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    model = build(kind)
    stack_of(model).config._attn_implementation = "flash_attention_2"
    with pytest.raises(ImportError, match="flash-attn is not installed: load it with"):
        yopo.apply(model, a_plan())


class Replaced(nn.Module):
    """A linear as quantisers put it in: no weight that could be sliced."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.held = [linear]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


@every_kind
def test_replaced_linears_are_called_whole(kind: Kind) -> None:
    model = build(kind)
    batch = make(kind, mixed(kind))
    fed = into_stack(model, batch.inputs(model))
    expected = truth(model, a_plan(), batch, fed).logits
    for layer in stack_of(model).layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part._modules.items()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, Replaced(module))
    found = run(yopo.apply(model, a_plan()), batch.inputs(model)).logits
    check(found, expected, batch.mask.bool())


@every_kind
def test_fused_layers_are_refused_by_name(kind: Kind) -> None:
    class QuantAttentionFused(nn.Module):
        pass

    model = build(kind)
    model.config.quantization_config = {"quant_method": "awq"}
    stack_of(model).layers[0].self_attn = QuantAttentionFused()
    with pytest.raises(TypeError, match="QuantAttentionFused without .*awq"):
        yopo.apply(model, a_plan())


@pytest.mark.parametrize("text", ["qwen3", "gemma2"])
def test_another_text_model_is_refused_by_name(text: str) -> None:
    kind = KINDS["internvl-llama"]
    if not kind.exists or not hasattr(transformers, f"{text.capitalize()}Model"):
        pytest.skip(f"no InternVL, or no {text}, on this transformers")
    cls = getattr(transformers, kind.cls)
    model = cls(config(replace(kind, text=text), head_dim=8))
    with pytest.raises(TypeError, match=f"is a {text.capitalize()}Model; yopo computes LlamaModel"):
        yopo.apply(model, a_plan())


def test_norms_of_queries_and_keys_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should somebody list a text model that has them."""
    kind = KINDS["internvl-llama"]
    if not kind.exists or not hasattr(transformers, "Qwen3Model"):
        pytest.skip("no InternVL, or no qwen3, on this transformers")
    monkeypatch.setattr(families, "TEXT_STACKS", ("Qwen3Model",))
    model = getattr(transformers, kind.cls)(config(replace(kind, text="qwen3"), head_dim=8))
    with pytest.raises(TypeError, match="Qwen3Attention .* has .'k_norm', 'q_norm'"):
        yopo.apply(model, a_plan())


def test_another_family_gets_the_list_of_those_known() -> None:
    settings = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    with pytest.raises(TypeError, match="cannot prune a GPT2LMHeadModel; it knows") as refusal:
        yopo.apply(transformers.GPT2LMHeadModel(settings), a_plan())
    for name in {kind.cls for kind in KINDS.values()}:
        assert name in str(refusal.value)
    assert "docs/adding-a-family.md" in str(refusal.value)
    assert (Path(__file__).parents[2] / "docs/adding-a-family.md").exists()


def test_the_family_of_the_documentation_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/adding-a-family.md by doing it: its two blocks of code, and the oracle."""
    text = (Path(__file__).parents[2] / "docs/adding-a-family.md").read_text(encoding="utf-8")
    file, entry = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = ModuleType("yopo.models.families.vipllava")
    exec(file, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(families, "MODULES", dict(families.MODULES))
    exec(entry, vars(families))

    kind = KINDS["llava-llama"]
    alike = config(kind)
    settings = transformers.VipLlavaConfig(
        text_config=alike.text_config,
        vision_config=alike.vision_config,
        image_token_index=IMAGE,
        image_seq_length=1,
        vision_feature_layers=[-2, -1],
    )
    torch.manual_seed(0)
    model = transformers.VipLlavaForConditionalGeneration(settings).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 8
    compare(model, a_plan(), make(kind, mixed(kind), pads=[(1, 0)] * 3))


@pytest.mark.parametrize("name", ["llava-mistral", "internvl-phi3"])
def test_a_sequence_longer_than_the_sliding_window_is_refused(name: str) -> None:
    if name not in HERE:
        pytest.skip(f"no {name} on this transformers")
    kind = KINDS[name]
    model = build(kind)
    stack_of(model).config.sliding_window = 24
    compare(model, a_plan(), make(kind, [[("text", 2), ("image", 0), ("text", 2)]]))
    yopo.apply(model, a_plan())
    long = make(kind, [[("text", 9), ("image", 0), ("text", 9)]])
    with pytest.raises(ValueError, match="sliding_window 24"):
        run(model, long.inputs(model))


@torch.no_grad()
@pytest.mark.parametrize("original", [16, 256], ids=["long factors", "short factors"])
def test_long_rotary_factors_are_the_installed_ones(original: int) -> None:
    """Phi-3's: under a plan that keeps everything, the dense model's logits and decode step."""
    if "internvl-phi3" not in HERE:
        pytest.skip("no InternVL on this transformers")
    kind = KINDS["internvl-phi3"]
    factors = dict(type="longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 4.0])
    settings = config(kind, rope_scaling=factors, original_max_position_embeddings=original)
    model = getattr(transformers, kind.cls)(settings).eval()
    model.load_state_dict(build(kind).state_dict(), strict=False)
    batch = make(kind, [[("text", 3), ("image", 0), ("text", 4)]])
    inputs = batch.inputs(model)
    found = []
    for plan in (None, PruningPlan(torch.ones(LAYERS, HEADS))):
        if plan is not None:
            yopo.apply(model, plan)
        out = model(**inputs, use_cache=True)
        step = model(**later(model, inputs, torch.tensor([[20]]), out.past_key_values))
        found.append(torch.cat([out.logits, step.logits], 1))
    check(found[1], found[0].double(), torch.ones(found[0].shape[:2], dtype=torch.bool))


def test_dropout_that_the_pass_lacks_is_refused_in_training() -> None:
    if "internvl-phi3" not in HERE:
        pytest.skip("no InternVL on this transformers")
    kind = KINDS["internvl-phi3"]
    model = yopo.apply(build(kind), a_plan())
    stack_of(model).layers[0].resid_mlp_dropout.p = 0.1
    batch = make(kind, [[("text", 2), ("image", 0), ("text", 2)]])
    run(model, batch.inputs(model))
    with pytest.raises(ValueError, match="resid_pdrop"):
        run(model.train(), batch.inputs(model))


def test_gqa_groups_split_by_a_mask_are_stored_in_both() -> None:
    """Query heads 0 and 1 share a key/value head; only one of them reads the image."""
    kind = KINDS["qwen2_vl"]
    keep = torch.tensor([[1, 0, 0, 1]] * LAYERS)
    for masses in (("exact", "drop"), ("drop", "drop")):
        plan = PruningPlan(keep, layer_cut=2, head_mass=masses[0], cut_mass=masses[1])
        compare(build(kind), plan, make(kind, mixed(kind), pads=[(1, 0)] * 4))


def test_generate_on_the_tail_uses_what_the_prompt_left() -> None:
    """visual_inputs and later are helpers of these tests; that they agree with stock's own steps
    is checked here, or a mistake in them would pass for one of ours."""
    kind = KINDS["qwen2_vl"]
    model = build(kind)
    prompt = make(kind, [[("text", 3), ("image", 2), ("text", 3)]])
    inputs = prompt.inputs(model)
    out = run(model, inputs, past_key_values=transformers.DynamicCache(), use_cache=True)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    after = run(model, later(model, inputs, token, out.past_key_values)).logits[:, -1].argmax(-1)
    plain = prompt.inputs(model, positions=False)
    found = model.generate(**plain, max_new_tokens=2, do_sample=False)[0, -2:]
    assert torch.equal(found, torch.stack([token[0, 0], after[0]]))
    assert visual_inputs(kind, []) == {} and places(kind, (1, 4, 6))[0] == ((2, 3),)


def test_images_given_again_to_a_cache_that_has_them_are_refused_with_the_remedy() -> None:
    kind = KINDS["llava-llama"]
    model = yopo.apply(build(kind), a_plan())
    batch = make(kind, [[("text", 2), ("image", 0), ("text", 2)]])
    given = batch.inputs(model)
    past = run(model, given, use_cache=True)
    cache = getattr(past, CACHE_FIELD)
    new = torch.tensor([[20, 21]])
    mask = torch.ones(1, given["input_ids"].shape[1] + 2, dtype=torch.long)
    given = {**given, "input_ids": new, "attention_mask": mask, CACHE_FIELD: cache}
    given.pop("position_ids", None)
    with pytest.raises(ValueError, match="leave the images"):
        run(model, given)
