"""The unmodified llava-torch package under yopo.patch: where its visual tokens are, and that what
it computes is the oracle's. The model is tiny and random (random_llava.py)."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import random_llava
import torch
import transformers
from layouts import needs_float16
from oracle import extended, oracle_forward, oracle_greedy, oracle_loss
from random_llava import IMAGE, PINPOINTS, PIXELS, SIDE, a_plan, batch, load, pixels
from torch import Tensor

from yopo.versions import CACHE_FIELD, passed_to_every_forward

if importlib.util.find_spec("llava") is None:  # looked for, not imported: the patch comes first
    pytest.skip("llava-torch is not installed", allow_module_level=True)
pytestmark = [pytest.mark.llava, pytest.mark.usefixtures("patched")]

ROOT = Path(__file__).resolve().parents[2]
CELLS = SIDE * SIDE
WORDS = [5, 17, 40, 23, 61, 35, 90, 11, 72, 28]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava.make(tmp_path_factory.mktemp("flat"), a_plan())


@pytest.fixture(scope="module")
def flat(checkpoint: Path) -> Any:
    return load(checkpoint)[0]


@pytest.fixture(scope="module")
def anyres(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = random_llava.make(
        tmp_path_factory.mktemp("anyres"),
        a_plan(),
        mm_patch_merge_type="spatial_unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINPOINTS,
    )
    return load(folder)


@pytest.fixture
def config(flat: Any) -> Iterator[Any]:
    """The config of `flat`, to change; put back afterwards."""
    before = dict(vars(flat.config))
    yield flat.config
    for name in vars(flat.config).keys() - before.keys():
        delattr(flat.config, name)
    vars(flat.config).update(before)


def prepare(model: Any, ids: Tensor, mask: Tensor | None, images: Any, **more: Any) -> Any:
    """What prepare returns, and the layout that is known of it (None: no visual token); checked
    against stock's, and that a copy is known as well as the very tensor."""
    from yopo.engine.layout import VisualLayout
    from yopo.models.known_layouts import recall

    labels, sizes = more.get("labels"), more.get("image_sizes")
    arguments = (ids, more.get("position_ids"), mask, None, labels, images, sizes)
    with torch.no_grad():
        got = model.prepare_inputs_labels_for_multimodal(*arguments)
    layout, embeds = None, got[4]
    if embeds is not None and embeds.shape[1] > 1:
        nothing_cached = VisualLayout.empty(len(embeds))
        layout = recall(embeds, nothing_cached)
        copied = recall(embeds.clone(), nothing_cached)
        same_layout(copied, layout)
        assert copied.grids == layout.grids
    original = inspect.unwrap(type(model).prepare_inputs_labels_for_multimodal)
    with torch.no_grad():
        stock = original(model, *arguments)
    for a, b in zip(got, stock, strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a is b
    return got, layout if layout is not None and layout.visual.any() else None


def expected_layout(rows: list[list[int]], side: str = "right", limit: int = 10**6) -> Any:
    """Where one-tile images lie, by plain counting."""
    filled = []
    for row in rows:
        cells: list[tuple[int, int, int]] = []
        images = 0
        for token in row:
            if token == IMAGE:
                cells += [(images, i // SIDE, i % SIDE) for i in range(CELLS)]
                images += 1
            else:
                cells.append((-1, -1, -1))
        filled.append(cells[:limit])
    width = max(map(len, filled))
    table = torch.full((len(rows), width, 3), -1)
    for b, cells in enumerate(filled):
        start = width - len(cells) if side == "left" else 0
        table[b, start : start + len(cells)] = torch.tensor(cells)
    image, row, col = table.unbind(-1)
    return SimpleNamespace(visual=image >= 0, image=image, row=row, col=col)


def same_layout(layout: Any, expected: Any) -> None:
    for name in ("visual", "image", "row", "col"):
        assert torch.equal(getattr(layout, name), getattr(expected, name)), name


ROWS = {
    "middle": [[1, 5, IMAGE, 7, 8]],
    "first": [[IMAGE, 7, 8]],
    "last": [[1, 5, IMAGE]],
    "only": [[IMAGE, IMAGE]],
    "two": [[1, IMAGE, 7, 8, IMAGE, 9]],
    "adjacent": [[1, 5, IMAGE, IMAGE, 7]],
    "three": [[IMAGE, 4, IMAGE, IMAGE, 7]],
    "1/0/2": [[1, 5, IMAGE, 7], [1, 5, 6, 7, 8, 9], [1, IMAGE, IMAGE, 8, 9]],
    "0/0/1": [[1, 5], [1, 5, 6], [1, IMAGE, 9]],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_layout(flat: Any, config: Any, rows: list[list[int]], side: str) -> None:
    config.tokenizer_padding_side = side
    ids, mask = batch(rows, side)
    images = pixels(sum(max(1, row.count(IMAGE)) for row in rows))
    labels = torch.where(ids == IMAGE, -100, 1000 + ids)
    expected = expected_layout(rows, side)
    for form in (images, list(images), images[:, None], [image[None] for image in images]):
        for extra in ({}, {"labels": labels}, {"labels": labels, "position_ids": ids * 0}):
            _, layout = prepare(flat, ids, mask, form, **extra)
            same_layout(layout, expected)
            assert layout.grids == tuple(((SIDE, SIDE),) * row.count(IMAGE) for row in rows)
    _, layout = prepare(flat, ids, mask.bool(), images)
    same_layout(layout, expected)
    if len(rows) == 1:
        _, layout = prepare(flat, ids, None, images)
        same_layout(layout, expected)


def test_padding_without_a_mask_is_not_visual(flat: Any, config: Any) -> None:
    """Rows that the images make unequal, though no token of theirs is padding."""
    rows = [[1, 5, IMAGE, 7, 6], [1, 5, 6, 7, 8], [1, IMAGE, IMAGE, 8, 9]]
    for side in ("left", "right"):
        config.tokenizer_padding_side = side
        ids, _ = batch(rows)
        _, layout = prepare(flat, ids, None, pixels(4), labels=ids)
        same_layout(layout, expected_layout(rows, side))


@pytest.mark.parametrize("limit", [1, 2, 3, 9, 17, 18, 19, 25, 34, 36, 37])
def test_truncation(flat: Any, config: Any, limit: int) -> None:
    rows = [[1, 5, IMAGE, IMAGE, 7], [1, 5, 6]]
    config.tokenizer_model_max_length = limit
    ids, mask = batch(rows)
    _, layout = prepare(flat, ids, mask, pixels(3), labels=ids)
    if limit <= 2:
        assert layout is None
    else:
        same_layout(layout, expected_layout(rows, limit=limit))


def test_early_returns_hand_back_what_was_given(flat: Any) -> None:
    ids, mask = batch([[1, 5, 6]])
    for images, tokens in ((None, ids), (pixels(1), ids[:, :1])):
        for labels in (None, tokens):
            for given in (None, mask[:, : tokens.shape[1]]):
                _, layout = prepare(flat, tokens, given, images, labels=labels)
                assert layout is None


def test_text_only_batch_with_dummy_images(flat: Any) -> None:
    _, layout = prepare(flat, *batch([[1, 5], [1, 5, 6]]), pixels(2))
    assert layout is None


@pytest.mark.parametrize("size", [(50, 20), (20, 50), (37, 33), (28, 28), (100, 9), (56, 28)])
@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial", "flat"])
def test_anyres(anyres: Any, merge: str, size: tuple[int, int]) -> None:
    """Visual are exactly the features that the projector gave; newlines are text."""
    from llava.mm_utils import process_images

    model, processor = anyres
    model.config.mm_patch_merge_type = merge
    pictures = [random_llava.picture(1, *size), random_llava.picture(2, 30, 60)]
    images = process_images(pictures, processor, model.config)
    sizes = [picture.size for picture in pictures]
    ids, mask = batch([[1, 5, IMAGE, IMAGE, 7], [1, 5, 6]])
    dummy = torch.zeros(1, 3, PIXELS, PIXELS)
    got, layout = prepare(model, ids, mask, [*images, dummy], image_sizes=[*sizes, (9, 9)])
    assert not layout.visual[1].any() and layout.grids[1] == ()
    embeds, visual = got[4][0], layout.visual[0]
    place = 0
    for number, image in enumerate(images):
        with torch.no_grad():
            features = model.encode_images(image)  # (tiles, cells, d)
        if merge == "flat":
            grids = [(SIDE, SIDE)] * len(features)
            expected = features.flatten(0, 1)
        else:
            whole = stitched(features[1:], sizes[number], unpad=merge == "spatial_unpad")
            grids = [(SIDE, SIDE)] + ([tuple(whole.shape[:2])] if whole.numel() else [])
            expected = torch.cat([features[0], whole.flatten(0, 1)])
        index = list(range(len(layout.grids[0])))[place : place + len(grids)]
        assert [layout.grids[0][i] for i in index] == grids
        here = torch.isin(layout.image[0], torch.tensor(index))
        assert torch.allclose(embeds[here], expected, atol=1e-5)
        place += len(grids)
        for i, (_, cols) in zip(index, grids, strict=True):
            on = layout.image[0] == i
            cell = torch.arange(int(on.sum()))
            assert torch.equal(layout.row[0, on], cell // cols)
            assert torch.equal(layout.col[0, on], cell % cols)
    assert place == len(layout.grids[0])
    newlines = (embeds == model.model.image_newline).all(-1)
    assert bool(newlines.any()) == (merge == "spatial_unpad")
    assert not (newlines & visual).any()
    assert int(visual.sum() + newlines.sum()) == int(got[2][0].sum()) - 3


def stitched(tiles: Tensor, size: tuple[int, int], unpad: bool) -> Tensor:
    """(rows, cols, d): the tiles' cells side by side, without the margin that padding made."""
    from llava.mm_utils import select_best_resolution
    from llava.model.llava_arch import unpad_image

    across = select_best_resolution(size, PINPOINTS)[0] // PIXELS
    lines = [
        torch.cat([tile.view(SIDE, SIDE, -1) for tile in tiles[first : first + across]], 1)
        for first in range(0, len(tiles), across)
    ]
    whole = torch.cat(lines)
    return unpad_image(whole.permute(2, 0, 1), size).permute(1, 2, 0) if unpad else whole


def test_class_token_is_a_grid_of_its_own(flat: Any) -> None:
    tower = flat.get_vision_tower()
    tower.select_feature = "cls_patch"
    try:
        _, layout = prepare(flat, *batch([[1, IMAGE, 5]]), pixels(1))
    finally:
        tower.select_feature = "patch"
    assert layout.grids == (((1, 1), (SIDE, SIDE)),)
    assert int(layout.visual.sum()) == CELLS + 1


def test_wrong_counts_are_refused(flat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = batch([[1, IMAGE, IMAGE, 5], [1, 5, 6]])
    with pytest.raises(ValueError, match=r"holds 2 images.*use 3.*\[2, 0\]"):
        prepare(flat, ids, mask, pixels(2))
    tower = type(flat.get_vision_tower())
    monkeypatch.setattr(tower, "num_patches_per_side", SIDE + 1)
    with pytest.raises(ValueError, match=r"row 0: LLaVA put in 32 image features.*make 50"):
        prepare(flat, ids, mask, pixels(3))


def test_forward_tells_llavas_signature_and_ours(flat: Any) -> None:
    names = inspect.signature(flat.forward).parameters
    assert "images" in names and "visual_mask" in names and "visual_grids" in names
    # generate() of some versions goes by these: what is not told must not come, what comes is told.
    assert "cache_position" not in names
    passed = passed_to_every_forward()
    assert ("cache" in names) == ("cache" in passed)
    flat(torch.tensor([[1, 5]]), **dict.fromkeys(passed))


# ------------------------------------------------------------------ what it computes under a plan


def generated(model: Any, ids: Tensor, images: Any, **how: Any) -> Any:
    """generate() with scores; new tokens alone (4.36 puts a bos before them)."""
    how = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, **how}
    out = model.generate(
        ids, images=images, return_dict_in_generate=True, output_scores=True, **how
    )
    out.tokens = out.sequences[:, -len(out.scores) :]
    return out


def prepared(model: Any, ids: Tensor, mask: Tensor | None, images: Any) -> Any:
    """Embeddings, layout and mask that the oracle needs."""
    (_, _, mask, _, embeds, _), layout = prepare(model, ids, mask, images)
    if layout is None:
        layout = expected_layout([[0] * embeds.shape[1]] * len(embeds))
    return embeds, layout, mask


@torch.no_grad()
def close_to_oracle(model: Any, out: Any, embeds: Tensor, layout: Any, mask: Any) -> None:
    """Scores of each step (of a search without beams) against a full recomputation."""
    steps = out.tokens.shape[1] - 1
    embeds = torch.cat([embeds, model.model.embed_tokens(out.tokens[:, :-1])], 1)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, steps), value=1)
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    oracle = oracle_forward(model, a_plan(), embeds, extended(layout, steps), mask, positions)
    scores = torch.stack(out.scores, 1)
    known = scores > -1e9  # the end of text is ruled out
    assert (scores - oracle.logits[:, -steps - 1 :])[known].abs().max() < 1e-3


@pytest.mark.parametrize("beams", [1, 2])
def test_a_static_cache_gives_the_tokens_of_one_that_grows(
    flat: Any, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(transformers, "StaticCache"):
        pytest.skip("this transformers has no StaticCache")
    monkeypatch.delattr(flat, "hf_device_map", raising=False)  # by which 4.45 wants a GPU
    ids = torch.tensor([[1, 5, IMAGE, 6, 7], [1, IMAGE, 8, 9, 3]])
    expected = generated(flat, ids, pixels(2), num_beams=beams)
    for _ in range(2):
        found = generated(flat, ids, pixels(2), num_beams=beams, cache_implementation="static")
        assert torch.equal(found.tokens, expected.tokens)
        assert getattr(found, CACHE_FIELD).limit is not None


def test_a_model_call_within_generate_is_a_call_of_its_own(flat: Any) -> None:
    """Logits processors run models, too (contrastive decoding, guidance)."""
    ids, text = torch.tensor([[1, 5, IMAGE, 6, 7]]), torch.tensor([[1, 9, 8, 7, 6, 5, 9, 8]])
    other = torch.tensor([[1, IMAGE, 9]])
    with torch.no_grad():
        alone = flat(text).logits, flat(other, images=pixels(1, seed=4)).logits
    undisturbed = generated(flat, ids, pixels(1))
    seen = []

    def nested(_: Tensor, scores: Tensor) -> Tensor:
        seen.append((flat(text).logits, flat(other, images=pixels(1, seed=4)).logits))
        return scores

    out = generated(flat, ids, pixels(1), logits_processor=[nested])
    assert torch.equal(out.tokens, undisturbed.tokens)
    assert len(seen) == 6
    for pair in seen:
        assert all(torch.equal(a, b) for a, b in zip(pair, alone, strict=True))


def test_visual_mask_says_where_the_image_is_in_embeddings_of_ones_own(flat: Any) -> None:
    ids, mask = batch([[1, 5, IMAGE, 6, 7]])
    embeds, layout, _ = prepared(flat, ids, mask, pixels(1))
    with torch.no_grad():
        told = flat(inputs_embeds=embeds, visual_mask=layout.visual).logits
        shown = flat(ids, images=pixels(1)).logits
    assert torch.equal(told, shown)


def test_right_padding_gives_the_short_row_real_logits(flat: Any, config: Any) -> None:
    """Its first token is read off its last pad: a query that nothing else sees."""
    config.tokenizer_padding_side = "right"
    ids, mask = batch([[1, 5, IMAGE, 6, 7], [1, 5, 6, 7]])
    out = generated(flat, ids, pixels(2), attention_mask=mask)
    alone = generated(flat, ids[:1], pixels(1), attention_mask=mask[:1])
    assert torch.equal(out.tokens[0], alone.tokens[0])
    short = out.scores[0][1]
    assert short[short.isfinite()].std() > 0


def test_greedy_is_the_oracles(flat: Any) -> None:
    for row in ([1, 5, IMAGE, *WORDS], [IMAGE, IMAGE, 7], [1, *WORDS, IMAGE, 7, IMAGE]):
        ids, images = torch.tensor([row]), pixels(row.count(IMAGE))
        embeds, layout, _ = prepared(flat, ids, None, images)
        out = generated(flat, ids, images)
        close_to_oracle(flat, out, embeds, layout, None)
        expected = oracle_greedy(flat, a_plan(), embeds, layout, 6)
        assert torch.equal(out.tokens, expected)
        # The test could not fail if neither the plan nor the image made a difference.
        looser = a_plan(window=None, layer_cut=3, ffn_ratio=1)
        less_pruned = oracle_forward(flat, looser, embeds, layout)
        other = generated(flat, ids, pixels(row.count(IMAGE), seed=1))
        for score in (less_pruned.logits[:, -1], other.scores[0]):
            assert (out.scores[0] - score)[:, 3:].abs().max() > 0.1


def test_batch_is_its_rows_alone(flat: Any, config: Any) -> None:
    config.tokenizer_padding_side = "left"
    rows = [[1, 5, IMAGE, *WORDS], [1, 9, 4, 7], [1, IMAGE, IMAGE, 8, 9]]
    ids, mask = batch(rows, "left")
    images = pixels(4)
    own = (images[0:1], None, images[2:4])
    out = generated(flat, ids, images, attention_mask=mask)
    for b, (row, image) in enumerate(zip(rows, own, strict=True)):
        alone = generated(flat, torch.tensor([row]), image)
        assert torch.equal(out.tokens[b : b + 1], alone.tokens)
        for together, single in zip(out.scores, alone.scores, strict=True):
            assert torch.allclose(together[b], single[0], atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_without_a_mask_is_the_oracles(flat: Any, config: Any, side: str) -> None:
    """LLaVA then takes padding for tokens, and so must we."""
    config.tokenizer_padding_side = side
    ids = torch.tensor([[1, 5, IMAGE, 7, 6], [1, IMAGE, IMAGE, 8, 9]])
    embeds, layout, _ = prepared(flat, ids, None, pixels(3))
    close_to_oracle(flat, generated(flat, ids, pixels(3)), embeds, layout, None)


def test_beams(flat: Any, config: Any) -> None:
    """The score that each beam ends with is its log-probability by the oracle."""
    config.tokenizer_padding_side = "left"
    ids, mask = batch([[1, 5, IMAGE, *WORDS], [1, IMAGE, IMAGE, 8, 9]], "left")
    images = pixels(3)
    embeds, layout, prepared_mask = prepared(flat, ids, mask, images)
    how = dict(num_beams=3, num_return_sequences=2, length_penalty=0.0, min_new_tokens=None)
    out = flat.generate(
        ids,
        images=images,
        attention_mask=mask,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
        **how,
    )
    tokens = out.sequences[:, -5:]
    repeated = SimpleNamespace(
        **{
            name: getattr(layout, name).repeat_interleave(2, 0)
            for name in ("visual", "image", "row", "col")
        }
    )
    with torch.no_grad():
        embeds = torch.cat([embeds.repeat_interleave(2, 0), flat.model.embed_tokens(tokens)], 1)
    mask = torch.nn.functional.pad(prepared_mask.repeat_interleave(2, 0), (0, 5), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    oracle = oracle_forward(flat, a_plan(), embeds, extended(repeated, 5), mask, positions)
    logprobs = oracle.logits[:, -6:-1].log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
    assert not (tokens == 2).any()  # else the sums would go too far
    assert torch.allclose(out.sequences_scores.double(), logprobs, atol=1e-3)
    assert (tokens[0] != tokens[1]).any()


def test_sampling_with_a_seed(flat: Any) -> None:
    ids, images = torch.tensor([[1, 5, IMAGE, *WORDS]]), pixels(1)
    embeds, layout, _ = prepared(flat, ids, None, images)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(
            generated(
                flat, ids, images, do_sample=True, top_k=0, temperature=1.0, num_return_sequences=3
            )
        )
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    assert len({tuple(row.tolist()) for row in outs[0].tokens}) > 1
    for row in range(3):
        one = SimpleNamespace(
            tokens=outs[0].tokens[row : row + 1], scores=[s[row : row + 1] for s in outs[0].scores]
        )
        close_to_oracle(flat, one, embeds, layout, None)


def test_streamer(flat: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    ids, images, streamer = torch.tensor([[1, 5, IMAGE, *WORDS]]), pixels(1), Streamer()
    out = generated(flat, ids, images, streamer=streamer)
    assert streamer.seen[-7:] == [*out.tokens[0].tolist(), -1]


def test_training_forward(flat: Any) -> None:
    rows = [[1, 5, IMAGE, *WORDS], [1, 9, 4, 7], [1, IMAGE, IMAGE, 8, 9]]
    ids, mask = batch(rows)
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    images = list(pixels(4))
    out = flat(ids, attention_mask=mask, labels=labels, images=images)
    (_, _, new_mask, _, embeds, new_labels), layout = prepare(
        flat, ids, mask, images, labels=labels
    )
    same_layout(layout, expected_layout(rows))
    oracle = oracle_forward(flat, a_plan(), embeds, layout, new_mask)
    assert abs(out.loss.double() - oracle_loss(oracle.logits, new_labels)) < 1e-4
    flat.zero_grad()
    out.loss.backward()
    assert flat.model.mm_projector[0].weight.grad.abs().sum() > 0
    flat.zero_grad()


@torch.no_grad()
def test_manual_decoding_and_a_second_image(flat: Any) -> None:
    """forward after forward with a cache, the second chunk with an image of its own."""
    images = pixels(2)
    rows = ([1, 5, IMAGE, 7, 8], [9, IMAGE, 4])
    whole = torch.tensor([[*rows[0], *rows[1]]])
    embeds, layout, _ = prepared(flat, whole, None, images)
    expected = oracle_forward(flat, a_plan(), embeds, layout).logits
    first = flat(torch.tensor([rows[0]]), images=images[:1], use_cache=True)
    second = flat(torch.tensor([rows[1]]), images=images[1:], past_key_values=first.past_key_values)
    got = torch.cat([first.logits, second.logits], 1)
    assert (got - expected).abs().max() < 1e-3
    more = flat(torch.tensor([[6]]), past_key_values=second.past_key_values).logits
    embeds = torch.cat([embeds, flat.model.embed_tokens(torch.tensor([[6]]))], 1)
    expected = oracle_forward(flat, a_plan(), embeds, extended(layout, 1)).logits[:, -1:]
    assert (more - expected).abs().max() < 1e-3


@torch.no_grad()
def test_anyres_logits(anyres: Any) -> None:
    from llava.mm_utils import process_images

    model, processor = anyres
    model.config.mm_patch_merge_type = "spatial_unpad"
    pictures = [random_llava.picture(1, 50, 20)]
    images, sizes = process_images(pictures, processor, model.config), [pictures[0].size]
    ids = torch.tensor([[1, 5, IMAGE, 7]])
    got, layout = prepare(model, ids, None, list(images), image_sizes=sizes)
    expected = oracle_forward(model, a_plan(), got[4], layout).logits
    logits = model(ids, images=list(images), image_sizes=sizes).logits
    assert (logits - expected).abs().max() < 1e-3
    out = generated(model, ids, list(images), image_sizes=sizes)
    close_to_oracle(model, out, got[4], layout, None)


# ---------------------------------------------------------- whole programs, each in its own process

COMPARE = """
import hashlib, json, sys, torch
from llava.model.builder import load_pretrained_model
torch.set_num_threads(1)
loaded = load_pretrained_model(sys.argv[1], None, "llava-v1-random", device="cpu")
model, answers = loaded[1], {}
images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).half()
text = torch.tensor([[1, 5, 9, 4, 7, 12, 33], [1, 8, 4, 7, 3, 21, 34]])
shown = torch.tensor([[1, -200, 9, 4, 7, 12, 33], [1, 8, 4, -200, 3, 21, 34]])
def add(name, compute):
    try:
        with torch.no_grad():
            value = compute()
    except TypeError as error:
        assert "cache" in str(error), error
        value = None  # LLaVA alone, with transformers 4.38 to 5.3 and from 5.24 on
    answers[name] = value if value is None else hashlib.sha256(value.numpy().tobytes()).hexdigest()
for name, how in {"greedy": {}, "beams": {"num_beams": 2}, "sample": {"do_sample": True}}.items():
    torch.manual_seed(1)
    how = {"do_sample": False, "max_new_tokens": 5, **how}
    add("text " + name, lambda: model.generate(text, **how))
    add("shown " + name, lambda: model.generate(shown, images=images, **how))
add("text logits", lambda: model(text).logits)
add("shown logits", lambda: model(shown, images=images, labels=text).logits)
print(json.dumps(answers))
"""


def run(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    import os

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )


@needs_float16
@pytest.mark.parametrize("with_plan", [False, True])
def test_where_nothing_is_pruned_all_is_stocks(tmp_path: Path, with_plan: bool) -> None:
    """To the bit: without a plan everything; with one, what shows no image."""
    folder = random_llava.make(tmp_path, a_plan() if with_plan else None)
    script = tmp_path / "compare.py"
    script.write_text(COMPARE)
    answers = []
    for how in (["-m", "yopo", "run"], []):
        done = run(*how, str(script), str(folder))
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    ours, stock = answers
    for name, value in stock.items():
        if value is None:
            assert ours[name] is not None  # where LLaVA alone raises, the patch makes it work
        elif name.startswith("text") or not with_plan:
            assert ours[name] == value, name
    assert with_plan == (ours["shown logits"] != stock["shown logits"])


@needs_float16
def test_cli_two_turns(checkpoint: Path, tmp_path: Path) -> None:
    random_llava.picture(1).save(tmp_path / "picture.png")
    done = run(
        "-m", "yopo", "run", "-m", "llava.serve.cli", "--model-path", str(checkpoint),
        "--image-file", str(tmp_path / "picture.png"), "--device", "cpu", "--temperature", "0",
        "--max-new-tokens", "5", stdin="what is in this image?\nhow many?\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ASSISTANT: ") == 2
    assert done.stdout.rstrip().endswith("exit...")


@needs_float16
def test_eval_model(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llava.eval.run_llava import eval_model

    random_llava.picture(1).save(tmp_path / "picture.png")
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)  # hard-coded there
    eval_model(
        argparse.Namespace(
            model_path=str(checkpoint),
            model_base=None,
            image_file=str(tmp_path / "picture.png"),
            query="what is in this image?",
            conv_mode=None,
            sep=",",
            temperature=0,
            top_p=None,
            num_beams=1,
            max_new_tokens=4,
        )
    )
    assert capsys.readouterr().out.strip()


APPLY = """
import sys, torch
from llava.model.builder import load_pretrained_model
sys.path.insert(0, sys.argv[2])
import random_llava, yopo
torch.set_num_threads(1)
loaded = load_pretrained_model(sys.argv[1], None, "llava-v1-random", device="cpu")
model, before = random_llava.in_float32(loaded[1]), type(loaded[1])
images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
ids = torch.tensor([[1, -200, 9, 4, 7, 12, 33], [1, 8, 4, -200, 3, 21, 34]])
with torch.no_grad():
    dense = model(ids, images=images).logits
    yopo.apply(model, random_llava.a_plan())
    pruned = model(ids, images=images).logits
    tokens = model.generate(ids, images=images, do_sample=False, max_new_tokens=4)[:, -4:]
    yopo.remove(model)
    assert type(model) is before and torch.equal(model(ids, images=images).logits, dense)
torch.save((pruned, tokens), sys.argv[3])
"""


def test_apply_to_a_model_of_stock_llava(flat: Any, tmp_path: Path) -> None:
    folder = random_llava.make(tmp_path)
    script = tmp_path / "apply.py"
    script.write_text(APPLY)
    done = run(str(script), str(folder), str(ROOT / "tests/support"), str(tmp_path / "out.pt"))
    assert done.returncode == 0, done.stderr
    pruned, tokens = torch.load(tmp_path / "out.pt", weights_only=True)
    ids = torch.tensor([[1, -200, 9, 4, 7, 12, 33], [1, 8, 4, -200, 3, 21, 34]])
    embeds, layout, _ = prepared(flat, ids, None, pixels(2))
    expected = oracle_forward(flat, a_plan(), embeds, layout).logits
    assert (pruned - expected).abs().max() < 1e-3
    assert torch.equal(tokens, oracle_greedy(flat, a_plan(), embeds, layout, 4))
