"""Embeddings are known again, as themselves and as what is made of them, and nothing else is."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from layouts import Shape, build
from torch import Tensor

import yopo
from yopo.engine.layout import VisualLayout
from yopo.models import known_layouts
from yopo.models.known_layouts import recall, remember
from yopo.plan.pruning_plan import PruningPlan

SHAPE = Shape()
PLAN = PruningPlan(torch.tensor([[1, 0, 1, 0]] * 3), window=3, layer_cut=2, ffn_ratio=2)
CAUSAL = PruningPlan(PLAN.head_keep, window=3, layer_cut=2, ffn_ratio=2, window_causal=True)
D = 32
GRIDS = [[(2, 2), (1, 3)], [], [(2, 3)]]  # of the three rows
ROWS = ["..vvvv..vvv..", "-----........", "---vvvvvv...."]  # text, visual, padding


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Each test begins with no memory, as a process does."""
    stores = known_layouts._SHOWN, known_layouts._TEXT
    known_layouts._SHOWN, known_layouts._TEXT = known_layouts._Store(), known_layouts._Store()
    yield
    known_layouts._SHOWN, known_layouts._TEXT = stores


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layout_of(rows: list[str], grids: list[Any]) -> VisualLayout:
    return VisualLayout.from_mask(torch.tensor([[c == "v" for c in row] for row in rows]), grids)


def prompts(seed: int = 0) -> tuple[Tensor, VisualLayout]:
    """Three rows, remembered: two images, text alone, one image."""
    embeds = noise(3, 13, D, seed=seed)
    padding = torch.tensor([[c == "-" for c in row] for row in ROWS])
    embeds = embeds.masked_fill(padding[..., None], 0)
    layout = layout_of(ROWS, GRIDS)
    remember(embeds, layout)
    return embeds, layout


def before(batch: int, past: int = 0) -> VisualLayout:
    return VisualLayout.empty(batch, past)


def same(found: VisualLayout | None, expected: VisualLayout) -> None:
    assert found is not None
    for name in ("visual", "image", "row", "col"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.grids == expected.grids


MADE = {
    "the very one": lambda e: (e, [0, 1, 2]),
    "copied": lambda e: (e.clone(), [0, 1, 2]),
    "half": lambda e: (e.half(), [0, 1, 2]),
    "bfloat16": lambda e: (e.bfloat16(), [0, 1, 2]),
    "double": lambda e: (e.double(), [0, 1, 2]),
    "beams": lambda e: (e.repeat_interleave(3, 0), [0, 0, 0, 1, 1, 1, 2, 2, 2]),
    "tiled": lambda e: (e.repeat(2, 1, 1), [0, 1, 2, 0, 1, 2]),
    "rows": lambda e: (e[[2, 0]], [2, 0]),
    "one row": lambda e: (e[1:2], [1]),
    "strided": lambda e: (e.transpose(0, 1).contiguous().transpose(0, 1), [0, 1, 2]),
    "parameter": lambda e: (torch.nn.Parameter(e.clone()), [0, 1, 2]),
    "with a gradient": lambda e: (e.clone().requires_grad_() * 1, [0, 1, 2]),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_what_is_made_of_embeddings_is_known(make: Any, mode: Any) -> None:
    with mode():
        embeds, layout = prompts()
        prompts(seed=1)
        made, rows = make(embeds)
    same(recall(made, before(len(rows))), layout.rows(torch.tensor(rows)))


def test_batches_put_together_are_known() -> None:
    (first, one), (second, two) = prompts(), prompts(seed=1)
    found = recall(torch.cat([second[2:], first[:2]]), before(3))
    parts = [two.rows(torch.tensor([2])), one.rows(torch.tensor([0, 1]))]
    for name in ("visual", "image", "row", "col"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(found, name), joined)
    assert found.grids == parts[0].grids + parts[1].grids


def test_one_unknown_row_makes_the_batch_unknown() -> None:
    embeds, _ = prompts()
    assert recall(torch.cat([embeds, noise(1, 13, D, seed=9)]), before(4)) is None
    assert recall(noise(3, 13, D, seed=9), before(3)) is None
    assert recall(noise(3, 40, D), before(3)) is None  # longer than anything known


def swap_rows(embeds: Tensor) -> None:
    embeds.copy_(embeds.flip(0).clone())


def past_the_counter(embeds: Tensor) -> None:
    embeds.data.copy_(embeds.flip(0).clone())  # no version of `embeds` counts this


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_value_changed_in_place_or_in_a_copy_is_another_prompt(mode: Any) -> None:
    with mode():
        embeds, _ = prompts()
        changed = embeds.clone()
        changed[0, 5] += 1
        assert recall(changed, before(3)) is None
        embeds[0, 5] += 1
        assert recall(embeds, before(3)) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [swap_rows, past_the_counter])
def test_rows_swapped_in_place_take_their_layouts_along(mode: Any, change: Any) -> None:
    with mode():
        embeds, layout = prompts()
        change(embeds)
        same(recall(embeds, before(3)), layout.rows(torch.tensor([2, 1, 0])))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_buffer_used_again_has_the_layout_of_what_is_in_it(mode: Any) -> None:
    with mode():
        buffer, _ = prompts()
        second = noise(3, 13, D, seed=5)
        other = layout_of([".vvvv........"] * 3, [[(2, 2)]] * 3)
        remember(second, other)
        buffer.copy_(second)
        same(recall(buffer, before(3)), other)
        buffer.copy_(noise(3, 13, D, seed=6))
        assert recall(buffer, before(3)) is None
        buffer.zero_()
        assert recall(buffer, before(3)) is None


def test_embeddings_without_values_to_compare_are_known_until_they_change() -> None:
    embeds = torch.empty(3, 13, D, device="meta")
    layout = layout_of(ROWS, GRIDS)
    remember(embeds, layout)
    same(recall(embeds, before(3)), layout)
    assert recall(torch.empty_like(embeds), before(3)) is None
    embeds.mul_(2)
    assert recall(embeds, before(3)) is None


REMADE: dict[str, Any] = {
    "padded on the left": lambda e: torch.cat([torch.zeros(3, 2, D), e], 1),
    "padded on the right": lambda e: torch.cat([e, torch.zeros(3, 2, D)], 1),
    "columns turned round": lambda e: e.flip(1),
    "columns rolled": lambda e: e.roll(1, 1),
    "every other column": lambda e: e[:, ::2],
    "two prompts in one row": lambda e: torch.cat([e[:1], e[2:]], 1),
    "columns taken out": lambda e: torch.cat([e[:, :4], e[:, 6:]], 1),
    "rounded and back": lambda e: e.half().float(),
    "scaled": lambda e: e * 2,
    "features turned round": lambda e: e.flip(2),
    "a mean of two": lambda e: (e + e.flip(0)) / 2,
    "an image of another row": lambda e: torch.cat([e[:, :3], e[[2, 1, 0], 3:]], 1),
    "one of another length": lambda e: torch.cat([e[:, :2], e[:, :2], e[:, 2:]], 1),
}


@pytest.mark.parametrize("make", REMADE.values(), ids=REMADE.keys())
def test_what_is_no_part_of_a_prompt_is_unknown(make: Any) -> None:
    embeds, _ = prompts()
    made = make(embeds)
    assert recall(made, before(len(made))) is None


def test_the_latest_counts() -> None:
    embeds, _ = prompts()
    other = layout_of([".vvvv........"] * 3, [[(2, 2)]] * 3)
    remember(embeds.clone(), other)
    same(recall(embeds.clone(), before(3)), other)


def test_chunks_go_on_from_what_is_cached() -> None:
    """Each with the images of its prompt that have begun by then, numbered as in the prompt."""
    embeds, layout = prompts()
    cached = before(3)
    for start, stop in ((0, 2), (2, 4), (4, 9), (9, 11), (11, 13)):
        found = recall(embeds[:, start:stop].clone(), cached)
        expected = layout.columns(start, stop)
        for name in ("visual", "image", "row", "col"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        begun = [int(row.max()) + 1 for row in layout.image[:, :stop]]
        assert found.grids == tuple(g[:k] for g, k in zip(layout.grids, begun, strict=True))
        cached = VisualLayout.joined([cached, found])


def test_another_prompt_after_a_cached_one_is_numbered_after_it() -> None:
    _, one = prompts()
    second, two = prompts(seed=1)
    same(recall(second, one), two.after(one))
    same(recall(second.clone(), one), two.after(one))
    # The second image alone, with the text about it.
    found = recall(second[:1, 6:12].clone(), one.rows(torch.tensor([0])))
    assert found.grids == ((*GRIDS[0], (1, 3)),)
    assert found.image.tolist() == [[-1, -1, 2, 2, 2, -1]]


def test_a_part_that_begins_within_an_image_is_unknown() -> None:
    embeds, _ = prompts()
    assert recall(embeds[:1, 4:12].clone(), before(1)) is None
    assert recall(embeds[:1, 4:12].clone(), before(1, 4)) is None  # text is cached, not its start
    assert recall(embeds[:1, 1:12].clone(), before(1)) is not None
    # Also after the newline between two lines of an image.
    lines = noise(1, 8, D, seed=4)
    remember(lines, layout_of([".vv.vv.."], [[(2, 2)]]))
    assert recall(lines[:, 4:].clone(), before(1)) is None
    assert recall(lines[:, 6:].clone(), before(1)) is not None


def test_padding_cut_off_leaves_the_rest_known() -> None:
    embeds, layout = prompts()
    found = recall(embeds[2:, 3:].clone(), before(1))
    same(found, layout.rows(torch.tensor([2])).columns(3, 13))


def test_not_a_number_is_known_again() -> None:
    embeds = noise(1, 6, D)
    embeds[0, 2], embeds[0, 3] = torch.nan, torch.inf
    layout = layout_of([".vvvv."], [[(2, 2)]])
    remember(embeds, layout)
    same(recall(embeds.clone(), before(1)), layout)
    same(recall(embeds.double(), before(1)), layout)


def test_text_is_known_by_what_it_says_alone() -> None:
    text = noise(2, 6, D)
    remember(text, before(2, 6))
    same(recall(text, before(2)), before(2, 6))
    text[0, 2] = 1.5  # an image feature, scattered in place
    assert recall(text, before(2)) is None


def test_memory_is_bounded_and_the_newest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_layouts, "MOST_PROMPTS", 3)
    monkeypatch.setattr(known_layouts, "MOST_POSITIONS", 60)
    kept = [noise(1, 6, D, seed=seed) for seed in range(4)]
    image = layout_of([".vvvv."], [[(2, 2)]])
    for number, embeds in enumerate(kept):
        if number == 3:
            assert recall(kept[0].clone(), before(1)) is not None  # used, so it stays
        remember(embeds, image)
    known = [recall(embeds.clone(), before(1)) is not None for embeds in kept]
    assert known == [True, False, True, True]
    large = noise(20, 6, D, seed=5)
    remember(large, layout_of([".vvvv."] * 20, [[(2, 2)]] * 20))
    assert recall(large.clone(), before(20)) is not None
    assert recall(kept[3].clone(), before(1)) is None
    for seed in range(9):  # much text does not crowd out the images
        remember(noise(1, 6, D, seed=50 + seed), before(1, 6))
    assert recall(large.clone(), before(20)) is not None
    del large
    assert len(known_layouts._TEXT.kept()) == 3


def test_many_threads_at_once() -> None:
    """None gets another's layout."""

    def work(seed: int) -> bool:
        embeds, layout = prompts(seed=seed)
        for _ in range(20):
            found = recall(embeds.clone(), before(3))
            if found is None or not torch.equal(found.image, layout.image):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


# ----------------------------------------------------------------------------- through a model


IDS = torch.tensor([[1, 5, 9, 12, 3, 7, 2, 8]])


def told(model: Any, embeds: Tensor, visual: Tensor, grids: Any = None) -> Tensor:
    return model(inputs_embeds=embeds, visual_mask=visual, visual_grids=grids).logits


@torch.no_grad()
def test_embeddings_of_which_nothing_is_known_are_refused() -> None:
    model = build(SHAPE, PLAN)
    unknown = noise(1, 13, D)
    with pytest.raises(ValueError, match=r"nothing is known.*visual_mask.*all False for text"):
        model(inputs_embeds=unknown)
    nothing = torch.zeros(1, 13, dtype=torch.bool)
    dense = build(SHAPE)
    assert torch.equal(told(model, unknown, nothing), dense(inputs_embeds=unknown).logits)


@torch.no_grad()
def test_remembered_embeddings_are_pruned_as_when_told() -> None:
    model = build(SHAPE, PLAN)
    embeds, layout = prompts()
    mask = torch.tensor([[c != "-" for c in row] for row in ROWS]).long()
    got = model(inputs_embeds=embeds, attention_mask=mask).logits
    again = model(inputs_embeds=embeds.clone(), attention_mask=mask).logits
    expected = model(
        inputs_embeds=embeds, attention_mask=mask, visual_mask=layout.visual, visual_grids=GRIDS
    ).logits
    assert torch.equal(got, expected) and torch.equal(again, expected)
    dense = build(SHAPE)(inputs_embeds=embeds, attention_mask=mask).logits
    assert (got - dense).abs().max() > 0.01


@pytest.mark.parametrize("cuts", [[0, 2, 13], [0, 2, 8, 13], [0, 4, 9, 13], [0, 3, 5, 10, 13]])
@torch.no_grad()
def test_prefill_in_chunks_is_the_prefill(cuts: list[int]) -> None:
    model = build(SHAPE, CAUSAL)
    embeds, _ = prompts()
    embeds = embeds[:1]
    expected = model(inputs_embeds=embeds).logits
    cache, parts = None, []
    for start, stop in pairwise(cuts):
        out = model(inputs_embeds=embeds[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_what_embed_tokens_makes_is_text() -> None:
    model, dense = build(SHAPE, PLAN), build(SHAPE)
    embeds = model.get_input_embeddings()(IDS)
    expected = dense(inputs_embeds=embeds).logits
    for made in (embeds, embeds.clone(), embeds.repeat(2, 1, 1)[:1]):
        assert torch.equal(model(inputs_embeds=made).logits, expected)
    how = dict(max_new_tokens=4, do_sample=False, min_new_tokens=4)
    assert torch.equal(model.generate(inputs_embeds=embeds, **how), dense.generate(
        inputs_embeds=embeds, **how))  # fmt: skip
    embeds[0, 3] = 2.5
    with pytest.raises(ValueError, match="nothing is known"):
        model(inputs_embeds=embeds)


def column_by_column(model: Any, embeds: Tensor, cuts: list[int], mask: Any = None) -> Tensor:
    cache, parts = None, []
    for start, stop in pairwise(cuts):
        seen = None if mask is None else mask[:, :stop]
        out = model(inputs_embeds=embeds[:, start:stop].clone(), past_key_values=cache,
                    attention_mask=seen, use_cache=True)  # fmt: skip
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("cuts", [list(range(14)), [0, 5, 6, 13], [0, 10, 11, 13], [0, 2, 3, 13]])
def test_a_visual_token_that_comes_alone_is_visual(cuts: list[int], mode: Any) -> None:
    with mode():
        model = build(SHAPE, CAUSAL)
        embeds, _ = prompts()
        alone = column_by_column(model, embeds[:1], cuts)
        assert (alone - model(inputs_embeds=embeds[:1]).logits).abs().max() < 1e-5
        mask = torch.tensor([[c != "-" for c in row] for row in ROWS])
        rows = column_by_column(model, embeds, cuts, mask.long())
        whole = model(inputs_embeds=embeds, attention_mask=mask.long()).logits
        assert (rows - whole)[mask].abs().max() < 1e-5


@torch.no_grad()
def test_a_prompt_of_one_visual_token_is_known() -> None:
    one = noise(1, 1, D, seed=3)
    layout = layout_of(["v"], [[(1, 1)]])
    remember(one, layout)
    same(recall(one, before(1)), layout)
    same(recall(one.clone(), before(1)), layout)
    model = build(SHAPE, PLAN)
    expected = told(model, one, layout.visual, layout.grids)
    assert torch.equal(model(inputs_embeds=one.clone()).logits, expected)


@torch.no_grad()
def test_a_visual_token_of_another_place_is_refused() -> None:
    """Amid an image that is not what is cached: no text, and no beginning of an image."""
    model = build(SHAPE, CAUSAL)
    embeds, _ = prompts()
    cache = model(inputs_embeds=embeds[:1], use_cache=True).past_key_values
    other, _ = prompts(seed=1)
    with pytest.raises(ValueError, match="nothing is known of these inputs_embeds of 1 token"):
        model(inputs_embeds=other[:1, 4:5], past_key_values=cache)
    # Nor is one of which nothing is known, while an image lacks some, or before there is any.
    cache = model(inputs_embeds=embeds[:1, :4], use_cache=True).past_key_values
    for unfinished in (cache, None, model(IDS, use_cache=True).past_key_values):
        with pytest.raises(ValueError, match="nothing is known of these inputs_embeds of 1 token"):
            model(inputs_embeds=noise(1, 1, D, seed=9), past_key_values=unfinished)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_decode_step_by_embeddings_is_text(mode: Any) -> None:
    with mode():
        model = build(SHAPE, PLAN)
        embeds, _ = prompts()
        cache = model(inputs_embeds=embeds[:1], use_cache=True).past_key_values
        by_ids = model(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
        table = model.get_input_embeddings()
        for token in (table.weight[IDS[:, :1]], table(IDS[:, :1]), table(IDS)[:, :1].clone()):
            by_embeds = model(inputs_embeds=token, past_key_values=copy.deepcopy(cache)).logits
            assert torch.equal(by_embeds, by_ids)
        # What is no token of the vocabulary, too, once the prompt was known.
        strange = noise(1, 1, D, seed=9)
        nothing = torch.zeros(1, 1, dtype=torch.bool)
        expected = model(inputs_embeds=strange, visual_mask=nothing,
                         past_key_values=copy.deepcopy(cache)).logits  # fmt: skip
        assert torch.equal(model(inputs_embeds=strange, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_one_row_decodes_while_another_still_gets_its_image() -> None:
    model = build(SHAPE, CAUSAL)
    embeds, _ = prompts()
    cache = model(inputs_embeds=embeds[:2, :4], use_cache=True).past_key_values
    token = model.get_input_embeddings().weight[IDS[:, 3:4]]
    mixed = torch.cat([embeds[:1, 4:5], token])
    visual = torch.tensor([[True], [False]])
    twin = copy.deepcopy(cache)
    expected = model(inputs_embeds=mixed, visual_mask=visual, past_key_values=twin).logits
    assert torch.equal(model(inputs_embeds=mixed, past_key_values=cache).logits, expected)


class Scaled(torch.nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 1.7


@torch.no_grad()
def test_tokens_of_an_embedding_that_is_no_plain_table_are_text() -> None:
    model = build(SHAPE, PLAN)
    model.set_input_embeddings(Scaled(50, D))
    for ids in (IDS[:, :1], IDS[:, :1].repeat(3, 1)):
        assert torch.equal(
            model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits
        )
    with pytest.raises(ValueError, match="nothing is known"):
        model(inputs_embeds=noise(1, 1, D))


@torch.no_grad()
def test_a_batch_without_rows_is_the_dense_model_s() -> None:
    model, dense = build(SHAPE, PLAN), build(SHAPE)
    for empty in (torch.zeros(0, 5, D), torch.zeros(0, 1, D)):
        try:
            expected = dense(inputs_embeds=empty).logits
        except Exception as error:
            with pytest.raises(type(error), match=re.escape(str(error)[:40])):
                model(inputs_embeds=empty)
        else:
            assert torch.equal(model(inputs_embeds=empty).logits, expected)
    cache = model(inputs_embeds=prompts()[0][:1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 1 rows, this call has 0"):
        model(inputs_embeds=torch.zeros(0, 1, D), past_key_values=cache)


@torch.no_grad()
def test_a_resized_or_exchanged_embedding_is_watched_too() -> None:
    model = build(SHAPE, PLAN)
    model.resize_token_embeddings(40)
    model(inputs_embeds=model.get_input_embeddings()(IDS))
    model.set_input_embeddings(torch.nn.Embedding(50, D))
    model(inputs_embeds=model.get_input_embeddings()(IDS))


@torch.no_grad()
def test_text_is_watched_under_a_plan_alone_and_in_copies() -> None:
    model = build(SHAPE, cls=transformers.LlamaForCausalLM)
    embedding = model.get_input_embeddings()
    assert not embedding._forward_hooks
    yopo.apply(model, PLAN)
    yopo.apply(model, CAUSAL)
    assert len(embedding._forward_hooks) == 1
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        embeds = twin.get_input_embeddings()(IDS)
        assert torch.equal(twin(inputs_embeds=embeds).logits, model(IDS).logits)
        yopo.remove(twin)
        assert not twin.get_input_embeddings()._forward_hooks
    assert len(embedding._forward_hooks) == 1
    yopo.remove(model)
    assert not embedding._forward_hooks
    model.set_input_embeddings(torch.nn.Embedding(50, D))
    assert not model.get_input_embeddings()._forward_hooks


@torch.no_grad()
def test_the_released_guess_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SHAPE, PLAN)
    model.config.sprompt_len, model.config.max_position_embeddings = 2, 1024
    embeds = noise(1, 2 + 576 + 3, D)
    visual = torch.zeros(1, 581, dtype=torch.bool)
    visual[:, 2:578] = True
    with pytest.raises(ValueError, match="YOPO_LAYOUT=released"):
        model(inputs_embeds=embeds)
    monkeypatch.setenv("YOPO_LAYOUT", "released")
    assert torch.equal(model(inputs_embeds=embeds).logits, told(model, embeds, visual))
    text = model.get_input_embeddings()(torch.ones(1, 581, dtype=torch.long))
    dense = build(SHAPE)(inputs_embeds=text).logits
    assert torch.equal(model(inputs_embeds=text).logits, dense)  # what is known comes before
    monkeypatch.setenv("YOPO_LAYOUT", "releasd")
    with pytest.raises(ValueError, match="YOPO_LAYOUT is 'releasd'; allowed: released"):
        model(inputs_embeds=embeds)
    monkeypatch.delenv("YOPO_LAYOUT")
