"""Bytes counted, against caches that were filled and models that were built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import ROWS, SHAPE, build, cases, make_case, plans, shapes

from yopo.counting.flops import count
from yopo.counting.footprint import KVBytes, kv_bytes, weight_bytes
from yopo.counting.pairs import useful
from yopo.counting.presets import Shape
from yopo.engine.forward import packings
from yopo.engine.layout import VisualLayout
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import read_stock_cache


def shape_of(config: Any, **more: Any) -> Shape:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size")  # fmt: skip
    return Shape(*(getattr(config, name) for name in names), (1, 1), **more)


@given(data=st.data())
@settings(max_examples=60)
def test_kv_bytes_are_those_of_the_cache_that_a_run_fills(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    case = data.draw(cases(shape.heads * 8))
    assume(case.visual.any())
    batch = case.shape[0]
    model = build(shape, plan)
    with torch.no_grad():
        cache = model(**case.kwargs(), use_cache=True).past_key_values
    text, visual = packings(VisualLayout.from_mask(case.visual, case.grids), case.valid, 0)
    sizes = shape_of(shape.config())
    counted = kv_bytes(sizes, plan, text.width, visual.width, batch, itemsize=4)
    assert sum(layer.filled for layer in counted) == cache.nbytes()
    assert sum(layer.visual for layer in counted) == cache.nbytes(visual_only=True)
    allocated = sum(store.allocated() for pair in cache.stores for store in pair)
    assert sum(layer.filled + layer.room for layer in counted) == allocated
    mask = torch.cat([case.valid, torch.ones(batch, 1, dtype=torch.bool)], 1).long()
    with torch.no_grad():
        token = torch.zeros(batch, 1, dtype=torch.long)
        model(input_ids=token, attention_mask=mask, past_key_values=cache)
    longer = kv_bytes(sizes, plan, text.width + 1, visual.width, batch, itemsize=4)
    assert sum(layer.filled for layer in longer) == cache.nbytes()


def test_dense_kv_bytes_are_stocks() -> None:
    case = make_case(ROWS[:1], SHAPE.heads * 8)
    with torch.no_grad():
        cache = build(SHAPE)(inputs_embeds=case.inputs_embeds, use_cache=True).past_key_values
    held = [4 * (keys.numel() + values.numel()) for keys, values in read_stock_cache(cache)]
    counted = kv_bytes(shape_of(SHAPE.config()), None, 5, 6, itemsize=4)
    assert [layer.filled for layer in counted] == held
    assert counted[0] == KVBytes(2 * 5 * 2 * 8 * 4, 2 * 6 * 2 * 8 * 4, 0)


BASE = dict(hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, vocab_size=50)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told", "fields"),
    [
        ("Llama", {}, {}),
        ("Llama", {"tie_word_embeddings": True}, {"tied": True}),
        ("Llama", {"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
        ("Qwen2", {"tie_word_embeddings": False}, {"qkv_bias": True}),
        ("Phi3", {"pad_token_id": 0}, {}),
    ],
)
def test_all_weights_are_those_of_the_model(
    name: str, told: dict[str, Any], fields: dict[str, Any]
) -> None:
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"no {name} in this transformers")
    config = getattr(transformers, f"{name}Config")(**BASE, **told)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    held = sum(p.numel() * 2 for p in model.parameters())
    counted = weight_bytes(shape_of(config, **fields), None, itemsize=2)
    assert counted.total == held
    embedding = 0 if config.tie_word_embeddings else 50 * 48 * 2
    assert counted.forward == held - embedding


@given(data=st.data())
@settings(max_examples=60)
def test_weights_of_visual_rows_follow_from_their_products(data: st.DataObject) -> None:
    """Two FLOPs for each weight and row."""
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    layout = VisualLayout.from_mask(torch.tensor([[False, True, False]]), [[(1, 1)]])
    sizes = shape_of(shape.config())
    layers = count(sizes, plan, useful(layout, torch.ones(1, 3, dtype=torch.bool)))
    products = sum(layer.visual_projections + layer.visual_ffn for layer in layers)
    counted = weight_bytes(sizes, plan, itemsize=2)
    assert counted.visual == products
    assert counted.total == weight_bytes(sizes, None, itemsize=2).total


def test_a_key_head_that_seeing_and_blind_heads_share_is_held_once() -> None:
    sizes = Shape(32, 24, 1, 4, 1, 31, (1, 1))
    plan = PruningPlan(torch.tensor([[1, 0, 0, 0]]), head_mass="exact")
    assert weight_bytes(sizes, plan, 1).visual == 32 * (8 * (1 + 1 + 1 + 1) + 3 * 24)
    assert kv_bytes(sizes, plan, 1, 1, itemsize=1)[0].visual == 8 * 2
    assert kv_bytes(sizes, plan, 1, 1, itemsize=1)[0].text == 8 * 2
