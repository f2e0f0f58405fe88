"""Counted FLOPs: what a counter of products sees the engine do, the paper's tables, and limits in
which the count is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import (
    HEAD_DIM,
    KEEP,
    ROWS,
    SHAPE,
    Case,
    Shape,
    a_plan,
    build,
    cases,
    left_padded,
    make_case,
    plans,
    shapes,
)
from torch.utils._python_dispatch import TorchDispatchMode

from yopo.counting.flops import (
    LayerFlops,
    Prompt,
    count,
    decode_flops,
    lm_head_flops,
    paper_tflops,
    prefill_flops,
)
from yopo.counting.pairs import executed, executed_step, stock, stock_step
from yopo.counting.presets import PRESETS
from yopo.engine.forward import prepare
from yopo.engine.layer_plan import LayerPlans
from yopo.engine.layout import VisualLayout
from yopo.engine.text_attention import Sight
from yopo.engine.visual_cache import VisualCache
from yopo.plan import recipes
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks
from yopo.versions import CACHE_FIELD

PROMPT = Prompt(35, ((24, 24),), 25)


# ---------------------------------------------------------------------- against torch's counter


class Products(TorchDispatchMode):
    """Counts the FLOPs of products. torch's FlopCounterMode watches every module meanwhile, and the
    engine slices no projection that is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = self.batched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.plain += 2 * out.numel() * args[name == "addmm"].shape[-1]
        elif name in ("bmm", "baddbmm"):
            self.batched += 2 * out.numel() * args[name == "baddbmm"].shape[-1]
        return out


@contextmanager
def measured(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Yields a list that gets, decoder layer by decoder layer, the FLOPs of 2-D and of batched
    products. The first are projections and FFN, the second attention, SDPA in its plain form."""
    attention = pytest.importorskip("torch.nn.attention")
    seen: list[tuple[int, int]] = []
    counter = Products()

    def enter(*_: Any) -> None:
        counter.plain = counter.batched = 0

    def leave(*_: Any) -> None:
        seen.append((counter.plain, counter.batched))

    hooks = []
    for layer in model.model.layers:
        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    with torch.no_grad(), attention.sdpa_kernel(attention.SDPBackend.MATH), counter:
        yield seen
    for hook in hooks:
        hook.remove()


def split(layers: list[LayerFlops]) -> list[tuple[int, int]]:
    """(projections and FFN, attention) of each layer."""
    attention = [layer.text_attention + layer.visual_attention for layer in layers]
    return [(layer.total - a, a) for layer, a in zip(layers, attention, strict=True)]


def shape_of(shape: Shape) -> Any:
    config = shape.config()
    config.head_dim = config.hidden_size // config.num_attention_heads  # absent in old versions
    return config


def of_sinks(config: Any, plan: PruningPlan, case: Case, layout: VisualLayout) -> list[int]:
    """What is left out of the count: the sink's key and the 8 features more that heads with one
    have in a prefill of several text queries (text_attention.py)."""
    cache = VisualCache.adopt(None, plan, case.shape[0], case.valid[:, :0], [])
    index = prepare(layout, case.valid, cache, plan)
    batch, width = case.shape[0], index.text.width
    if width < 2:
        return [0] * plan.num_layers
    queries = width + index.text_sight.causal
    padded = queries * (width + 1) * (HEAD_DIM + 8) - width * width * HEAD_DIM
    per_layer = []
    for layer in LayerPlans.build(config, plan).plans:
        groups = [group for group in layer.text if group.sight is Sight.SINK]
        heads = sum(plan.num_heads if group.q is None else len(group.q) for group in groups)
        per_layer.append(2 * 2 * batch * heads * padded)
    return per_layer


def check_engine(shape: Shape, plan: PruningPlan, case: Case) -> None:
    model, config = build(shape, plan), shape_of(shape)
    layout = VisualLayout.from_mask(case.visual, case.grids)
    batch = case.shape[0]
    with measured(model) as seen:
        cache = getattr(model.model(**case.kwargs(), use_cache=True), CACHE_FIELD)
    counted = split(count(config, plan, executed(layout, case.valid, plan)))
    sinks = of_sinks(config, plan, case, layout)
    assert seen == [(a, b + more) for (a, b), more in zip(counted, sinks, strict=True)]
    mask = torch.cat([case.valid, torch.ones(batch, 1, dtype=torch.bool)], 1).long()
    token = torch.zeros(batch, 1, dtype=torch.long)
    with measured(model) as seen:
        model.model(input_ids=token, attention_mask=mask, **{CACHE_FIELD: cache})
    assert seen == split(count(config, plan, executed_step(layout, case.valid)))


@given(data=st.data())
@settings(max_examples=150)
def test_the_count_is_what_the_engine_executes(data: st.DataObject) -> None:
    """Random plans, per layer too, mass modes, GQA, batches, padding, several images; prefill and
    decode."""
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    case = data.draw(cases(shape.heads * 8))
    assume(case.visual.any())
    check_engine(shape, plan, case)


@pytest.mark.parametrize("window", [None, 3])
def test_more_cells_than_one_block_or_band(window: int | None) -> None:
    """A grid of 18 × 17 needs five bands with a window, two blocks of queries without one."""
    shape = Shape(2, 2, 1)
    plan = PruningPlan(
        torch.tensor([[1, 0], [0, 1]]), window=window, head_mass="exact", cut_mass="exact"
    )
    for rows in (
        [[("text", 2), ("image", 18, 17, False), ("text", 3)]],
        [[("image", 18, 17, False), ("text", 1)], [("text", 5), ("image", 3, 3, False)]],
    ):
        check_engine(shape, plan, make_case(rows, shape.heads * 8))


def test_the_dense_count_is_what_stock_executes() -> None:
    config, case = shape_of(SHAPE), left_padded()
    layout = VisualLayout.from_mask(case.visual, case.grids)
    model = build(SHAPE)
    with measured(model) as seen:
        told = {"inputs_embeds": case.inputs_embeds, "attention_mask": case.attention_mask}
        cache = getattr(model.model(**told, use_cache=True), CACHE_FIELD)
    assert seen == split(count(config, None, stock(layout)))
    mask = torch.cat([case.attention_mask, torch.ones(len(ROWS), 1, dtype=torch.long)], 1)
    token = torch.zeros(len(ROWS), 1, dtype=torch.long)
    with measured(model) as seen:
        model.model(input_ids=token, attention_mask=mask, **{CACHE_FIELD: cache})
    assert seen == split(count(config, None, stock_step(layout)))


def test_logits_of_the_last_position_are_one_product() -> None:
    model, case = build(SHAPE), left_padded(ROWS[:1])
    with torch.no_grad(), Products() as counter:
        model.lm_head(case.inputs_embeds[:, -1])
    assert counter.plain == lm_head_flops(SHAPE.config(), 1)


@pytest.mark.parametrize("mass", ["exact", "drop"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_only_attention_is_executed_beyond_what_is_useful(
    mass: str, window: int | None, batch: int
) -> None:
    """Without padding, projections and FFN are the same in both counts, and a decode step is."""
    plan, prompt = a_plan(mass, mass, window=window), Prompt(3, ((9, 5), (2, 2)), 2)
    layout = prompt.layout(batch)
    valid = torch.ones(layout.shape, dtype=torch.bool)
    config = shape_of(SHAPE)
    needed = prefill_flops(config, prompt, plan, batch)
    done = count(config, plan, executed(layout, valid, plan))
    for ours, theirs in zip(needed, done, strict=True):
        assert split([ours])[0][0] == split([theirs])[0][0]
        assert ours.text_attention < theirs.text_attention
        assert ours.visual_attention <= theirs.visual_attention
    step = count(config, plan, executed_step(layout, valid))
    assert decode_flops(config, prompt, plan, batch) == step


# --------------------------------------------------------------------------- the paper's figures


@pytest.mark.parametrize(
    ("preset", "dense", "quarter"), [("llava-1.5-7b", 7.63, 1.91), ("llava-1.5-13b", 14.89, 3.72)]
)
def test_paper_table(preset: str, dense: float, quarter: float) -> None:
    shape = PRESETS[preset]
    assert round(paper_tflops(shape, 576), 2) == dense
    plan = recipes.paper_25(shape.num_hidden_layers, shape.num_attention_heads)
    assert round(paper_tflops(shape, 576, plan), 2) == quarter


@pytest.mark.parametrize(
    ("preset", "ffn", "published", "own"),
    [
        ("internvl2-4b", 8192, 25.68, 25.68),
        ("internvl2-8b", 11008, 44.25, 52.21),  # LLaMA-7B's FFN, not its own 14336
        ("internvl2-26b", 13824, 129.4, 143.2),  # LLaMA-13B's, not its own 16384
    ],
)
def test_paper_dense_figures_of_other_models_share_a_number_of_tokens(
    preset: str, ffn: int, published: float, own: float
) -> None:
    shape, digits = replace(PRESETS[preset], intermediate_size=ffn), 1 if own > 100 else 2
    assert round(paper_tflops(shape, 3041.7), digits) == published
    assert round(paper_tflops(PRESETS[preset], 3041.7), digits) == own


def test_paper_pruned_figures_of_other_models_that_a_layer_cut_gives() -> None:
    """24 of 32 layers are InternVL2-8B's 33.19, 24 of 48 InternVL2-26B's 64.7; no cut alone gives
    Qwen2-VL-7B's 30.51 or InternVL2-4B's 18.42."""

    def cuts(preset: str, ffn: int) -> list[float]:
        shape = replace(PRESETS[preset], intermediate_size=ffn)
        layers, heads = shape.num_hidden_layers, shape.num_attention_heads
        keep = torch.ones(layers, heads, dtype=torch.bool)
        plans = [PruningPlan(keep, layer_cut=cut) for cut in range(layers + 1)]
        return [round(paper_tflops(shape, 3041.7, plan), 2) for plan in plans]

    assert cuts("internvl2-8b", 11008)[24] == 33.19
    assert round(cuts("internvl2-26b", 13824)[24], 1) == 64.7
    assert 30.51 not in cuts("internvl2-8b", 11008)
    assert 18.42 not in cuts("internvl2-4b", 8192)


# ---------------------------------------------------------------------------------- known limits


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mass", ["exact", "drop"])
def test_a_plan_that_prunes_nothing_counts_as_dense(preset: str, mass: str) -> None:
    shape = PRESETS[preset]
    keep = torch.ones(shape.num_hidden_layers, shape.num_attention_heads, dtype=torch.bool)
    nothing = PruningPlan(keep, head_mass=mass, cut_mass=mass)
    assert prefill_flops(shape, PROMPT, nothing) == prefill_flops(shape, PROMPT)
    assert decode_flops(shape, PROMPT, nothing) == decode_flops(shape, PROMPT)


def test_dense_by_hand() -> None:
    """3 text tokens, 2 visual ones, 1 text: 21 pairs, of which 3 + 4 are the visual queries'."""
    shape = PRESETS["internvl2-8b"]
    layer = prefill_flops(shape, Prompt(3, ((1, 2),), 1))[0]
    heads, kv, dim = 32, 8, 128
    assert layer.visual_projections == 2 * 2 * 4096 * dim * (2 * heads + 2 * kv)
    assert layer.text_ffn == 2 * layer.visual_ffn == 4 * 2 * 3 * 4096 * 14336
    assert layer.visual_attention == 4 * heads * dim * (4 + 5)
    assert layer.text_attention == 4 * heads * dim * (1 + 2 + 3 + 6)
    assert decode_flops(shape, Prompt(3, ((1, 2),), 1))[0].text_attention == 4 * heads * dim * 7


def test_everything_cut_and_dropped_counts_the_text_alone() -> None:
    shape = PRESETS["llava-1.5-7b"]
    keep = torch.zeros(32, 32, dtype=torch.bool)
    plan = PruningPlan(keep, layer_cut=0, head_mass="drop", cut_mass="drop")
    assert prefill_flops(shape, PROMPT, plan) == prefill_flops(shape, Prompt(35, (), 25))


def test_window_counts_the_pairs_that_see_each_other() -> None:
    """By hand on a 2 × 3 grid, window 3: every row pair, and 7 of 9 column pairs."""
    shape = PRESETS["llava-1.5-7b"]
    keep = torch.ones(32, 32, dtype=torch.bool)
    for causal, pairs in ((False, 4 * 7), (True, (4 * 7 + 6) / 2)):
        plan = PruningPlan(keep, window=3, window_causal=causal)
        layer = prefill_flops(shape, Prompt(0, ((2, 3),), 1), plan)[0]
        assert layer.visual_attention == 4 * 4096 * pairs


def test_ideal_ratios_of_the_named_plans() -> None:
    shape = PRESETS["llava-1.5-7b"]
    dense = sum(layer.total for layer in prefill_flops(shape, PROMPT))
    for recipe, mass, ratio in (
        (recipes.paper_25, "drop", 3.15),
        (recipes.paper_12, "drop", 4.87),
        (recipes.paper_25, "exact", 1.91),
        (recipes.paper_25, "exact/drop", 2.97),
    ):
        plan = recipe(32, 32).with_mass(mass)
        pruned = sum(layer.total for layer in prefill_flops(shape, PROMPT, plan))
        assert dense / pruned == pytest.approx(ratio, abs=0.01)


def test_layers_of_a_plan_per_layer_count_what_each_says() -> None:
    """By hand on a 2 × 3 grid: dense, frozen, untouched, without attention, without FFN, gone."""
    shape = replace(PRESETS["llava-1.5-7b"], num_hidden_layers=6)
    keep = torch.ones(6, 32, dtype=torch.bool)
    keep[[2, 5]] = False
    plan = PruningPlan(
        keep,
        window=[None, 3, 3, 3, 3, None],
        ffn=[None, 0, 0, 11, 0, None],
        visual_attention=[True, False, False, False, True, True],
        head_mass="drop",
        cut_mass="drop",
    )
    layers = prefill_flops(shape, Prompt(0, ((2, 3),), 1), plan)
    d, product = 4096, 2 * 4096 * 4096
    visual = [(x.visual_projections, x.visual_attention, x.visual_ffn) for x in layers]
    assert visual == [
        (6 * 4 * product, 4 * d * 21, 6 * 6 * d * 11008),
        (6 * 2 * product, 0, 0),
        (0, 0, 0),
        (6 * 2 * product, 0, 6 * 6 * d * 11),
        (6 * 4 * product, 4 * d * 4 * 7, 0),
        (0, 0, 0),
    ]
    assert [x.text_attention for x in layers] == [4 * d * n for n in (7, 7, 1, 7, 7, 1)]


@pytest.mark.parametrize("b", [None, torch.zeros(32, 32, 128)])
def test_a_sink_costs_the_logit_of_each_text_query_beyond_drop(b: torch.Tensor | None) -> None:
    shape, plan = PRESETS["llava-1.5-7b"], recipes.paper_25(32, 32)
    plan = replace(plan, sinks=Sinks(torch.zeros(32, 32), b))
    ours, drop = (prefill_flops(shape, PROMPT, plan.with_mass(mass)) for mass in ("sink", "drop"))
    blind = 32 - plan.head_keep.sum(1) * (torch.arange(32) < plan.layer_cut)
    more = [0 if b is None else 60 * 2 * 128 * int(heads) for heads in blind]
    assert [x.total - y.total for x, y in zip(ours, drop, strict=True)] == more


def test_a_batch_counts_its_rows() -> None:
    plan = a_plan("exact", "drop")
    one = prefill_flops(shape_of(SHAPE), PROMPT, plan)
    three = prefill_flops(shape_of(SHAPE), PROMPT, plan, batch=3)
    assert [3 * layer.total for layer in one] == [layer.total for layer in three]
    assert len(one) == len(KEEP)
