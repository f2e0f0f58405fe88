"""What a pruned model of each family computes: stock's bits where nothing is pruned, the oracle's
numbers where something is; in one pass, in steps, in batches."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_checks import (
    TOLERANCE,
    a_plan,
    check,
    compare,
    later,
    mixed,
    rows,
    run,
    same,
    truth,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Shape, plans
from oracle import oracle_forward, oracle_loss
from random_families import (
    FIRST_WORD,
    HEADS,
    HERE,
    KINDS,
    KV,
    LAYERS,
    NEURONS,
    VOCAB,
    Kind,
    angles,
    build,
    into_stack,
    make,
    seen_by_oracle,
    stack_of,
)
from torch import Tensor
from transformers import DynamicCache

import yopo
from yopo.plan.config_fields import head_dim
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

SHAPE = Shape(LAYERS, HEADS, KV, NEURONS)
MASSES = [("exact", "exact"), ("exact", "drop"), ("drop", "exact"), ("drop", "drop")]

pytestmark = pytest.mark.parametrize("kind", [pytest.param(KINDS[n], id=n) for n in HERE])


# ------------------------------------------------------------------------------- stock identity


@pytest.mark.feature("stock identity: no plan")
def test_without_a_plan_all_is_stocks(kind: Kind) -> None:
    """Also while yopo.patch is in, and after apply and remove."""
    stock = build(kind)
    import yopo.patch

    yopo.patch.undo()
    with yopo.patch.patched():
        ours = build(kind)
    assert yopo.plan_of(ours) is None
    removed = yopo.remove(yopo.apply(build(kind), a_plan()))
    assert type(removed) is type(stock) and removed.config.to_dict() == stock.config.to_dict()
    for pads in (None, [(1, 0)] * 4):
        batch = make(kind, mixed(kind), pads=pads and pads[: len(mixed(kind))])
        theirs = run(stock, batch.inputs(stock), output_hidden_states=True)
        same(run(ours, batch.inputs(ours), output_hidden_states=True), theirs)
        same(run(removed, batch.inputs(removed), output_hidden_states=True), theirs)


@pytest.mark.feature("stock identity: a plan, no image")
@pytest.mark.parametrize("side", [(1, 0), (0, 1)], ids=["left", "right"])
def test_with_a_plan_and_no_image_all_is_stocks(kind: Kind, side: tuple[int, int]) -> None:
    stock, ours = build(kind), yopo.apply(build(kind), a_plan())
    batch = make(kind, [[("text", 9)], [("text", 4)]], pads=[side] * 2)
    for positions in (True, False):
        theirs = run(stock, batch.inputs(stock, positions), output_hidden_states=True)
        same(run(ours, batch.inputs(ours, positions), output_hidden_states=True), theirs)
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    losses = [run(m, batch.inputs(m), labels=labels).loss for m in (ours, stock)]
    assert torch.equal(*losses)
    tokens = [
        m.generate(batch.ids[:1], attention_mask=batch.mask[:1], max_new_tokens=5, do_sample=False)
        for m in (ours, stock)
    ]
    assert torch.equal(*tokens)
    # Placeholders without images are words like any other.
    batch.ids[0, -3] = 5
    same(run(ours, batch.inputs(ours, False)), run(stock, batch.inputs(stock, False)))


@pytest.mark.feature("stock identity: a plan, no image")
def test_an_image_before_leaves_nothing_behind(kind: Kind) -> None:
    stock, ours = build(kind), yopo.apply(build(kind), a_plan())
    pictures, text = make(kind, mixed(kind)), make(kind, [[("text", 7)]])
    pruned = run(ours, pictures.inputs(ours)).logits
    assert not torch.equal(pruned, run(stock, pictures.inputs(stock)).logits)
    same(run(ours, text.inputs(ours)), run(stock, text.inputs(stock)))


# -------------------------------------------------------------------------------------- oracle


@pytest.mark.feature("oracle, every mass mode")
def test_random_batches_are_the_oracles(kind: Kind) -> None:
    model = build(kind)

    @settings(max_examples=80)
    @given(data=st.data())
    def search(data: st.DataObject) -> None:
        drawn = data.draw(rows(kind))
        share = st.sampled_from([(1, 0), (0, 1), (1, 1)])
        pads = data.draw(st.none() | st.lists(share, min_size=len(drawn), max_size=len(drawn)))
        batch = make(kind, drawn, pads=pads, seed=data.draw(st.integers(0, 99)))
        compare(model, data.draw(plans(SHAPE)), batch, data.draw(st.booleans()))

    search()


@pytest.mark.feature("oracle, every mass mode")
@pytest.mark.parametrize("masses", MASSES, ids="/".join)
@pytest.mark.parametrize("prune_visual_queries", [True, False])
def test_a_mixed_batch_is_the_oracles(
    kind: Kind, masses: tuple[str, str], prune_visual_queries: bool
) -> None:
    model, batch = build(kind), make(kind, mixed(kind), pads=[(1, 0)] * len(mixed(kind)))
    for cut in (0, 2, 3):
        plan = a_plan(
            layer_cut=cut,
            head_mass=masses[0],
            cut_mass=masses[1],
            prune_visual_queries=prune_visual_queries,
        )
        compare(model, plan, batch)


@pytest.mark.feature("oracle, every mass mode")
def test_sinks_and_plans_per_layer_are_the_oracles(kind: Kind) -> None:
    model = build(kind)
    generator = torch.Generator().manual_seed(2)
    shape = LAYERS, HEADS, head_dim(model.config)
    sinks = Sinks(
        torch.randn(shape[:2], generator=generator), torch.randn(shape, generator=generator), 4
    )
    each = {
        "window": [3] + [None] * (LAYERS - 1),
        "visual_attention": [True, False] + [True] * (LAYERS - 2),
        "ffn": [None, 5] + [0] * (LAYERS - 2),
    }
    plan = a_plan(head_mass="sink", cut_mass="sink", sinks=sinks)
    compare(model, plan, make(kind, mixed(kind)))
    plan = replace(plan, ffn_ratio=1, layer_cut=LAYERS, window_causal=True, **each)
    compare(build(kind), plan, make(kind, mixed(kind)))


@pytest.mark.feature("layouts: several images, sizes, videos")
def test_the_layout_is_where_the_images_are(kind: Kind) -> None:
    """Every size in one batch, in rows of their own and together, adjacent ones too."""
    every = [("image", i) for i in range(len(kind.sizes))]
    every += [("video", i) for i in range(len(kind.videos))]
    laid = [[("text", 2), one, ("text", 1)] for one in every] + [every, [("text", 2), *every[::-1]]]
    batch = make(kind, laid, pads=[(1, 1)] * len(laid))
    model = yopo.apply(build(kind), a_plan())
    layout = run(model, batch.inputs(model), use_cache=True).past_key_values.layout
    for name in ("visual", "image", "row", "col"):
        assert torch.equal(getattr(layout, name), getattr(batch.layout, name)), name
    assert [list(row) for row in layout.grids] == batch.grids


@pytest.mark.feature("layouts: several images, sizes, videos")
def test_a_plan_that_keeps_everything_is_the_dense_model(kind: Kind) -> None:
    """That M-RoPE's positions run back within an image must not change who sees whom."""
    model, batch = build(kind), make(kind, mixed(kind), pads=[(1, 0)] * len(mixed(kind)))
    dense = run(model, batch.inputs(model)).logits
    yopo.apply(model, PruningPlan(torch.ones(LAYERS, HEADS)))
    check(run(model, batch.inputs(model)).logits, dense.double(), batch.mask.bool())


# --------------------------------------------------------------------- steps, chunks and batches


@pytest.mark.feature("prefill + decode = one prefill")
@pytest.mark.parametrize("masses", MASSES, ids="/".join)
def test_prefill_and_decode_are_one_prefill(kind: Kind, masses: tuple[str, str]) -> None:
    model = yopo.apply(build(kind), a_plan(head_mass=masses[0], cut_mass=masses[1]))
    laid = [[*row, ("text", 5)] for row in mixed(kind)]
    short = [[*row[:-1], ("text", 1)] for row in laid]
    pads = [(1, 0)] * len(laid)
    prompt = make(kind, short, pads=pads)
    words = torch.randint(FIRST_WORD, VOCAB, (len(laid), 4))
    inputs = prompt.inputs(model)
    out = run(model, inputs, use_cache=True)
    logits = [out.logits[:, -1]]
    for step in ([0], [1, 2], [3]):  # one at a time and as a chunk
        arguments = later(model, inputs, words[:, step], out.past_key_values)
        out = run(model, arguments, use_cache=True)
        logits += list(out.logits.unbind(1))
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], words], 1)
    after = later(model, inputs, words, SimpleNamespace(get_seq_length=lambda: prompt.ids.shape[1]))
    whole["attention_mask"] = after["attention_mask"]
    whole["position_ids"] = torch.cat([inputs["position_ids"], after["position_ids"]], -1)
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, 4))
    once = run(model, whole, use_cache=False).logits[:, -5:]
    check(torch.stack(logits, 1), once.double(), torch.ones(len(laid), 5, dtype=torch.bool))


@pytest.mark.feature("prefill + decode = one prefill")
def test_prefill_in_chunks_is_one_prefill(kind: Kind) -> None:
    """A text-only start that stock cached, then a chunk with the image, then one with another."""
    model = yopo.apply(build(kind), a_plan())
    last = len(kind.sizes) - 1
    pieces = [
        [("text", 4)],
        [("text", 2), ("image", last), ("text", 1)],
        [("image", 0), ("text", 2)],
    ]
    parts = [make(kind, [piece], seed=i) for i, piece in enumerate(pieces)]
    shown = [one for part in parts for row in part.shown for one in row]
    ids = torch.cat([part.ids for part in parts], 1)
    joined = make(kind, [[segment for piece in pieces for segment in piece]])
    joined.ids, joined.shown = ids, [shown]
    whole = joined.inputs(model)
    once = run(model, whole, use_cache=False).logits
    past, at, logits = DynamicCache(), 0, []  # 4.45's Qwen2-VL makes none itself
    for part in parts:
        n = part.ids.shape[1]
        given = part.inputs(model, positions=False)
        given["position_ids"] = whole["position_ids"][..., at : at + n]
        given["attention_mask"] = torch.ones(1, at + n, dtype=torch.long)
        out = run(model, given, past_key_values=past, use_cache=True)
        logits.append(out.logits)
        past, at = out.past_key_values, at + n
    check(torch.cat(logits, 1), once.double(), joined.mask.bool())


@pytest.mark.feature("batch = singles")
@pytest.mark.parametrize("side", [(1, 0), (0, 1), (1, 1)], ids=["left", "right", "both"])
@pytest.mark.parametrize("masses", [("exact", "exact"), ("drop", "drop")], ids="/".join)
def test_a_batch_is_its_rows(kind: Kind, side: tuple[int, int], masses: tuple[str, str]) -> None:
    model = yopo.apply(build(kind), a_plan(head_mass=masses[0], cut_mass=masses[1]))
    batch = make(kind, mixed(kind), pads=[side] * len(mixed(kind)))
    together = run(model, batch.inputs(model)).logits
    for b in range(len(batch.rows)):
        alone = batch.alone(b)
        expected = run(model, alone.inputs(model)).logits
        valid = batch.mask[b].bool()
        check(together[b, valid][None], expected.double(), alone.mask.bool())


@pytest.mark.feature("generate")
@pytest.mark.parametrize("how", [dict(), dict(num_beams=2), dict(use_cache=False)], ids=str)
def test_generate_is_greedy_search_by_the_oracle(kind: Kind, how: dict[str, Any]) -> None:
    """Beams, which the oracle has not, under a plan that keeps everything against stock's."""
    model, plan = build(kind), a_plan()
    last = len(kind.sizes) - 1
    prompt = make(kind, [[("text", 3), ("image", last), ("text", 3)]])
    inputs = prompt.inputs(model, positions=False)  # generate() makes its own
    fixed = dict(max_new_tokens=4, do_sample=False)
    if "num_beams" in how:
        dense = model.generate(**inputs, **fixed, **how)
        yopo.apply(model, PruningPlan(torch.ones(LAYERS, HEADS)))
        assert torch.equal(model.generate(**inputs, **fixed, **how), dense)
    yopo.apply(model, plan)
    found = model.generate(**inputs, **fixed, **how)[:, -4:]
    if "num_beams" in how:
        return
    yopo.remove(model)
    fed = into_stack(model, prompt.inputs(model))
    embeds, positions = fed.embeds, fed.positions
    for token in found[0]:
        n = embeds.shape[1]
        layout = SimpleNamespace(
            **{
                name: torch.nn.functional.pad(
                    getattr(prompt.layout, name), (0, n - prompt.ids.shape[1]), value=fill
                )
                for name, fill in (("visual", False), ("image", -1), ("row", -1), ("col", -1))
            }
        )
        out = oracle_forward(
            seen_by_oracle(model), plan, embeds, layout, angles=angles(model, positions, n)
        )
        assert out.logits[0, -1].argmax() == token
        word = stack_of(model).embed_tokens.weight[token][None, None]
        embeds = torch.cat([embeds, word], 1)
        following = (positions.max() + 1).expand(*positions.shape[:-1], 1)
        positions = torch.cat([positions, following], -1)


# ------------------------------------------------------------------------------------- training


@pytest.mark.feature("training")
def test_gradients_are_the_oracles(kind: Kind) -> None:
    """What the loss says of the embeddings of words; with gradient checkpointing, too."""
    model, plan = build(kind), a_plan()
    batch = make(kind, mixed(kind), pads=[(0, 1)] * len(mixed(kind)))
    inputs = batch.inputs(model)
    labels = batch.ids.masked_fill((batch.mask == 0) | batch.layout.visual, -100)
    fed = into_stack(model, inputs)
    embeds = fed.embeds.detach().requires_grad_()
    expected = truth(model, plan, batch, SimpleNamespace(embeds=embeds, positions=fed.positions))
    oracle_loss(expected.logits, labels).backward()
    yopo.apply(model, plan).train()
    table = stack_of(model).embed_tokens.weight
    words = torch.zeros(VOCAB, embeds.shape[2]).index_add(
        0, batch.ids[~batch.layout.visual], embeds.grad[~batch.layout.visual].float()
    )
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        out = model(**inputs, use_cache=False)
        table.grad = None
        oracle_loss(out.logits, labels).backward()
        ordinary = torch.arange(VOCAB) >= FIRST_WORD  # padding and placeholders apart
        worst = (table.grad - words)[ordinary].abs().max()
        assert worst < TOLERANCE and words.abs().max() > 0.01, worst


@pytest.mark.feature("training")
def test_half_precision_is_near(kind: Kind) -> None:
    model, batch = build(kind), make(kind, mixed(kind))
    inputs = batch.inputs(model)
    exact = run(yopo.apply(model, a_plan()), inputs).logits
    model.to(torch.bfloat16)
    halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    rough = run(model, halves).logits
    assert (rough - exact)[batch.mask.bool()].abs().mean() < 0.15


@pytest.mark.feature("generate")
@pytest.mark.parametrize("copied", [False, True])
def test_images_encoded_beforehand_are_pruned_alike(kind: Kind, copied: bool) -> None:
    """What generate() of newer transformers does, by hand: pixels and sizes stay behind. copied:
    the features, as hooks do that move them to another device."""
    model = yopo.apply(build(kind), a_plan())
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("forward takes no encoded images on this transformers")
    batch = make(kind, mixed(kind))
    inputs = batch.inputs(model)
    expected = run(model, inputs).logits
    encoded = {}
    for what in ("image", "video"):
        encode = getattr(model.model, f"get_{what}_features", None)
        takes = inspect.signature(encode).parameters if encode else ()
        names = {"pixel_values", "image_sizes", "pixel_values_videos", f"{what}_grid_thw"}
        given = {name: inputs.pop(name) for name in names & set(takes) & set(inputs)}
        if given:
            with torch.no_grad():
                encoded[what] = encode(**given, return_dict=True)
        if copied and given:
            features = encoded[what].pooler_output
            alone = isinstance(features, Tensor)
            encoded[what].pooler_output = (
                features.clone() if alone else [one.clone() for one in features]
            )
    assert not any("pixel" in name for name in inputs)
    found = run(model, inputs, mm_encoder_outputs=encoded).logits
    assert torch.equal(found, expected)
