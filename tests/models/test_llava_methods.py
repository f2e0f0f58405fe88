"""LLaVA's methods as people have them: their own ones are called as the caller called them, those
put back after loading are watched again, classes that let nothing be set stay whole."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import random_llava
import torch
from random_llava import IMAGE, PINPOINTS, SIDE, a_plan, batch, load, pixels

import yopo
from yopo.engine.layout import VisualLayout
from yopo.models.known_layouts import recall

if importlib.util.find_spec("llava") is None:
    pytest.skip("llava-torch is not installed", allow_module_level=True)
pytestmark = pytest.mark.llava

PREPARE = "prepare_inputs_labels_for_multimodal"
IDS = torch.tensor([[1, 5, IMAGE, 7, 8, 17, 40, 23]])
ROWS = [[1, 5, IMAGE, 7, 8], [1, 9, 4, IMAGE, 35, 90, IMAGE, 28], [IMAGE, 3]]
HOW = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5)
CELLS = SIDE * SIDE


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    import yopo.patch

    yopo.patch.enable()
    yield
    yopo.patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava.make(tmp_path_factory.mktemp("methods"), a_plan())


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder)[0].requires_grad_(False)


@pytest.fixture
def model(loaded: Any, meta: Any, leaf: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As loaded; what a test sets on it or on LLaVA's classes goes again."""
    cls, attributes, config = type(loaded), dict(vars(loaded)), dict(vars(loaded.config))
    for owner in (meta, leaf):
        for name in {PREPARE, "forward", "prepare_inputs_for_generation"} & vars(owner).keys():
            monkeypatch.setattr(owner, name, vars(owner)[name])  # to be put back
    yield loaded
    loaded.__class__ = cls
    for now, before in ((vars(loaded), attributes), (vars(loaded.config), config)):
        for name in now.keys() - before.keys():
            del now[name]


@pytest.fixture(scope="module")
def meta() -> Any:
    from llava.model.llava_arch import LlavaMetaForCausalLM

    return LlavaMetaForCausalLM


@pytest.fixture(scope="module")
def leaf() -> Any:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    return LlavaLlamaForCausalLM


def llavas_own(meta: Any) -> Any:
    return inspect.unwrap(vars(meta)[PREPARE])


def put_on(monkeypatch: pytest.MonkeyPatch, model: Any, leaf: Any, method: Any, where: str) -> None:
    if where == "class":
        monkeypatch.setattr(leaf, PREPARE, method, raising=False)
    else:
        model.__class__ = type("Mine", (leaf,), {PREPARE: method})
        yopo.remove(model)
        yopo.apply(model, a_plan())


# -------------------------------------------------------------------------- methods of one's own


def counting(own: Any, seen: list[Any]) -> Any:
    """As LLaVA's; it sees whether there are labels and a mask."""

    def prepare(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
        image_sizes=None,
    ):  # fmt: skip
        seen.append((labels, attention_mask, torch.is_grad_enabled()))
        return own(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
            image_sizes,
        )  # fmt: skip

    return prepare


def other_without_labels(own: Any, seen: list[Any]) -> Any:
    """Features are halved where there are no labels: at inference."""

    def prepare(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
        image_sizes=None,
    ):  # fmt: skip
        seen.append((labels, attention_mask, torch.is_grad_enabled()))
        out = list(own(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
            image_sizes,
        ))  # fmt: skip
        if out[4] is not None and labels is None and attention_mask is None:
            out[4] = out[4].clone()
            out[4][:, 2 : 2 + CELLS] *= 0.5
        return tuple(out)

    return prepare


def stochastic(own: Any, seen: list[Any]) -> Any:
    """Noise on the features, anew at each call."""

    def prepare(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
        image_sizes=None,
    ):  # fmt: skip
        seen.append((labels, attention_mask, torch.is_grad_enabled()))
        out = list(own(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
            image_sizes,
        ))  # fmt: skip
        if out[4] is not None:
            out[4] = out[4].clone()
            out[4][:, 2 : 2 + CELLS] += torch.randn(CELLS, out[4].shape[2])
        return out

    return prepare


def of_any_arguments(own: Any, seen: list[Any]) -> Any:
    def prepare(self, *args, **kwargs):
        seen.append((args[4], args[2], torch.is_grad_enabled()))
        return own(self, *args, **kwargs)

    return prepare


OWN = [counting, other_without_labels, stochastic, of_any_arguments]


@pytest.mark.parametrize("make", OWN)
@pytest.mark.parametrize("where", ["class", "subclass"])
@torch.no_grad()
def test_a_method_of_one_s_own_is_called_once_as_it_was_called(
    model: Any, meta: Any, leaf: Any, monkeypatch: pytest.MonkeyPatch, make: Any, where: str
) -> None:
    seen: list[Any] = []
    method = make(llavas_own(meta), seen)
    put_on(monkeypatch, model, leaf, method, where)
    torch.manual_seed(3)
    got = model(IDS, images=pixels(1)).logits
    assert [call[:2] for call in seen] == [(None, None)]
    torch.manual_seed(3)
    embeds = method(model, IDS, None, None, None, None, pixels(1))[4]
    assert torch.equal(
        got, model(inputs_embeds=embeds.clone(), visual_mask=visual_at_two().visual).logits
    )
    seen.clear()
    model.generate(IDS, images=pixels(1), **HOW)
    assert seen[0][:2] == (None, None)


@torch.no_grad()
def test_a_caller_s_labels_and_mask_reach_a_method_of_one_s_own(
    model: Any, meta: Any, leaf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    put_on(monkeypatch, model, leaf, counting(llavas_own(meta), seen), "class")
    mask, labels = torch.ones_like(IDS), IDS.masked_fill(IDS == IMAGE, -100)
    with torch.enable_grad():
        model(IDS, images=pixels(1), labels=labels, attention_mask=mask)
    assert seen[0][0] is labels and seen[0][1] is mask and seen[0][2]


FORMS: dict[str, dict[str, Any]] = {
    "flat": {},
    "cut": {"tokenizer_model_max_length": 20},
    "tiles": dict(mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_what_one_s_own_method_makes_of_a_batch_has_llava_s_layout(
    tmp_path: Path, meta: Any, leaf: Any, form: str, side: str, masked: bool
) -> None:
    fields = {**FORMS[form], "image_grid_pinpoints": PINPOINTS, "tokenizer_padding_side": side}
    model, processor = load(random_llava.make(tmp_path, a_plan(), **fields))
    from llava.mm_utils import process_images

    ids, mask = batch(ROWS, side)
    sizes = [(40, 30), (20, 60), (50, 50), (30, 31)]
    images: Any = pixels(4)
    if form == "tiles":
        pictures = [random_llava.picture(i, *size) for i, size in enumerate(sizes)]
        images = list(process_images(pictures, processor, model.config))
        model.model.image_newline.data.normal_()
    arguments = (ids, None, mask if masked else None, None, None, images, sizes)
    nothing = VisualLayout.empty(len(ROWS))
    expected = recall(getattr(model, PREPARE)(*arguments)[4], nothing)

    seen: list[Any] = []
    inner = llavas_own(meta)

    def noisy(self: Any, *args: Any) -> Any:  # so that nothing is known of it by content
        out = list(inner(self, *args))
        seen.append(1)
        out[4] = torch.where(expected.visual[..., None], out[4] + 1, out[4])
        return out

    model.__class__ = type("Mine", (type(model),), {})
    setattr(type(model), PREPARE, noisy)
    model(ids, attention_mask=arguments[2], images=images, image_sizes=sizes)
    embeds = getattr(model, PREPARE)(*arguments)[4]
    assert len(seen) == 2
    same_layout(recall(embeds, nothing), expected)


def text_scaled(out: list[Any]) -> None:
    out[4] = out[4] * 1.5


def tokens_in_front(out: list[Any]) -> None:
    out[4] = torch.cat([torch.ones_like(out[4][:, :3]), out[4]], 1)


def moved_about(out: list[Any]) -> None:
    out[4] = torch.cat([out[4][:, 2 : 2 + CELLS] + 1, out[4][:, :2], out[4][:, 2 + CELLS :]], 1)


def features_left_out(out: list[Any]) -> None:
    out[4] = torch.cat([out[4][:, :4] + 1, out[4][:, 2 + CELLS :]], 1)


@pytest.mark.parametrize("change", [text_scaled, tokens_in_front, moved_about, features_left_out])
@torch.no_grad()
def test_what_is_not_laid_out_as_llava_does_is_refused(
    model: Any, meta: Any, leaf: Any, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    own = llavas_own(meta)

    def prepare(self, *args, **kwargs):
        out = list(own(self, *args, **kwargs))
        change(out)
        return out

    put_on(monkeypatch, model, leaf, prepare, "class")
    with pytest.raises(ValueError, match=r"nothing is known of these inputs_embeds.*visual_mask"):
        model(IDS, images=pixels(1))


@torch.no_grad()
def test_images_of_a_method_s_own_kind_are_its_own_affair(
    model: Any, leaf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number for an image, say: no error of ours while it prepares."""
    made = torch.randn(1, 9, model.config.hidden_size)

    def prepare(self, *args, **kwargs):
        return None, None, None, None, made, None

    put_on(monkeypatch, model, leaf, prepare, "class")
    visual = torch.zeros(1, 9, dtype=torch.bool)
    for images in (7, [7], {"left": 7}, "image.png"):
        out = getattr(model, PREPARE)(IDS, None, None, None, None, images)
        assert out[4] is made
        with pytest.raises(ValueError, match="nothing is known of these inputs_embeds"):
            model(IDS, images=images)
        assert model(IDS, images=images, visual_mask=visual).logits.isfinite().all()


# ------------------------------------------------------------------------- put back after loading


@pytest.mark.parametrize("where", ["meta", "leaf"])
@torch.no_grad()
def test_llava_s_own_method_put_back_is_watched_again(
    model: Any, meta: Any, leaf: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = model(IDS, images=pixels(1)).logits
    shown = model.generate(IDS, images=pixels(1), **HOW)
    own = llavas_own(meta)
    owner = {"meta": meta, "leaf": leaf}[where]
    for images in (pixels(1, 5), pixels(1, 6)):  # again and again, and features not seen before
        monkeypatch.setattr(owner, PREPARE, own, raising=False)
        again = model.generate(IDS, images=images, **HOW)
        monkeypatch.setattr(owner, PREPARE, own, raising=False)
        assert model(IDS, images=images).logits.isfinite().all()
        assert torch.equal(again, model.generate(IDS, images=images, **HOW))
    monkeypatch.setattr(owner, PREPARE, own, raising=False)
    assert torch.equal(model(IDS, images=pixels(1)).logits, expected)
    assert torch.equal(model.generate(IDS, images=pixels(1), **HOW), shown)


@torch.no_grad()
def test_all_of_llava_s_methods_put_back(
    model: Any, meta: Any, leaf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = model.generate(IDS, images=pixels(1, 7), **HOW)
    for owner in (meta, leaf):
        for name in {PREPARE, "forward", "prepare_inputs_for_generation"} & vars(owner).keys():
            monkeypatch.setattr(owner, name, inspect.unwrap(vars(owner)[name]))
    assert torch.equal(model.generate(IDS, images=pixels(1, 7), **HOW), shown)


@torch.no_grad()
def test_a_method_of_one_s_own_put_on_after_loading_is_watched(
    model: Any, meta: Any, leaf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around LLaVA's own as it was before anything was loaded."""
    expected = model(IDS, images=pixels(1)).logits
    seen: list[Any] = []
    monkeypatch.setattr(meta, PREPARE, counting(llavas_own(meta), seen))
    assert torch.equal(model(IDS, images=pixels(1)).logits, expected)
    assert torch.equal(model(IDS, images=pixels(1, 8)).logits[:, :2], expected[:, :2])
    assert len(seen) == 2


@pytest.mark.parametrize("how", ["bound", "function"])
@torch.no_grad()
def test_a_method_of_one_s_own_put_on_the_model_is_watched(model: Any, meta: Any, how: str) -> None:
    """Around LLaVA's own as it was before anything was loaded."""
    expected = model(IDS, images=pixels(1)).logits
    seen: list[Any] = []
    method = stochastic(llavas_own(meta), seen)
    bound = types.MethodType(method, model)
    setattr(model, PREPARE, bound if how == "bound" else lambda *a, **k: bound(*a, **k))
    for _ in range(2):
        got = model(IDS, images=pixels(1)).logits
        assert not torch.equal(got, expected)
    model.generate(IDS, images=pixels(1), **HOW)
    assert [call[:2] for call in seen[:3]] == [(None, None)] * 3
    embeds = getattr(model, PREPARE)(IDS, None, None, None, None, pixels(1))[4]
    same_layout(recall(embeds, VisualLayout.empty(1)), visual_at_two())
    twin = copy.deepcopy(model)
    assert vars(twin)[PREPARE].__self__ is twin


def visual_at_two() -> VisualLayout:
    visual = torch.zeros(1, IDS.shape[1] - 1 + CELLS, dtype=torch.bool)
    visual[:, 2 : 2 + CELLS] = True
    return VisualLayout.from_mask(visual)


def same_layout(got: Any, expected: Any) -> None:
    for name in ("visual", "image", "row", "col"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.grids == expected.grids


@torch.no_grad()
def test_prepared_by_hand_after_a_method_was_put_back(
    model: Any, meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody sees that before the next call: refused then, and right from then on.
    (A picture of its own: embeddings that any test made with the same weights would be known.)"""
    expected = model(IDS, images=pixels(1, 11)).logits
    monkeypatch.setattr(meta, PREPARE, llavas_own(meta))
    arguments = (IDS, None, None, None, None)
    unseen = getattr(model, PREPARE)(*arguments, pixels(1, 7312))[4]
    with pytest.raises(ValueError, match=r"put in its place .*prepare them again"):
        model(inputs_embeds=unseen)
    embeds = getattr(model, PREPARE)(*arguments, pixels(1, 11))[4]
    assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    assert model(inputs_embeds=getattr(model, PREPARE)(*arguments, pixels(1, 7312))[4]) is not None


# ----------------------------------------------------------- classes that let no method be set


class Sealed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        if inspect.isfunction(value):
            raise AttributeError(f"{cls.__name__} is sealed")
        super().__setattr__(name, value)


class Quiet(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        if not inspect.isfunction(value):  # else nothing, without a word
            super().__setattr__(name, value)


class Unequal(type):
    """Without a hash, as all that say what is equal and nothing else."""

    def __eq__(cls, other: object) -> bool:
        return cls is other

    __hash__ = None  # type: ignore[assignment]


def sealed_leaf(leaf: Any, meta: Any, metaclass: type, name: str) -> Any:
    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return leaf.forward(self, input_ids, past_key_values=past_key_values, **kwargs)

    methods = {PREPARE: counting(llavas_own(meta), []), "forward": forward}
    kind = metaclass
    if not issubclass(metaclass, type(leaf)):
        kind = types.new_class("Kind", (metaclass, type(leaf)))
    return kind("Mine", (leaf,), {name: methods[name]})


@pytest.mark.parametrize("metaclass", [Sealed, Quiet])
@torch.no_grad()
def test_a_class_that_lets_nothing_be_set_stays_a_dense_model(
    tmp_path: Path, folder: Path, leaf: Any, meta: Any, metaclass: type
) -> None:
    mine = sealed_leaf(leaf, meta, metaclass, PREPARE)
    dense = random_llava.make(tmp_path)
    stock = load(dense)[0]
    model = mine.from_pretrained(dense)
    model.get_vision_tower().load_model()
    random_llava.in_float32(model)
    assert type(model) is mine
    expected = stock(IDS, images=pixels(1)).logits
    assert torch.equal(model(IDS, images=pixels(1)).logits, expected)
    with pytest.raises(TypeError, match=rf"Mine\.{PREPARE} cannot be set .* without a plan"):
        mine.from_pretrained(folder)
    with pytest.raises(TypeError, match=rf"Mine\.{PREPARE} cannot be set"):
        yopo.apply(model, a_plan())
    assert type(model) is mine and yopo.plan_of(model) is None
    assert torch.equal(model(IDS, images=pixels(1)).logits, expected)


@torch.no_grad()
def test_a_dense_model_of_a_class_without_a_hash_goes_on(
    tmp_path: Path, leaf: Any, meta: Any
) -> None:
    from yopo.models.original_llava import instrument

    mine = sealed_leaf(leaf, meta, Unequal, PREPARE)
    with pytest.raises(TypeError, match="unhashable"):
        hash(mine)
    instrument(mine)
    assert inspect.unwrap(vars(mine)[PREPARE]) is not vars(mine)[PREPARE]
