"""A loaded model asked a question: the original LLaVA's answer and a transformers family's, each
against what the model's own code makes of the same question."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import random_llava
import torch
import transformers
from layouts import needs_float16
from random_families import HEADS, KINDS, LAYERS, build
from tiny_processors import VOCAB as BYTES
from tiny_processors import processor, said

import yopo
from yopo.errors import BadInput
from yopo.plan.pruning_plan import PruningPlan
from yopo.prompts import Prompter, load
from yopo.prompts.loading import kind_of
from yopo.prompts.prompter import greedy
from yopo.prompts.questions import Question
from yopo.prompts.sample import ANSWER
from yopo.versions import has_families

needs_llava = pytest.mark.skipif(find_spec("llava") is None, reason="llava-torch is not installed")
needs_family = pytest.mark.skipif(not has_families(), reason="no families in this transformers")
PLAN = PruningPlan(torch.ones(LAYERS, HEADS).tril(), window=3, layer_cut=2, ffn_ratio=2)


@pytest.fixture
def question(tmp_path: Path) -> Question:
    random_llava.picture(3).save(tmp_path / "picture.png")
    return Question(tmp_path / "picture.png", "what is in this image?", "a red circle")


@pytest.fixture
def patched() -> Any:
    """LLaVA's own code with yopo's models, and transformers as it was afterwards."""
    import yopo.patch

    yopo.patch.enable()
    yield
    yopo.patch.undo()


def family(folder: Path, monkeypatch: pytest.MonkeyPatch, plan: PruningPlan | None) -> Path:
    """A checkpoint of a tiny LLaVA of transformers' own. The processor of these tests cannot be
    saved without torchvision."""
    model, made = build(KINDS["llava-llama"], BYTES), processor(KINDS["llava-llama"])
    if plan is not None:
        yopo.apply(model, plan)
    model.save_pretrained(folder)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda path: made)
    return folder


def own_llava_answer(folder: Path, question: Question, limit: int) -> str:
    """By LLaVA's own functions, as its command line calls them."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from PIL import Image

    tokenizer, model, images, _ = load_pretrained_model(
        str(folder), None, folder.name, device="cpu"
    )
    model = random_llava.in_float32(model)
    conversation = conv_templates["llava_v1"].copy()
    conversation.append_message("USER", f"<image>\n{question.question}")
    conversation.append_message("ASSISTANT", None)
    prompt = conversation.get_prompt()
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    picture = Image.open(question.image).convert("RGB")
    pixels = process_images([picture], images, model.config).float()
    with torch.no_grad():
        out = model.generate(
            ids, images=pixels, image_sizes=[picture.size], do_sample=False, max_new_tokens=limit
        )
    return tokenizer.decode(out[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("plan", [None, random_llava.a_plan()], ids=["dense", "pruned"])
@pytest.mark.llava
@needs_float16
@needs_llava
def test_llava_answers_as_its_own_command_line(
    plan: PruningPlan | None, tmp_path: Path, question: Question, patched: None
) -> None:
    folder = random_llava.make(tmp_path / "made", plan)
    prompter = load(folder, "cpu")
    assert isinstance(prompter, Prompter) and prompter.kind == "llava"
    assert yopo.plan_of(prompter.model) == plan
    answer = prompter.answer(question, 6)
    assert answer and answer == own_llava_answer(folder, question, 6)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["dense", "pruned"])
@needs_family
def test_a_family_answers_as_generate_does_after_its_own_template(
    plan: PruningPlan | None,
    tmp_path: Path,
    question: Question,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import Image

    folder = family(tmp_path / "made", monkeypatch, plan)
    prompter = load(folder, "cpu")
    assert isinstance(prompter, Prompter) and prompter.kind == "transformers"
    assert yopo.plan_of(prompter.model) == plan  # the patch is not in
    model, made = build(KINDS["llava-llama"], BYTES), processor(KINDS["llava-llama"])
    if plan is not None:
        yopo.apply(model, plan)
    text = made.apply_chat_template(said(question.question), add_generation_prompt=True)
    picture = Image.open(question.image)
    given = made(images=[picture], text=[text], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**given, do_sample=False, max_new_tokens=8)
    new = out[0, given["input_ids"].shape[1] :]
    expected = made.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert expected and prompter.answer(question, 8) == expected


@needs_family
def test_the_answer_of_a_question_is_no_part_of_what_is_asked(
    tmp_path: Path, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompter = load(family(tmp_path / "made", monkeypatch, None), "cpu")
    sample = prompter(question)
    assert prompter.text_of(sample[ANSWER][0]) == "a red circle"
    assert "a red circle" not in prompter.text_of(sample["input_ids"][0])
    bare = Question(question.image, question.question, None)
    assert ANSWER not in prompter(bare)
    assert prompter.answer(question, 4) == prompter.answer(bare, 4)


@needs_family
def test_a_plan_that_does_not_fit_is_refused_and_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family(tmp_path / "made", monkeypatch, PLAN)
    config = json.loads((folder / "config.json").read_text())
    config["yopo"]["window"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="cannot load .*'yopo' block of the config is corrupt"):
        load(folder, "cpu")


def test_the_kind_is_told_by_the_config(tmp_path: Path) -> None:
    for config, kind in (({"mm_vision_tower": "x"}, "llava"), ({}, "transformers")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert kind_of(tmp_path) == kind


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_readable_config_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json"):
        load(tmp_path, "cpu")


def test_what_is_no_folder_and_not_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name} is not a local folder")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", absent)
    with pytest.raises(BadInput, match="there is no folder 'no/where'"):
        load("no/where", "cpu")


def test_no_token_is_no_answer() -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0; allowed: from 1"):
        greedy(None, {}, 0)
