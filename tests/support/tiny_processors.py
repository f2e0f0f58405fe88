"""Each family's own processor, built here around a tokenizer of single bytes: nothing is
downloaded. Sizes are those of random_families.py's towers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from random_families import END, FIRST_WORD, IMAGE, PATCH, PINPOINTS, SIDE, START, VIDEO, Kind
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = FIRST_WORD + 256
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def names(kind: Kind) -> dict[int, str]:
    """The placeholders of a family."""
    if kind.qwen:
        pads = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
        return pads | {START: "<|vision_start|>", END: "<|vision_end|>"}
    if kind.cls.startswith("InternVL"):
        return {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", END: "</img>"}
    return {IMAGE: "<image>"}


def tokenizer(kind: Kind, cls: type) -> Any:
    special = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"} | names(kind)
    vocab = {special.get(i, f"<unused{i}>"): i for i in range(FIRST_WORD)}
    vocab |= {c: FIRST_WORD + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special.values()))
    more: dict[str, Any] = {}
    if kind.cls.startswith("InternVL"):
        by_name = {"start_image_token": START, "end_image_token": END}
        by_name |= {"context_image_token": IMAGE, "video_token": VIDEO}
        more = {"extra_special_tokens": {name: special[i] for name, i in by_name.items()}}
    return cls(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=4096,
        model_input_names=["input_ids", "attention_mask"],
        **more,
    )


def image_processor(name: str, **settings: Any) -> Any:
    """The one that does without torchvision: "…Pil" on 5.x, before the plain name."""
    try:
        return getattr(transformers, f"{name}Pil", getattr(transformers, name))(**settings)
    except ImportError as error:  # 5.4's …Pil ask for it all the same
        if "Torchvision" not in str(error):
            raise
        pytest.skip("this transformers' image processor needs torchvision")


@lru_cache
def processor(kind: Kind) -> Any:
    cls = getattr(transformers, kind.cls.replace("ForConditionalGeneration", "Processor"))
    wants = getattr(cls, "tokenizer_class", None)
    token_class = transformers.PreTrainedTokenizerFast
    if isinstance(wants, tuple):  # up to 4.57 Qwen's processor takes no other
        token_class = getattr(transformers, wants[1])
    words = tokenizer(kind, token_class)
    pixels = SIDE * PATCH
    square = {"height": pixels, "width": pixels}
    if kind.qwen:
        images = image_processor(
            "Qwen2VLImageProcessor",
            patch_size=PATCH,
            merge_size=2,
            min_pixels=16 * 16,
            max_pixels=32 * 32,
        )
        parts = dict(image_processor=images, tokenizer=words)
        template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    elif kind.cls.startswith("InternVL"):
        images = image_processor(
            "GotOcr2ImageProcessor",
            size={"height": 32, "width": 32},
            crop_to_patches=True,
            min_patches=1,
            max_patches=3,
        )
        parts = dict(image_processor=images, tokenizer=words, image_seq_length=SIDE * SIDE)
        template = TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n")
    else:
        clip = dict(size={"shortest_edge": pixels}, crop_size=square)
        name = "CLIPImageProcessor"
        if kind.cls.startswith("LlavaNext"):
            name, clip["image_grid_pinpoints"] = "LlavaNextImageProcessor", PINPOINTS
        parts = dict(image_processor=image_processor(name, **clip), tokenizer=words)
        parts |= dict(patch_size=PATCH, vision_feature_select_strategy="default")
        if "num_additional_image_tokens" in str(cls.__init__.__doc__) + str(
            cls.__init__.__code__.co_varnames
        ):
            parts["num_additional_image_tokens"] = 1  # CLIP's class token
        template = TEMPLATE.replace("IMAGE", "<image>\n")
    return _without_videos(cls, parts | dict(chat_template=template))


def _without_videos(cls: type, parts: dict[str, Any]) -> Any:
    """From 4.52 on some want a video processor, and those need torchvision, which has no CPU wheel
    here: a nameless stand-in that is never called."""
    takes = cls.__init__.__code__.co_varnames
    if "video_processor" not in takes:
        return cls(**parts)

    class Lenient(cls):
        video_processor_class = "ProcessorMixin"  # 4.52 looks here, later ones below

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)

    Lenient.__name__ = cls.__name__
    return Lenient(**parts, video_processor=_NoVideos())


class _NoVideos(transformers.ProcessorMixin):
    def __init__(self) -> None:
        pass

    model_input_names = ()
    merge_size = 2
    temporal_patch_size = 2


@lru_cache
def photos() -> tuple[Any, Any]:
    """scikit-learn's two sample photographs, each of another shape."""
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    china, flower = (Image.fromarray(np.asarray(x)) for x in datasets.load_sample_images().images)
    return china, flower.crop((100, 0, 400, 427))


def said(text: str, images: int = 1) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def inputs(kind: Kind, prompts: list[tuple[str, list[Any]]]) -> dict[str, torch.Tensor]:
    """What generate() is given for (question, pictures) of each row."""
    made = processor(kind)
    texts = [
        made.apply_chat_template(said(text, len(shown)), add_generation_prompt=True)
        for text, shown in prompts
    ]
    every = [picture for _, shown in prompts for picture in shown]
    given = made(text=texts, images=every or None, padding=True, return_tensors="pt")
    return dict(given)
