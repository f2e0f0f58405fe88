"""The original LLaVA: loading a checkpoint, and the model inputs of a question about an image, as
LLaVA's own command line makes them. What both kinds of model do alike is prompter.py's."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from yopo.errors import BadInput
from yopo.prompts.prompter import Prompter
from yopo.prompts.questions import Question
from yopo.prompts.sample import ANSWER


class LlavaPrompter(Prompter):
    """A LLaVA, loaded by its own builder."""

    kind = "llava"

    def __init__(self, path: str, device: str) -> None:
        """Loads the checkpoint folder `path`. Raises BadInput where it, or LLaVA, is not there."""
        builder = _llava("llava.model.builder")
        name = _llava("llava.mm_utils").get_model_name_from_path(path)
        try:
            loaded = builder.load_pretrained_model(path, None, name, device=device)
        except (OSError, ValueError, SafetensorError) as error:
            raise BadInput(f"cannot load {path}: {error}") from error
        self._tokenizer, self.model, self._processor, _ = loaded
        if device == "cpu":
            self.model.float()  # LLaVA loads in float16, in which a CPU is slow
        self._template = _template(name)
        self._constants = _llava("llava.constants")
        self._ids_of = _llava("llava.mm_utils").tokenizer_image_token
        self._pixels_of = _llava("llava.mm_utils").process_images

    def __call__(self, question: Question) -> dict[str, Any]:
        from PIL import Image

        image = Image.open(question.image).convert("RGB")
        pixels = self._pixels_of([image], self._processor, self.model.config)
        if isinstance(pixels, list):
            pixels = [part.to(self.model.device, self.model.dtype) for part in pixels]
        else:
            pixels = pixels.to(self.model.device, self.model.dtype)
        prompt = self._ids(question.question, None)
        sample = {"input_ids": prompt, "images": pixels, "image_sizes": [image.size]}
        if question.answer is not None:
            whole = self._ids(question.question, question.answer)
            sample[ANSWER] = whole[:, prompt.shape[1] :]
            if not torch.equal(whole[:, : prompt.shape[1]], prompt) or not sample[ANSWER].numel():
                raise BadInput(
                    f"the tokens of the question {question.question!r} depend on its answer "
                    f"{question.answer!r}: leave the answer out"
                )
        return sample

    def text_of(self, ids: Tensor) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _ids(self, question: str, answer: str | None) -> Tensor:
        token = self._constants.DEFAULT_IMAGE_TOKEN
        if getattr(self.model.config, "mm_use_im_start_end", False):
            start, end = (
                self._constants.DEFAULT_IM_START_TOKEN,
                self._constants.DEFAULT_IM_END_TOKEN,
            )
            token = f"{start}{token}{end}"
        conversation = _llava("llava.conversation").conv_templates[self._template].copy()
        conversation.append_message(conversation.roles[0], f"{token}\n{question}")
        conversation.append_message(conversation.roles[1], answer)
        ids = self._ids_of(
            conversation.get_prompt(),
            self._tokenizer,
            self._constants.IMAGE_TOKEN_INDEX,
            return_tensors="pt",
        )
        return ids[None].to(self.model.device)


def _template(name: str) -> str:
    """LLaVA's rule (llava.serve.cli), which does not know llava-1.5-… without a v."""
    rules = {
        "llama-2": "llava_llama_2",
        "mistral": "mistral_instruct",
        "v1.6-34b": "chatml_direct",
        "llava-1.5": "llava_v1",
        "v1": "llava_v1",
        "mpt": "mpt",
    }
    return next((rule for part, rule in rules.items() if part in name.lower()), "llava_v0")


def _llava(module: str) -> Any:
    try:
        import_module("yopo.patch")
        return import_module(module)
    except ImportError as error:
        if re.search("llava", str(error), re.IGNORECASE):
            raise BadInput(
                f"{error}. LLaVA itself is missing or lacks something: pip install --no-deps "
                "llava-torch==1.2.2.post1, and pillow sentencepiece requests protobuf with it"
            ) from error
        raise BadInput(str(error)) from error
