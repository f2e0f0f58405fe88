"""However a sequence is fed (whole, in chunks, by token, in a batch, by generate): one prefill.

The reference is the oracle's single pass over everything, or the engine's own.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import (
    MASS,
    ROWS,
    SHAPE,
    VOCAB,
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
from oracle import extended, oracle_forward
from torch import Tensor

import yopo
from yopo import apply, plan_of
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import DynamicCache


def truth_of(model: Any, plan: PruningPlan, case: Case) -> Tensor:
    return oracle_forward(
        model, plan, case.inputs_embeds, case.layout, case.attention_mask, case.position_ids
    ).logits


def close(
    ours: Tensor, truth: Tensor, valid: Tensor | None = None, tolerance: float = 1e-4
) -> None:
    difference = (ours.double() - truth.double()).abs()
    worst = (difference if valid is None else difference[valid]).max().item()
    assert worst <= tolerance, f"differs by {worst:.3g}"


def columns(case: Case, start: int, stop: int, past: Any, grids: Any) -> dict[str, Any]:
    """The arguments that feed columns start … stop-1."""
    mask, positions = case.attention_mask, case.position_ids
    visual = case.visual[:, start:stop]
    return dict(
        inputs_embeds=case.inputs_embeds[:, start:stop],
        attention_mask=None if mask is None else mask[:, :stop],
        position_ids=None if positions is None else positions[:, start:stop],
        visual_mask=visual,
        visual_grids=grids if visual.any() else None,
        past_key_values=past,
        use_cache=True,
    )


def new_grids(case: Case, start: int, stop: int) -> list[list[tuple[int, int]]]:
    """Per row the grids of the images whose first cell lies in columns start … stop-1."""
    first = (case.row == 0) & (case.col == 0)
    return [
        [case.all_grids[b][case.image[b, j]] for j in range(start, stop) if first[b, j]]
        for b in range(case.shape[0])
    ]


def feed(model: Any, case: Case, cuts: list[int], past: Any = None) -> tuple[Tensor, Any]:
    edges = [0, *cuts, case.shape[1]]
    logits = []
    for start, stop in pairwise(edges):
        out = model(**columns(case, start, stop, past, new_grids(case, start, stop)))
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), past


def length(past: Any) -> int:
    return past[0][0].shape[2] if isinstance(past, tuple) else past.get_seq_length()


def stock_is_right(case: Case, cut: int) -> bool:
    """Whether stock need not run the chunk after the cut, or can: 4.36's is wrong with padding."""
    return bool(case.valid.all() or case.visual[:, :cut].any())


def inside_an_image(case: Case, cut: int) -> bool:
    """Whether a row has cells of one image on both sides of the cut."""
    left, right = case.image[:, :cut].amax(1), case.image.masked_fill(case.image < 0, 99)[:, cut:]
    return bool((left >= right.amin(1)).any())


@given(data=st.data())
@settings(max_examples=120)
@torch.no_grad()
def test_chunks_and_decode_are_one_prefill(data: st.DataObject) -> None:
    """Chunks cut anywhere but inside an image, then token by token."""
    shape = data.draw(shapes(3))
    plan = data.draw(plans(shape))
    case = data.draw(cases(shape.heads * 8))
    n = case.shape[1]
    allowed = [c for c in range(1, n) if not inside_an_image(case, c) and stock_is_right(case, c)]
    cuts = sorted(data.draw(st.sets(st.sampled_from(allowed), max_size=4))) if allowed else []
    model = build(shape, plan)
    logits, past = feed(model, case, cuts)
    close(logits, truth_of(model, plan, case), case.valid)
    assert length(past) == n
    steps = 3
    more = torch.randn(case.shape[0], steps, shape.heads * 8)
    longer = extend(case, more)
    truth = truth_of(model, plan, longer)
    for step in range(steps):
        out = model(**columns(longer, n + step, n + step + 1, past, None))
        past = out.past_key_values
        close(out.logits[:, 0], truth[:, n + step])
    assert length(past) == n + steps


def extend(case: Case, embeds: Tensor) -> Case:
    """The case with text after it."""
    k = embeds.shape[1]
    mask = torch.nn.functional.pad(case.valid.long(), (0, k), value=1)
    positions = None if case.position_ids is None else (mask.cumsum(1) - 1).clamp(min=0)
    return Case(
        inputs_embeds=torch.cat([case.inputs_embeds, embeds], 1),
        attention_mask=None if case.attention_mask is None else mask,
        position_ids=positions,
        grids=case.grids,
        all_grids=case.all_grids,
        **vars(extended(case.layout, k)),
    )


@given(data=st.data())
@settings(max_examples=80)
@torch.no_grad()
def test_causal_windows_can_be_cut_inside_an_image(data: st.DataObject) -> None:
    shape = data.draw(shapes(3))
    window = data.draw(st.sampled_from([None, 3, 4]))
    plan = data.draw(plans(shape, window=window, window_causal=window is not None))
    case = data.draw(cases(shape.heads * 8))
    # a cut that leaves a newline between the halves cannot say that the image goes on
    allowed = [c for c in range(1, case.shape[1]) if resumes(case, c) and stock_is_right(case, c)]
    assume(allowed)
    cuts = sorted(data.draw(st.sets(st.sampled_from(allowed), min_size=1, max_size=4)))
    model = build(shape, plan)
    logits, _ = feed(model, case, cuts)
    close(logits, truth_of(model, plan, case), case.valid)


def resumes(case: Case, cut: int) -> bool:
    """Whether each image that the cut splits has cells right at both sides of it."""
    for b in range(case.shape[0]):
        left = case.image[b, :cut].max()
        split = left >= 0 and bool((case.image[b, cut:] == left).any())
        if split and not case.visual[b, cut - 1 : cut + 1].all():
            return False
    return True


@torch.no_grad()
def test_a_bidirectional_window_cannot_be_cut_inside_an_image() -> None:
    model = build(SHAPE, a_plan())
    case = make_case([[("text", 2), ("image", 3, 3, False), ("text", 2)]], 32)
    out = model(**columns(case, 0, 7, None, [[(3, 3)]]))
    with pytest.raises(ValueError, match="window_causal"):
        model(**columns(case, 7, 13, out.past_key_values, [[]]))


@torch.no_grad()
def test_an_image_may_follow_a_truncated_one() -> None:
    """A truncated image ends what is cached; the next chunk begins with text, then its own."""
    plan = a_plan(window_causal=True)
    model = build(SHAPE, plan)
    rows = [("text", 2), ("image", 2, 3, False)]
    first = make_case([rows], 32, truncate=[2])
    second = make_case([[("text", 2), ("image", 2, 2, False), ("text", 1)]], 32, seed=4)
    past = model(**first.kwargs(), use_cache=True).past_key_values
    arguments = second.kwargs() | {"attention_mask": None, "past_key_values": past}
    ours = model(**arguments, use_cache=True).logits
    joined = SimpleNamespace(
        visual=torch.cat([first.visual, second.visual], 1),
        image=torch.cat([first.image, second.image + second.visual.long()], 1),
        row=torch.cat([first.row, second.row], 1),
        col=torch.cat([first.col, second.col], 1),
    )
    embeds = torch.cat([first.inputs_embeds, second.inputs_embeds], 1)
    close(ours, oracle_forward(model, plan, embeds, joined).logits[:, first.shape[1] :])


@given(data=st.data())
@settings(max_examples=60)
@torch.no_grad()
def test_a_batch_is_its_rows(data: st.DataObject) -> None:
    shape = data.draw(shapes(3))
    plan = data.draw(plans(shape))
    case = data.draw(cases(shape.heads * 8, batch=(2, 3), holes=False))
    model = build(shape, plan)
    together = model(**case.kwargs()).logits
    for b in range(case.shape[0]):
        close(model(**case.alone(b).kwargs()).logits[0], together[b, case.valid[b]], None, 1e-5)


@pytest.mark.parametrize("masses", MASS, ids="/".join)
@torch.no_grad()
def test_stocks_text_cache_is_adopted(masses: tuple[str, str]) -> None:
    """A text-only first turn runs stock's code, which leaves a DynamicCache or tuples."""
    plan = a_plan(*masses)
    model = build(SHAPE, plan)
    ids = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(1))
    first_mask = torch.ones_like(ids)
    first_mask[1, :2] = 0
    case = make_case(ROWS, 32, pads=[(0, 1)] * 3)
    whole = SimpleNamespace(
        embeds=torch.cat([model.model.embed_tokens(ids), case.inputs_embeds], 1),
        mask=torch.cat([first_mask, case.attention_mask], 1),
        layout=SimpleNamespace(
            **{
                k: torch.cat([torch.full((3, 6), v), getattr(case, k)], 1)
                for k, v in dict(visual=False, image=-1, row=-1, col=-1).items()
            }
        ),
    )
    truth = oracle_forward(model, plan, whole.embeds, whole.layout, whole.mask).logits
    for kind in ("returned", "brought"):
        brought = {} if kind == "returned" else {"past_key_values": dynamic_cache(model)}
        first = model(input_ids=ids, attention_mask=first_mask, use_cache=True, **brought)
        close(first.logits, truth[:, :6], first_mask.bool())
        arguments = case.kwargs() | {"attention_mask": whole.mask}
        second = model(**arguments, past_key_values=first.past_key_values, use_cache=True)
        close(second.logits, truth[:, 6:], case.valid)
        assert second.past_key_values.get_seq_length() == whole.mask.shape[1]


def dynamic_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache()


@torch.no_grad()
def test_legacy_tuples_of_text_are_adopted() -> None:
    plan = a_plan()
    model = build(SHAPE, plan)
    ids = torch.randint(1, VOCAB, (1, 6))
    first = model(input_ids=ids, use_cache=True)
    if not isinstance(first.past_key_values, tuple):
        pytest.skip("this transformers returns no tuples")
    case = make_case([[("text", 1), ("image", 2, 2, False), ("text", 2)]], 32)
    out = model(**(case.kwargs() | {"attention_mask": None}), past_key_values=first.past_key_values)
    alone = build(SHAPE, plan)
    embeds = torch.cat([model.model.embed_tokens(ids), case.inputs_embeds], 1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.bool), case.visual], 1)
    close(out.logits, alone(inputs_embeds=embeds, visual_mask=mask).logits[:, 6:])


@torch.no_grad()
def test_a_cache_that_the_caller_brought_is_filled_or_refused() -> None:
    """Whoever holds on to the object passed in finds everything in it, or was told off."""
    plan = a_plan()
    model = build(SHAPE, plan)
    case = make_case([ROWS[0]], 32)
    longer = extend(case, torch.randn(1, 2, 32))
    truth = truth_of(model, plan, longer)
    n = case.shape[1]
    mine = dynamic_cache(model)
    try:
        model(**columns(case, 0, n, mine, case.all_grids))
    except (ValueError, TypeError) as error:
        assert "DynamicCache" in str(error) or "VisualCache" in str(error)
        return
    assert mine.get_seq_length() == n
    for step in range(2):
        out = model(**columns(longer, n + step, n + step + 1, mine, None))
        close(out.logits[:, 0], truth[:, n + step])
        assert mine.get_seq_length() == n + step + 1


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way() -> None:
    """Several answers from one prefix, as people do it with copy.deepcopy."""
    plan = a_plan()
    model = build(SHAPE, plan)
    case = left_padded()
    n = case.shape[1]
    past = model(**columns(case, 0, n, None, case.all_grids)).past_key_values
    twin = copy.deepcopy(past)
    for cache, seed in ((past, 1), (twin, 2)):
        more = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(seed))
        longer = extend(case, more)
        out = model(**columns(longer, n, n + 2, cache, None))
        close(out.logits, truth_of(model, plan, longer)[:, n:])
        assert out.past_key_values.get_seq_length() == n + 2


@torch.no_grad()
def test_a_filled_cache_has_as_great_a_length_as_stock_s() -> None:
    caches = []
    for model in (build(SHAPE, a_plan()), build(SHAPE, None)):
        caches.append(dynamic_cache(model))
        given = left_padded().kwargs()
        if plan_of(model) is None:
            given = {k: v for k, v in given.items() if not k.startswith("visual")}
        model(**given, past_key_values=caches[-1])
    for name in ("get_max_length", "get_max_cache_shape"):
        if hasattr(caches[1], name):
            ours, stock = (getattr(cache, name)() for cache in caches)
            assert ours == stock and type(ours) is type(stock)


@pytest.mark.parametrize("kv_heads", [6, 3])
@pytest.mark.parametrize("masses", MASS, ids="/".join)
@torch.no_grad()
def test_blind_heads_and_cut_layers_keep_nothing(masses: tuple[str, str], kv_heads: int) -> None:
    """Bytes: text of every kv head once, and visual keys and values where a query reads them."""
    shape = Shape(layers=4, heads=6, kv_heads=kv_heads)
    keep = torch.tensor([[1, 0, 0, 0, 0, 0], [0] * 6, [1, 1, 0, 1, 0, 0], [1] * 6]).bool()
    plan = PruningPlan(keep, window=3, layer_cut=3, head_mass=masses[0], cut_mass=masses[1])
    case = make_case([[("text", 2), ("image", 4, 4, False), ("text", 2)]], 48)
    past = build(shape, plan)(**case.kwargs(), use_cache=True).past_key_values
    reads = keep.clone()
    reads[3] = False  # the layer behind the cut
    seeing, blind = (mask.view(4, kv_heads, -1).any(-1) for mask in (reads, ~reads))
    exact = torch.tensor([masses[0] == "exact"] * 3 + [masses[1] == "exact"])[:, None]
    # The mass needs keys alone, which of a kv head that seeing heads share are there.
    visual = 2 * int(seeing.sum()) + int((blind & ~seeing & exact).sum())
    head = 8 * 4  # float32 bytes of one head's key of one token
    assert past.nbytes(visual_only=True) == head * int(case.visual.sum()) * visual
    text = 2 * 4 * kv_heads
    assert past.nbytes(visual_only=False) - past.nbytes(visual_only=True) == (
        head * int((~case.visual).sum()) * text
    )


@torch.no_grad()
def test_a_cache_that_an_interrupted_forward_half_filled_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, case = build(SHAPE, a_plan()), make_case([ROWS[0]], 32)
    n = case.shape[1]
    past = model(**columns(case, 0, n, None, case.all_grids)).past_key_values
    step = columns(extend(case, torch.randn(1, 1, 32)), n, n + 1, past, None)
    last = model.model.layers[-1].mlp
    with monkeypatch.context() as patch:
        patch.setattr(type(last), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**step)
    with pytest.raises(ValueError, match="half filled"):
        model(**step)


@torch.no_grad()
def test_an_offloading_cache_is_refused() -> None:
    from transformers import DynamicCache

    if "offloading" not in inspect.signature(DynamicCache.__init__).parameters:
        pytest.skip("this transformers has no offloading DynamicCache")
    model, case = build(SHAPE, a_plan()), make_case([ROWS[0]], 32)
    cache = DynamicCache(config=model.config, offloading=True)
    with pytest.raises(ValueError, match="an offloading DynamicCache"):
        model(**columns(case, 0, case.shape[1], cache, case.all_grids))


@torch.no_grad()
def test_the_repeated_mask_at_decode() -> None:
    """generate() hands the prompt's visual_mask over at each step; another is a mistake."""
    plan = a_plan()
    model = build(SHAPE, plan)
    case = make_case([ROWS[0]], 32)
    n = case.shape[1]
    past = model(**columns(case, 0, n, None, case.all_grids)).past_key_values
    longer = extend(case, torch.randn(1, 1, 32))
    step = columns(longer, n, n + 1, past, None)
    other = case.visual.clone()
    other[0, 0] = True
    with pytest.raises(ValueError, match="visual_mask"):
        model(**(step | {"visual_mask": other}))
    out = model(**(step | {"visual_mask": case.visual}))
    close(out.logits[:, 0], truth_of(model, plan, longer)[:, n])


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 12, dtype=torch.bool),
        torch.zeros(2, 11, dtype=torch.bool),
        torch.zeros(11, dtype=torch.bool),
    ],
    ids=lambda mask: "x".join(map(str, mask.shape)),
)
@torch.no_grad()
def test_masks_of_another_shape_are_refused(mask: Tensor) -> None:
    model = build(SHAPE, a_plan())
    case = make_case([ROWS[0]], 32)
    assert case.shape == (1, 11)
    with pytest.raises(ValueError, match="visual_mask"):
        model(inputs_embeds=case.inputs_embeds, visual_mask=mask)
    mask[..., 2:6] = True
    with pytest.raises(ValueError, match="visual_mask"):
        model(inputs_embeds=case.inputs_embeds, visual_mask=mask)


@torch.no_grad()
def test_runs_that_fit_no_grid_are_refused() -> None:
    model = build(SHAPE, a_plan())
    case = make_case([ROWS[0]], 32)  # an image of 2 x 3
    arguments = dict(inputs_embeds=case.inputs_embeds, visual_mask=case.visual)
    with pytest.raises(ValueError, match="visual_grids"):
        model(**arguments)
    for grids in ([[]], [[(1, 5)]], [[(2, 3), (1, 1)]], [[(2, 3)], [(2, 3)]], [[(0, 6)]]):
        with pytest.raises(ValueError, match="visual_grids"):
            model(**arguments, visual_grids=grids)
    assert model(**arguments, visual_grids=[[(2, 3)]]).logits.isfinite().all()
    assert model(**arguments, visual_grids=[[(2, 4)]]).logits.isfinite().all()  # a truncated one


@torch.no_grad()
def test_attention_weights_are_refused() -> None:
    model = build(SHAPE, a_plan())
    case = make_case([ROWS[0]], 32)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**case.kwargs(), output_attentions=True)


@pytest.mark.parametrize("wide", [2, 4])
@torch.no_grad()
def test_attention_masks_of_two_and_four_dimensions(wide: int) -> None:
    """None, 2-D, or 4-D as transformers makes it; anything of a wrong width is refused."""
    plan = a_plan()
    model = build(SHAPE, plan)
    case = left_padded()
    truth = truth_of(model, plan, case)
    mask = case.attention_mask
    if wide == 4:
        n = case.shape[1]
        sees = mask.bool()[:, None, None, :] & torch.ones(n, n, dtype=torch.bool).tril()
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    out = model(**(case.kwargs() | {"attention_mask": mask}))
    close(out.logits, truth, case.valid)
    with pytest.raises(ValueError, match="attention_mask"):
        model(**(case.kwargs() | {"attention_mask": mask[..., 1:]}))


@torch.no_grad()
def test_rows_of_nothing_but_padding() -> None:
    plan = a_plan()
    model = build(SHAPE, plan)
    case = left_padded()
    case.attention_mask[2] = 0
    out = model(**case.kwargs(), use_cache=True)
    assert out.logits.isfinite().all()
    close(out.logits, truth_of(model, plan, case), case.valid)


@torch.no_grad()
def test_padding_is_not_visual() -> None:
    case = left_padded()
    case.attention_mask[0, case.image[0] == 0] = 0
    with pytest.raises(ValueError, match="padding"):
        build(SHAPE, a_plan())(**case.kwargs())


@torch.no_grad()
def test_no_warnings_in_the_main_path() -> None:
    plan = a_plan()
    model = build(SHAPE, plan)
    case = left_padded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**case.kwargs(), use_cache=True)


@torch.no_grad()
def test_a_cache_of_another_plan_or_batch_is_refused() -> None:
    model = build(SHAPE, a_plan())
    case = left_padded()
    past = model(**case.kwargs(), use_cache=True).past_key_values
    token = torch.ones(len(ROWS), 1, dtype=torch.long)
    with pytest.raises(ValueError, match="holds 3 rows, this call has 2"):
        model(input_ids=token[:2], past_key_values=past)
    other = a_plan("drop", "drop")
    apply(model, other)
    with pytest.raises(ValueError, match="another plan"):
        model(input_ids=token, past_key_values=past)
    apply(model, a_plan())  # an equal plan is the same
    assert model(input_ids=token, past_key_values=past).logits.isfinite().all()


@torch.no_grad()
def test_a_refused_call_leaves_the_callers_cache_alone() -> None:
    model = build(SHAPE, a_plan())
    case = make_case([ROWS[0]], 32)
    cache = DynamicCache()
    wrong = {"attention_mask": None, "position_ids": torch.zeros(case.shape).long()}
    wrong["position_ids"][0, 0] = 1
    with pytest.raises(ValueError, match="start anew"):
        model(**(case.kwargs() | wrong), past_key_values=cache)
    assert type(cache) is DynamicCache


@pytest.mark.parametrize("way", ["live", "fused", "graphed"])
@pytest.mark.parametrize("mass", MASS)
def test_a_cropped_cache_goes_on_as_if_what_came_after_had_never_been(
    mass: tuple[str, str], way: str
) -> None:
    model, case = build(SHAPE, a_plan(*mass)), left_padded()
    if way != "live":
        model = getattr(yopo, {"fused": "fuse"}.get(way, way))(model)
    mask = case.valid.long()

    def go_on(past: Any, tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens] * len(mask))
        longer = torch.cat([mask, torch.ones_like(ids)], 1)
        given = {"input_ids": ids, "attention_mask": longer, "past_key_values": past}
        with torch.no_grad():
            return model(**given, use_cache=True).logits

    with torch.no_grad():
        past = model(**case.kwargs(), use_cache=True).past_key_values
    length, held = past.length, past.nbytes()
    first = go_on(past, [1, 2, 3])
    for removed in (-3, length):
        past.crop(removed)
        assert (past.length, past.nbytes()) == (length, held)
        assert torch.allclose(go_on(past, [1, 2, 3]), first, atol=1e-5)


@torch.no_grad()
def test_a_crop_takes_whole_images_with_it_and_cuts_none() -> None:
    rows = [[("text", 2), ("image", 2, 2, False), ("text", 1), ("image", 3, 3, False), ("text", 2)]]
    model, case = build(SHAPE, a_plan("exact", "exact")), make_case(rows, SHAPE.heads * 8)
    whole = model(**case.kwargs(), use_cache=True)
    past = whole.past_key_values
    for inside in (4, 9):
        with pytest.raises(ValueError, match="would cut an image"):
            past.crop(inside)
    past.crop(7)
    assert past.grids == (((2, 2),),) and past.visual_slots == 4
    rest = columns(case, 7, case.shape[1], past, [[(3, 3)]])
    assert torch.allclose(model(**rest).logits, whole.logits[:, 7:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("way", ["live", "fused", "graphed"])
@pytest.mark.parametrize("hidden", [0, 3])
def test_a_mask_that_hides_what_was_seen_counts_in_a_step(way: str, hidden: int) -> None:
    """Column 0 is text, column 3 of an image."""
    rows = [[("text", 2), ("image", 2, 2, False), ("text", 3)]]
    case, shape = make_case(rows, SHAPE.heads * 8), replace(SHAPE, kv_heads=SHAPE.heads)
    model = build(shape, a_plan("drop", "drop"))
    if way != "live":
        model = getattr(yopo, {"fused": "fuse"}.get(way, way))(model)
    past = model(**case.kwargs(), use_cache=True).past_key_values
    mask = torch.ones(1, case.shape[1] + 1, dtype=torch.long)
    found = []
    for shown in (0, 1, 0):
        mask[:, hidden] = shown
        step = {"input_ids": torch.tensor([[1]]), "attention_mask": mask}
        found.append(model(**step, past_key_values=past).logits)
        past.crop(-1)
    assert torch.allclose(found[0], found[2], atol=1e-6)
    assert (found[0] - found[1]).abs().max() > 1e-2


@torch.no_grad()
def test_a_cache_that_is_reset_is_stocks_and_empty() -> None:
    model, case, past = build(SHAPE, a_plan()), make_case([ROWS[0]], 32), DynamicCache()
    words = torch.tensor([[3, 4, 5]])
    first = model(**columns(case, 0, case.shape[1], past, case.all_grids)).logits
    model(input_ids=words, past_key_values=past)
    for _ in range(2):
        past.reset()
        assert type(past) is DynamicCache and past.get_seq_length() == 0
        stock = model(input_ids=words, past_key_values=past, use_cache=True).logits
        assert torch.equal(stock, build(SHAPE, None)(input_ids=words).logits)
        assert past.get_seq_length() == 3
        arguments = case.kwargs() | {"attention_mask": None, "position_ids": None}
        assert model(**arguments, past_key_values=past, use_cache=True).logits.isfinite().all()
        assert past.get_seq_length() == 3 + case.shape[1]
    past.reset()
    again = model(**columns(case, 0, case.shape[1], past, case.all_grids)).logits
    assert torch.equal(again, first)
