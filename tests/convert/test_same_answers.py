"""LLaVA-1.5 → transformers' LlavaForConditionalGeneration: the converted model reads prompts and
pictures, and answers, as LLaVA does with the original one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import random_llava
import torch
import transformers
from conversions import ROOT, TINY, convert, loaded
from packaging.version import Version
from torch import Tensor

if Version(transformers.__version__) < Version("4.45"):
    pytest.skip("converted checkpoints are for transformers 4.45 on", allow_module_level=True)

IMAGES = sorted((ROOT / "examples/tiny_llava/images").glob("*.png"))
QUESTIONS = (
    "what color is the shape?",
    "what shape is in the image?",
    "is there a red shape in the image?",
)
needs_llava = pytest.mark.skipif(find_spec("llava") is None, reason="llava-torch is not installed")
needs_padding = pytest.mark.skipif(
    not hasattr(transformers, "LlavaImageProcessor"), reason="this version pads no images"
)


@contextmanager
def yopo_patched() -> Iterator[None]:
    """Not at import: other tests' transformers must stay stock."""
    from yopo.patch import patched, undo

    undo()  # importing it enables
    with patched():
        yield


def original(kind: str) -> tuple[Any, Any, Any]:
    """Tokenizer, model in float32 and image processor, by the LLaVA package under yopo.patch."""
    with yopo_patched():
        from llava.model.builder import load_pretrained_model

        name = f"tiny-llava-v1-{kind}"
        tokenizer, model, processor, _ = load_pretrained_model(
            str(TINY / name), None, name, device="cpu"
        )
    model = random_llava.in_float32(model)
    model.get_vision_tower().float()
    return tokenizer, model.eval(), processor


def llavas_prompt(question: str, image: bool = True) -> str:
    from llava.conversation import conv_templates

    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], ("<image>\n" if image else "") + question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def ask(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def same_ids(new: Tensor, llava: Tensor, image_id: int) -> None:
    """LLaVA has one -200 where the new form has as many <image> as there are visual tokens."""
    rest = new[new != image_id]
    assert rest.tolist() == llava[llava != -200].tolist()
    first = int((new == image_id).nonzero()[0])
    assert first == int((llava == -200).nonzero()[0])


@torch.no_grad()
def agree(model: Any, folder: Path, form: tuple[Any, Any, Any]) -> set[str]:
    """Checks that `model`, converted to `folder`, computes what LLaVA's `form` of it does: pixels,
    ids, logits and answers on the four pictures. Returns the answers."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    tokenizer, old, image_processor = form
    processor = transformers.AutoProcessor.from_pretrained(folder)
    answers = set()
    for file in IMAGES:
        picture = Image.open(file).convert("RGB")
        pixels = process_images([picture], image_processor, old.config)
        for question in QUESTIONS:
            text = processor.apply_chat_template(ask(question), add_generation_prompt=True)
            assert text == llavas_prompt(question)
            inputs = processor(images=picture, text=text, return_tensors="pt")
            torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-6, rtol=0)
            ids = tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]
            same_ids(inputs["input_ids"][0], ids[0], model.config.image_token_index)
            got = model(**inputs).logits[0]
            expected = old(ids, images=pixels).logits[0]
            assert got.shape[0] == expected.shape[0]
            torch.testing.assert_close(got[:, :640], expected, atol=1e-4, rtol=1e-4)
            greedy = dict(max_new_tokens=8, do_sample=False)
            new = model.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :]
            wanted = old.generate(ids, images=pixels, **greedy)[0]
            wanted = wanted[wanted != tokenizer.bos_token_id] if len(wanted) != len(new) else wanted
            assert new.tolist() == wanted.tolist()
            answers.add(processor.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.llava
@needs_llava
@needs_padding
def test_the_dense_model_answers_the_same_in_both_forms(dense: Path) -> None:
    answers = agree(loaded(dense), dense, original("dense"))
    assert {"red", "yes", "no"} & answers and len(answers) >= 4


@pytest.mark.llava
@needs_llava
@needs_padding
def test_the_pruned_model_answers_the_same_in_both_forms(tmp_path: Path) -> None:
    from yopo import plan_of

    folder = convert(TINY / "tiny-llava-v1-pruned", tmp_path / "new")
    form = original("pruned")
    with yopo_patched():
        model = loaded(folder)
    assert plan_of(model) == plan_of(form[1]) is not None
    answers = agree(model, folder, form)
    assert {"red", "yes", "no"} & answers and len(answers) >= 4


@pytest.mark.llava
@needs_llava
@needs_padding
def test_pictures_that_are_not_square_are_padded_as_llava_pads_them(dense: Path) -> None:
    _, old, image_processor = original("dense")
    from llava.mm_utils import process_images

    processor = transformers.AutoProcessor.from_pretrained(dense)
    for width, height in ((120, 50), (51, 130), (96, 97)):
        picture = random_llava.picture(width, width, height)
        expected = process_images([picture], image_processor, old.config)
        got = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.llava
@needs_llava
def test_prompts_are_tokenized_as_llava_does(dense: Path) -> None:
    """Several images, several turns, images in the middle, text alone."""
    llava_tokenizer, _, _ = original("dense")
    from llava.mm_utils import tokenizer_image_token

    new = transformers.AutoTokenizer.from_pretrained(dense)
    image = new.convert_tokens_to_ids("<image>")
    first = llavas_prompt("what color is the shape?")
    for text in (
        first,
        first + " red</s>USER: what shape is in the image? ASSISTANT:",
        llavas_prompt("hello", image=False),
        "USER: <image>\n<image>\nis there a red shape? ASSISTANT:",
        "<image>\nwhat",
        "USER: what is <image>",
    ):
        got = [-200 if i == image else i for i in new.encode(text)]
        assert got == tokenizer_image_token(text, llava_tokenizer), text


def test_a_space_after_an_image_is_kept_as_llava_kept_it(dense: Path) -> None:
    """As on transformers 4, by which LLaVA was trained; on 5 its own tokenizer drops it."""
    from sentencepiece import SentencePieceProcessor

    source = str(TINY / "tiny-llava-v1-dense/tokenizer.model")
    pieces = SentencePieceProcessor(model_file=source)
    new = transformers.AutoTokenizer.from_pretrained(dense)
    image = new.convert_tokens_to_ids("<image>")
    expected = [1, *pieces.encode("USER: what is "), image, *pieces.encode(" this? ASSISTANT:")]
    assert new.encode("USER: what is <image> this? ASSISTANT:") == expected


def test_the_chat_template_takes_turns_and_plain_strings(dense: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *ask("what?"),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "sure?"},
    ]
    expected = "Be brief. USER: <image>\nwhat? ASSISTANT: red</s>USER: sure? ASSISTANT:"
    holders = [transformers.AutoTokenizer]
    if hasattr(transformers, "LlavaImageProcessor"):
        holders.append(transformers.AutoProcessor)
    for holder in holders:
        text = holder.from_pretrained(dense).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert text == expected


def test_added_rows_are_never_chosen(dense: Path) -> None:
    """The rows beyond the old vocabulary are the mean of the others, in both matrices."""
    model = loaded(dense)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert matrix.shape[0] == 704
        mean = matrix[:640].mean(0, keepdim=True)
        torch.testing.assert_close(matrix[640:], mean.expand(64, -1), atol=1e-3, rtol=1e-3)
    assert model.config.image_token_index == 640


@needs_padding
def test_the_auto_classes_and_the_pipeline_take_the_folder_as_it_is(dense: Path) -> None:
    """Through the Auto classes, batched, with the padding side that generation needs."""
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(dense)
    model = transformers.AutoModelForImageTextToText.from_pretrained(dense).float()
    assert type(model) is transformers.LlavaForConditionalGeneration
    pictures = [Image.open(file).convert("RGB") for file in IMAGES[:2]]
    texts = [
        processor.apply_chat_template(ask(question), add_generation_prompt=True)
        for question in QUESTIONS[:2]
    ]
    batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=6, do_sample=False)
    got = processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for i in range(2):
        one = processor(images=pictures[i], text=texts[i], return_tensors="pt")
        single = model.generate(**one, max_new_tokens=6, do_sample=False)
        answer = processor.decode(single[0, one["input_ids"].shape[1] :], skip_special_tokens=True)
        assert got[i].strip() == answer.strip() != ""

    pipeline = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": QUESTIONS[0]}]
    asked = [{"role": "user", "content": content}]
    [said] = pipeline(text=asked, max_new_tokens=6, return_full_text=False)
    assert said["generated_text"].strip() == got[0].strip()
