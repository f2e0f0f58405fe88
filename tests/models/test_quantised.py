"""Quantised projections (bitsandbytes, torchao): called whole, never fused, and right: what a pass
gives is what the oracle says of the same weights, dequantised."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from family_checks import a_plan as a_family_plan
from family_photos import one_photo
from layouts import Case, Shape, build, make_case, random_sinks
from oracle import oracle_forward
from random_families import HERE, KINDS
from random_families import build as build_family
from tiny_processors import VOCAB
from torch import Tensor, nn

import yopo
from yopo.engine.forward import execution_device
from yopo.models.fused_weights import fused_layers
from yopo.plan.pruning_plan import MASSES, PruningPlan
from yopo.versions import CACHE_FIELD, has_rms_norm

pytestmark = pytest.mark.skipif(not has_rms_norm(), reason="fused weights need torch 2.4")
SHAPE = Shape(layers=3, heads=8, kv_heads=4, intermediate=128)
KEEP = torch.rand(3, 8, generator=torch.Generator().manual_seed(3)) > 0.5
ROWS = [
    [("text", 2), ("image", 3, 3, False), ("text", 3)],
    [("text", 1), ("image", 2, 2, False), ("text", 4)],
]
NAMES = ("int8 of bitsandbytes", "nf4", "fp4, twice", "int8 of torchao", "int4 of torchao")


def a_plan(mass: str = "drop") -> PruningPlan:
    sinks = random_sinks(SHAPE, 0, True) if mass == "sink" else None
    how = dict(window=3, layer_cut=2, ffn_ratio=2, head_mass=mass, cut_mass=mass, sinks=sinks)
    return PruningPlan(KEEP, **how)


def a_case() -> Case:
    return make_case(ROWS, SHAPE.heads * 8, pads=[(1, 0)] * 2)


def scheme(name: str) -> Any:
    """What from_pretrained takes for a kind of quantisation."""
    if "torchao" in name:
        if importlib.util.find_spec("torchao") is None:
            pytest.skip("torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

        made = Int8WeightOnlyConfig() if "int8" in name else IntxWeightOnlyConfig(torch.int4)
        return transformers.TorchAoConfig(made)
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    if name == "int8 of bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    how = dict(bnb_4bit_quant_type=name[:3], bnb_4bit_use_double_quant="twice" in name)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **how
    )


def loaded(folder: Path, name: str, plan: PruningPlan | None, **more: Any) -> Any:
    """With yopo.patch in: pruned as it is loaded, if there is a plan in its config."""
    build(SHAPE, plan).save_pretrained(folder)
    given = dict(quantization_config=scheme(name), dtype=torch.float32, device_map="cpu") | more
    model = transformers.LlamaForCausalLM.from_pretrained(folder, **given).eval()
    assert yopo.plan_of(model) == plan
    return model


def quantised(model: Any) -> Any:
    """In place, as torchao does it to any model in hand."""
    scheme("int8 of torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


def plain(model: Any) -> Any:
    """A model with the same weights, dequantised."""
    twin = build(SHAPE)
    for name, mine in twin.named_modules():
        if isinstance(mine, nn.Linear):
            module = model.get_submodule(name)
            mine.weight.data = _dequantised(module).detach().float().clone()
    return twin


def _dequantised(module: Any) -> Tensor:
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if type(module).__name__ == "Linear8bitLt":
        held = weight if weight.SCB is not None else module.state
        return held.CB.float() * held.SCB.float()[:, None] / 127
    return weight.data if type(weight) is nn.Parameter else weight.dequantize()


@torch.no_grad()
def check(model: Any, plan: PruningPlan, loose: bool = False) -> None:
    """Prefill and decode against the oracle. loose: inputs are rounded to int8, too."""
    case, twin = a_case(), plain(model)
    tokens = torch.tensor([[3, 4]] * 2)
    embeds = torch.cat([case.inputs_embeds, twin.model.embed_tokens(tokens)], 1)
    mask = torch.cat([case.valid.long(), torch.ones_like(tokens)], 1)
    pad = {"visual": False, "image": -1, "row": -1, "col": -1}
    longer = SimpleNamespace(
        **{k: nn.functional.pad(getattr(case.layout, k), (0, 2), value=v) for k, v in pad.items()}
    )
    truth = oracle_forward(twin, plan, embeds, longer, mask).logits
    out = model(**(case.kwargs() | {"position_ids": None}), use_cache=True)
    logits, past = [out.logits], getattr(out, CACHE_FIELD)
    for step in range(2):
        given = {"input_ids": tokens[:, step : step + 1], CACHE_FIELD: past, "use_cache": True}
        end = mask.shape[1] - 1 + step
        logits.append(model(**given, attention_mask=mask[:, :end]).logits)
    worst = (torch.cat(logits, 1) - truth)[mask.bool()].abs().max() / truth.abs().max()
    assert worst < (0.05 if loose else 1e-5)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mass", MASSES)
def test_loaded_with_a_plan_stays_live_says_so_once_and_is_right(
    name: str, mass: str, tmp_path: Path
) -> None:
    plan = a_plan(mass)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = loaded(tmp_path, name, plan)
        check(model, plan, name == NAMES[0])
    lines = [str(one.message) for one in said if "not fused" in str(one.message)]
    assert len(lines) == 1 and "q_proj" in lines[0] and "quantised" in lines[0]
    rows = model.model.embed_tokens(torch.tensor([[1]]))
    with torch.no_grad():
        assert fused_layers(model.model, rows) == [None] * SHAPE.layers


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_on_a_quantised_model_is_right_and_fusing_it_is_refused(
    name: str, tmp_path: Path
) -> None:
    plan, model = a_plan(), loaded(tmp_path, name, None)
    words = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = model(words).logits
        yopo.apply(model, plan)
        check(model, plan, name == NAMES[0])
        for make in (yopo.fuse, yopo.graphed):
            with pytest.raises(ValueError, match="layer 0 cannot be fused.*q_proj.*quantised"):
                make(model)
            assert not model.model.yopo_fused and model.model._yopo_graphs is None
        check(model, plan, name == NAMES[0])
        assert torch.equal(model(words).logits, before)
        assert torch.equal(yopo.remove(model)(words).logits, before)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("name", NAMES[:2])
def test_what_is_asked_for_by_name_is_refused_where_it_is_loaded(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be fused"):
        loaded(tmp_path, name, a_plan(), fuse=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not fused")
        check(loaded(tmp_path, name, a_plan(), fuse=False), a_plan(), name == NAMES[0])


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("name", NAMES[:3])
def test_saved_and_loaded_again_it_is_the_same(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path / "plain", name, a_plan(), fuse=False)
    model.save_pretrained(tmp_path / "quantised")
    again = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "quantised", dtype=torch.float32, device_map="cpu", fuse=False
    )
    assert yopo.plan_of(again) == a_plan()
    with torch.no_grad():
        ours, theirs = (m.eval()(**a_case().kwargs()).logits for m in (model, again))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", ["live", "fused", "graphed"])
def test_quantised_in_place_after_the_plan_whatever_it_went_by(way: str) -> None:
    plan, case = a_plan(), a_case()
    model = build(SHAPE, plan)
    if way != "live":
        getattr(yopo, {"fused": "fuse"}.get(way, way))(model)
    with torch.no_grad():
        model(**case.kwargs(), use_cache=True)
        quantised(model)
        if way == "live":
            check(model, plan)
        else:
            with pytest.warns(UserWarning, match="q_proj are.*quantised.*: Int8Tensor"):
                check(model, plan)
        if way == "graphed":
            assert not model.model._yopo_graphs._captured  # nor what it held of the weights before
        assert all("_yopo_laid" not in vars(layer) for layer in model.model.layers)
        check(yopo.unfuse(model), plan)
        words = torch.tensor([[3, 4, 5]])
        expected = quantised(build(SHAPE))(words).logits
        assert torch.equal(yopo.remove(model)(words).logits, expected)


def test_a_copy_of_a_quantised_model_is_right() -> None:
    plan = a_plan()
    check(copy.deepcopy(yopo.apply(quantised(build(SHAPE)), plan)), plan)


def test_some_layers_quantised_the_others_fused() -> None:
    scheme("int8 of torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    plan = a_plan()
    model = yopo.fuse(build(SHAPE, plan))
    quantize_(model.model.layers[1], Int8WeightOnlyConfig())
    with pytest.warns(UserWarning, match="quantised"):
        check(model, plan)
    with torch.no_grad():
        each = fused_layers(model.model, model.model.embed_tokens(torch.tensor([[1]])))
    assert [one is None for one in each] == [False, True, False]


@pytest.mark.skipif("llava-llama" not in HERE, reason="families need a newer transformers")
@pytest.mark.parametrize("name", ["nf4", "int8 of torchao"])
def test_a_family_with_a_photograph(name: str, tmp_path: Path) -> None:
    kind = KINDS["llava-llama"]
    build_family(kind, VOCAB).save_pretrained(tmp_path)
    cls = getattr(transformers, kind.cls)
    model = cls.from_pretrained(
        tmp_path, quantization_config=scheme(name), dtype=torch.float32, device_map="cpu"
    ).eval()
    given, how = one_photo(kind), dict(max_new_tokens=4, do_sample=False)
    dense = model.generate(**given, **how)
    layers, heads = a_family_plan().head_keep.shape
    yopo.apply(model, PruningPlan(torch.ones(layers, heads)))
    assert torch.equal(model.generate(**given, **how), dense)
    yopo.apply(model, a_family_plan())
    found = model.generate(**given, **how, cache_implementation="static")
    assert torch.equal(found, model.generate(**given, **how))
    assert torch.equal(yopo.remove(model).generate(**given, **how), dense)


def test_a_layer_computes_where_its_plain_weights_lie() -> None:
    """Those that are quantised, or sharded, say less."""

    class Quantised(nn.Parameter):
        pass

    layer, elsewhere = nn.Module(), torch.device("cuda:3")
    layer.packed = Quantised(torch.ones(2), requires_grad=False)
    assert execution_device(layer, elsewhere) == elsewhere
    layer.norm = nn.Parameter(torch.ones(2))
    assert execution_device(layer, elsewhere) == torch.device("cpu")
