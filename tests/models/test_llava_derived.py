"""What people do who derive from the original LLaVA: replace, override and wrap its methods,
prepare embeddings by hand, run the model within itself. All of it is pruned right, or refused."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import random_llava
import torch
from layouts import needs_float16
from oracle import oracle_forward
from random_llava import IMAGE, a_plan, batch, load, pixels
from torch import Tensor

import yopo
from yopo.engine.layout import VisualLayout
from yopo.models.known_layouts import recall

if importlib.util.find_spec("llava") is None:
    pytest.skip("llava-torch is not installed", allow_module_level=True)
pytestmark = [pytest.mark.llava, pytest.mark.usefixtures("patched")]

ROOT = Path(__file__).resolve().parents[2]
PREPARE = "prepare_inputs_labels_for_multimodal"
IDS = torch.tensor([[1, 5, IMAGE, 7, 8, 17, 40, 23]])
OTHER = torch.tensor([[1, 9, 4, 61, IMAGE, 35, 90, 11, 12, IMAGE, 28]])
HOW = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava.make(tmp_path_factory.mktemp("derived"), a_plan())


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load(folder)[0].requires_grad_(False)


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    """As loaded; what a test sets on it, and the class that it gives it, go again."""
    cls, attributes = type(loaded), dict(vars(loaded))
    yield loaded
    loaded.__class__ = cls
    for name in vars(loaded).keys() - attributes.keys():
        delattr(loaded, name)


@pytest.fixture
def classes() -> Any:
    from llava.model.language_model import llava_llama, llava_mpt
    from llava.model.llava_arch import LlavaMetaForCausalLM

    class Classes:
        meta, leaf = LlavaMetaForCausalLM, llava_llama.LlavaLlamaForCausalLM
        mpt, mpt_config = llava_mpt.LlavaMptForCausalLM, llava_mpt.LlavaMptConfig

    return Classes


def reference(model: Any, ids: Tensor = IDS, seed: int = 0) -> Tensor:
    """Of the model as loaded, and pruned: what the oracle says."""
    images = pixels(int((ids == IMAGE).sum()), seed)
    logits = model(ids, images=images).logits
    embeds = by_hand(model, ids, seed)
    layout = recall(embeds, VisualLayout.empty(len(embeds)))
    truth = oracle_forward(model, a_plan(), embeds, layout).logits
    assert (logits - truth).abs().max() < 1e-3
    dense = oracle_forward(model, a_plan(window=None, layer_cut=3, ffn_ratio=1), embeds, layout)
    assert (dense.logits - truth).abs().max() > 0.1
    return logits


def by_hand(model: Any, ids: Tensor = IDS, seed: int = 0) -> Tensor:
    images = pixels(int((ids == IMAGE).sum()), seed)
    return model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images)[4]


# -------------------------------------------------------------------------- replaced methods


def through_any_arguments(original: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    return lambda *a, **k: (seen.append(1), original(*a, **k))[1]


def through_names(original: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    def prepare(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
        image_sizes=None,
    ):  # fmt: skip
        seen.append(1)
        return original(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
            image_sizes,
        )  # fmt: skip

    return prepare


def decorated(original: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return original(*args, **kwargs)

    return prepare


def under_no_grad(original: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    return torch.no_grad()(through_names(original, seen))


REPLACEMENTS = [through_any_arguments, through_names, decorated, under_no_grad]


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("where", ["meta", "leaf", "instance"])
@torch.no_grad()
def test_a_method_replaced_after_loading_is_called(
    model: Any, classes: Any, monkeypatch: pytest.MonkeyPatch, where: str, replace: Any
) -> None:
    expected = reference(model), reference(model, OTHER)
    seen: list[int] = []
    new = replace(getattr(classes.meta, PREPARE), seen)
    if where == "instance":
        setattr(model, PREPARE, new.__get__(model))
    else:
        monkeypatch.setattr(getattr(classes, where), PREPARE, new, raising=False)
    assert torch.equal(model(IDS, images=pixels(1)).logits, expected[0])
    assert torch.equal(model(OTHER, images=pixels(2)).logits, expected[1])
    assert len(seen) == 2


@torch.no_grad()
def test_a_partial_on_the_instance_is_called(model: Any) -> None:
    expected = reference(model)
    setattr(model, PREPARE, functools.partial(getattr(model, PREPARE)))
    assert torch.equal(model(IDS, images=pixels(1)).logits, expected)


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("where", ["meta", "leaf"])
@pytest.mark.parametrize("pruned", [True, False])
@torch.no_grad()
def test_a_method_replaced_before_loading_is_called(
    model: Any,
    classes: Any,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    replace: Any,
    pruned: bool,
) -> None:
    """By one that holds LLaVA's own, of before any model was loaded."""
    expected = reference(model)
    seen: list[int] = []
    own = inspect.unwrap(vars(classes.meta)[PREPARE])
    monkeypatch.setattr(classes.meta, PREPARE, own)
    monkeypatch.setattr(getattr(classes, where), PREPARE, replace(own, seen), raising=False)
    another = load(folder if pruned else random_llava.make(tmp_path))[0]
    got = another(IDS, images=pixels(1)).logits
    assert len(seen) == 1
    assert torch.equal(got, expected) == pruned
    assert (yopo.plan_of(another) is not None) == pruned


@torch.no_grad()
def test_a_copy_of_the_method_with_changes_is_followed(
    model: Any, classes: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a module that has not all of LLaVA's names."""
    expected = reference(model)
    source = inspect.getsource(inspect.unwrap(vars(classes.meta)[PREPARE]))
    lines = ["import torch", "IMAGE_TOKEN_INDEX = -200", "if True:", source]
    code = "\n".join(lines).replace("IGNORE_INDEX", "-100")
    names: dict[str, Any] = {}
    exec(code, names)
    monkeypatch.setattr(classes.leaf, PREPARE, names[PREPARE], raising=False)
    another = load(folder)[0]
    assert torch.equal(another(IDS, images=pixels(1)).logits, expected)


@torch.no_grad()
def test_embeddings_that_nobody_remembers_are_refused(model: Any, classes: Any) -> None:
    """A wholesale replacement: never a layout of something else."""
    reference(model)
    made = torch.randn(1, 23, model.config.hidden_size)
    setattr(model, PREPARE, lambda *a, **k: (None, None, None, None, made, None))
    with pytest.raises(ValueError, match=r"nothing is known of these inputs_embeds.*visual_mask"):
        model(IDS, images=pixels(1))
    with pytest.raises(ValueError, match=r"nothing is known of these inputs_embeds"):
        model.generate(IDS, images=pixels(1), **HOW)
    visual = torch.zeros(1, 23, dtype=torch.bool)
    assert model(IDS, images=pixels(1), visual_mask=visual).logits.isfinite().all()


@torch.no_grad()
def test_an_own_method_that_moves_tokens_about_is_refused(model: Any) -> None:
    """Some features merged, say: no part of what was prepared."""
    whole = by_hand(model)

    def merged(*args: Any, **kwargs: Any) -> Any:
        *first, embeds, labels = type(model).prepare_inputs_labels_for_multimodal(
            model, *args, **kwargs
        )
        pairs = (embeds[:, 2:18:2] + embeds[:, 3:19:2]) / 2
        return *first, torch.cat([embeds[:, :2], pairs, embeds[:, 18:]], 1), labels

    setattr(model, PREPARE, merged)
    assert whole.shape[1] == 23
    with pytest.raises(ValueError, match="nothing is known of these inputs_embeds of 15 tokens"):
        model(IDS, images=pixels(1))


# --------------------------------------------------------------------------------- subclasses


def with_any_forward(leaf: type) -> type:
    class Mine(leaf):
        def forward(self, **kwargs: Any) -> Any:
            return super().forward(**kwargs)

    return Mine


def with_llavas_forward(leaf: type) -> type:
    """As of 2023: it knows neither cache_position nor cache."""

    class Mine(leaf):
        def forward(
            self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
            inputs_embeds=None, labels=None, use_cache=None, output_attentions=None,
            output_hidden_states=None, images=None, image_sizes=None, return_dict=None,
        ):  # fmt: skip
            return super().forward(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels,
                use_cache, output_attentions, output_hidden_states, images, image_sizes,
                return_dict,
            )  # fmt: skip

    return Mine


def with_own_prepare(leaf: type) -> type:
    class Mine(leaf):
        def prepare_inputs_labels_for_multimodal(self, ids, *rest, **more):
            return super().prepare_inputs_labels_for_multimodal(ids, *rest, **more)

    return Mine


def with_a_mixin_between(leaf: type) -> type:
    class Between:
        def prepare_inputs_labels_for_multimodal(self, *args, **kwargs):
            return list(super().prepare_inputs_labels_for_multimodal(*args, **kwargs))

        def encode_images(self, images):
            return super().encode_images(images)

    return type("Mine", (Between, leaf), {})


def with_a_longer_signature(leaf: type) -> type:
    class Mine(leaf):
        def prepare_inputs_labels_for_multimodal(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images,
            image_sizes=None, boxes=(),
        ):  # fmt: skip
            assert labels is None  # what it is given, not what we need
            return super().prepare_inputs_labels_for_multimodal(
                input_ids, position_ids, attention_mask, past_key_values, labels, images,
                image_sizes,
            )  # fmt: skip

    return Mine


SUBCLASSES = [
    with_any_forward,
    with_llavas_forward,
    with_own_prepare,
    with_a_mixin_between,
    with_a_longer_signature,
]


@pytest.mark.parametrize("derive", SUBCLASSES)
@pytest.mark.parametrize("when", ["assigned", "loaded"])
@torch.no_grad()
def test_a_subclass_is_pruned(
    model: Any, classes: Any, folder: Path, derive: Any, when: str
) -> None:
    expected = reference(model), model.generate(IDS, images=pixels(1), **HOW)
    mine = derive(classes.leaf)
    if when == "assigned":
        model.__class__ = mine
    else:
        model = mine.from_pretrained(folder)
        model.get_vision_tower().load_model()
        random_llava.in_float32(model)
    assert isinstance(model, mine)
    assert torch.equal(model(input_ids=IDS, images=pixels(1)).logits, expected[0])
    if "attention_mask" in inspect.signature(mine.forward).parameters:  # else no generate() of 4.x
        assert torch.equal(model.generate(IDS, images=pixels(1), **HOW), expected[1])


@torch.no_grad()
def test_a_dense_model_keeps_its_very_class(classes: Any, tmp_path: Path) -> None:
    dense = load(random_llava.make(tmp_path))[0]
    assert type(dense) is classes.leaf and yopo.plan_of(dense) is None
    dense.__class__ = with_llavas_forward(classes.leaf)
    dense.generate(IDS, images=pixels(1), **HOW)  # also where generate() passes what LLaVA lacks


@torch.no_grad()
def test_two_prompts_in_one_forward(model: Any, classes: Any) -> None:
    """As contrastive decoding does."""
    expected = reference(model) - 0.5 * reference(model, seed=3)

    class Contrast(classes.leaf):
        def forward(self, input_ids, images, distorted):
            args = input_ids, None, None, None, None
            first = self.prepare_inputs_labels_for_multimodal(*args, images)[4]
            second = self.prepare_inputs_labels_for_multimodal(*args, distorted)[4]
            forward = super().forward
            return forward(inputs_embeds=first).logits - 0.5 * forward(inputs_embeds=second).logits

    model.__class__ = Contrast
    assert torch.equal(model(IDS, pixels(1), pixels(1, seed=3)), expected)


EARLY = """
import sys, torch
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
import yopo.patch
model = load_pretrained_model(sys.argv[1], None, "llava-v1-random", device="cpu")[1]
print(yopo.plan_of(model).layer_cut, type(model).__name__, isinstance(model, LlavaLlamaForCausalLM))
"""


@needs_float16
def test_llava_may_be_imported_before_the_patch(folder: Path) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", EARLY, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "LlavaLlamaForCausalLM", "True"]


def test_an_unknown_llava_is_an_error_that_names_it(classes: Any) -> None:
    sizes = dict(d_model=16, n_heads=2, n_layers=2, expansion_ratio=2, vocab_size=32)
    config = classes.mpt_config(**sizes)
    config.intermediate_size = 32
    try:
        classes.mpt(config)
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"LLaVA's MPT does not build on this transformers: {error}")
    yopo.PruningPlan(torch.ones(2, 2)).save_to(config)
    with pytest.raises(TypeError, match="config of this LlavaMptForCausalLM has a plan"):
        classes.mpt(config)


# --------------------------------------------------------------------- embeddings made by hand


@torch.no_grad()
def test_embeddings_prepared_by_hand(model: Any) -> None:
    first, second = by_hand(model), by_hand(model, OTHER)
    assert torch.equal(model(inputs_embeds=first).logits, reference(model))
    assert torch.equal(model(inputs_embeds=second).logits, reference(model, OTHER))
    assert torch.equal(model(inputs_embeds=first.clone()).logits, reference(model))


@torch.no_grad()
def test_prompts_prepared_one_by_one_and_put_together(model: Any) -> None:
    rows = [by_hand(model, IDS, seed) for seed in range(3)]
    got = model(inputs_embeds=torch.cat([rows[2], rows[0], rows[1]])).logits
    for place, seed in enumerate((2, 0, 1)):
        assert torch.allclose(got[place], reference(model, IDS, seed)[0], atol=1e-4)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@torch.no_grad()
def test_generate_from_prepared_embeddings(model: Any, classes: Any, how: Any) -> None:
    embeds, how = torch.cat([by_hand(model), by_hand(model, seed=2)]), {**HOW, **how}
    shown = model.generate(IDS.repeat(2, 1), images=torch.cat([pixels(1), pixels(1, 2)]), **how)
    other = by_hand(model, OTHER)
    by_embeds = super(classes.leaf, model).generate(inputs_embeds=embeds, **how)
    assert torch.equal(by_embeds, shown)
    cut = super(classes.leaf, model).generate(inputs_embeds=other[:, :18].clone(), **HOW)
    assert cut.shape[1] >= 5


@torch.no_grad()
def test_generate_takes_the_masks(model: Any) -> None:
    embeds = by_hand(model)
    visual = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
    visual[:, 2:18] = True
    shown = model.generate(IDS, images=pixels(1), **HOW)
    assert torch.equal(model.generate(IDS, images=pixels(1), visual_mask=visual, **HOW), shown)


@torch.no_grad()
def test_text_alone_is_the_dense_model_s(model: Any, tmp_path: Path) -> None:
    dense = load(random_llava.make(tmp_path))[0]
    text = torch.tensor([[1, 5, 9, 4, 7, 12, 33]])
    for how in ({}, {"num_beams": 2}):
        got = [m.generate(text, images=None, **HOW, **how) for m in (model, dense)]
        assert torch.equal(*got)
    embeds = model.get_model().embed_tokens(text)
    logits = dense(inputs_embeds=embeds).logits
    assert torch.equal(model(inputs_embeds=embeds).logits, logits)
    embeds[:, 2:6] = by_hand(model)[:, 2:6]  # features put in by hand
    with pytest.raises(ValueError, match="nothing is known"):
        model(inputs_embeds=embeds)


@torch.no_grad()
def test_a_logits_processor_runs_other_prompts_by_embeddings(model: Any) -> None:
    alone = model.generate(IDS, images=pixels(1), **HOW)
    expected, text = reference(model, OTHER), torch.tensor([[1, 5, 9, 4, 7, 12, 33]])
    texts = model(text).logits
    seen = []

    def other(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(torch.equal(model(inputs_embeds=by_hand(model, OTHER)).logits, expected))
        embeds = model.get_model().embed_tokens(text)
        seen.append(torch.equal(model(inputs_embeds=embeds).logits, texts))
        inner = model.generate(OTHER, images=pixels(2), **HOW)
        seen.append(inner.shape[1] >= 5)
        return scores

    got = model.generate(IDS, images=pixels(1), logits_processor=[other], **HOW)
    assert torch.equal(got, alone) and len(seen) == 15 and all(seen)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_in_every_mode(model: Any, mode: Any) -> None:
    with torch.no_grad():
        expected = reference(model)
    with mode():  # with gradients by live weights, else by fused ones
        for found in (
            model(inputs_embeds=by_hand(model).clone()).logits,
            model(IDS, images=pixels(1)).logits,
        ):
            assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_prompt_lookup_gives_the_same_tokens_or_is_refused(model: Any, tmp_path: Path) -> None:
    dense = load(random_llava.make(tmp_path))[0]
    plain = dict(HOW, images=pixels(1))
    how = plain | {"prompt_lookup_num_tokens": 2}
    try:
        dense.generate(IDS, **how)
    except (IndexError, ValueError) as error:
        pytest.skip(f"this transformers cannot do it from embeddings: {error}")
    try:
        found = model.generate(IDS, **how)
    except ValueError as error:  # up to 4.57 what is to stay is counted without the image
        assert "would cut an image" in str(error)
        return
    assert torch.equal(found, model.generate(IDS, **plain))


# --------------------------------------------------------------------------- threads and copies


@torch.no_grad()
def test_eight_threads_are_as_one(model: Any) -> None:
    def work(number: int) -> list[Tensor]:
        with torch.no_grad():
            ids = OTHER if number % 2 else IDS
            images = pixels(1 + number % 2, seed=number)
            text = torch.tensor([[1, 5, 9, 4, number + 3]])
            return [
                model.generate(ids, images=images, **HOW),
                model(inputs_embeds=by_hand(model, ids, number).clone()).logits,
                model.generate(text, images=None, **HOW),
            ]

    alone = [work(number) for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(24)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def test_copies(folder: Path) -> None:
    model = load(folder)[
        0
    ]  # before its first call: transformers 5 hangs on it what no pickle takes
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = copy.deepcopy(model), torch.load(file, weights_only=False)
    expected = reference(model)
    for twin in twins:
        assert type(twin) is type(model) and yopo.plan_of(twin) == a_plan()
        assert torch.equal(twin(IDS, images=pixels(1)).logits, expected)
        twin.generate(torch.tensor([[1, 5, 9]]), images=None, **HOW)


@torch.no_grad()
def test_prepared_embeddings_can_be_saved(model: Any, tmp_path: Path) -> None:
    """Nothing hangs on the tensor; and what is read back is known by what is in it."""
    torch.save(by_hand(model), tmp_path / "embeds.pt")
    embeds = torch.load(tmp_path / "embeds.pt", weights_only=True)
    assert torch.equal(model(inputs_embeds=embeds).logits, reference(model))


@torch.no_grad()
def test_lora(folder: Path) -> None:
    """With adapters on projections and on the token embeddings."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("torch.distributed.tensor")  # which peft forgets to import
    model = load(folder)[0]
    expected = reference(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "embed_tokens"])
    )
    assert torch.allclose(wrapped(IDS, images=pixels(1)).logits, expected, atol=1e-5)
    assert torch.equal(
        wrapped.generate(inputs=IDS, images=pixels(1), **HOW),
        model.generate(IDS, images=pixels(1), **HOW),
    )
    ids, mask = batch([[1, 5, 9, 4], [1, 6, 7, 33]])
    wrapped.generate(inputs=ids, images=None, attention_mask=mask, **HOW)  # its text is known
    wrapped.unload().generate(ids, images=None, attention_mask=mask, **HOW)
