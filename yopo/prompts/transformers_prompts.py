"""Models of transformers' own families: loading a checkpoint, and the model inputs of a question
about an image, by its own processor and chat template. What both kinds of model do alike is
prompter.py's."""

from __future__ import annotations

from typing import Any

import transformers
from safetensors import SafetensorError
from torch import Tensor

from yopo.errors import BadInput
from yopo.models.attach import apply
from yopo.plan.pruning_plan import PruningPlan
from yopo.prompts.prompter import Prompter
from yopo.prompts.questions import Question
from yopo.prompts.sample import ANSWER


class TransformersPrompter(Prompter):
    """A model of one of transformers' families, loaded by its Auto classes."""

    kind = "transformers"

    def __init__(self, path: str, device: str) -> None:
        """Loads the checkpoint `path`, with its plan. Raises BadInput where it cannot be."""
        auto = getattr(transformers, "AutoModelForImageTextToText", None)
        auto = auto or transformers.AutoModelForVision2Seq  # up to 4.45
        try:
            self.model = auto.from_pretrained(path, torch_dtype="auto").to(device).eval()
            plan = PruningPlan.from_config(self.model.config)
            if plan is not None:  # whether or not the patch, which builds models pruned, is in
                apply(self.model, plan)
            self._processor = transformers.AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError) as error:
            raise BadInput(f"cannot load {path}: {error}") from error
        if device == "cpu":
            self.model.float()  # half precision is slow there
        if not getattr(self._processor, "chat_template", None):
            raise BadInput(f"the processor of {path} has no chat template: how to ask is not known")

    def __call__(self, question: Question) -> dict[str, Any]:
        from PIL import Image

        image = Image.open(question.image).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        prompt = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        made = self._processor(images=[image], text=[prompt], return_tensors="pt")
        sample: dict[str, Any] = {
            name: value.to(self.model.device, self.model.dtype)
            if value.is_floating_point()
            else value.to(self.model.device)
            for name, value in made.items()
            if isinstance(value, Tensor)
        }
        if question.answer is not None:
            sample[ANSWER] = self._answer(question.answer).to(self.model.device)
        return sample

    def text_of(self, ids: Tensor) -> str:
        text: str = self._processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _answer(self, text: str) -> Tensor:
        """(1, m) ids of an answer, and the token that ends it where there is one."""
        tokenizer = self._processor.tokenizer
        end = tokenizer.eos_token or ""
        return tokenizer(text + end, add_special_tokens=False, return_tensors="pt").input_ids
