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

# What transformers says to files that it cannot read and to models that it, or yopo, knows not.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
)
_SHOWN = 3  # names of tensors in a message


class TransformersPrompter(Prompter):
    """A model of one of transformers' families, loaded by its Auto classes."""

    kind = "transformers"

    def __init__(self, path: str, device: str) -> None:
        """Loads the checkpoint `path`, with its plan. Raises BadInput where it cannot be."""
        self._path = path
        auto = getattr(transformers, "AutoModelForImageTextToText", None)
        auto = auto or transformers.AutoModelForVision2Seq  # up to 4.45
        try:
            config = transformers.AutoConfig.from_pretrained(path)
            if type(config) not in auto._model_mapping:
                raise BadInput(
                    f"{path} is a {config.model_type}, which takes no images, as far as "
                    f"transformers {transformers.__version__} knows"
                )
            loaded, told = auto.from_pretrained(
                path, torch_dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
            _check_weights(path, told)
            self.model = loaded.to(device).eval()
            plan = PruningPlan.from_config(self.model.config)
            if plan is not None:  # whether or not the patch, which builds models pruned, is in
                apply(self.model, plan)
            self._processor = transformers.AutoProcessor.from_pretrained(path)
        except _LOADING_ERRORS as error:
            raise BadInput(f"cannot load {path}: {error}") from error
        if device == "cpu":
            self.model.float()  # half precision is slow there
        if not getattr(self._processor, "chat_template", None):
            raise BadInput(f"the processor of {path} has no chat template: how to ask is not known")

    def __call__(self, question: Question) -> dict[str, Any]:
        from PIL import Image

        image = Image.open(question.image).convert("RGB")
        prompt = asked(self._processor, question.question, self._path)
        made = self._processor(images=[image], text=[prompt], return_tensors="pt")
        sample: dict[str, Any] = {
            name: value.to(self.model.device, self.model.dtype)
            if value.is_floating_point()
            else value.to(self.model.device)
            for name, value in made.items()
            if isinstance(value, Tensor)
        }
        if question.answer is not None:
            sample[ANSWER] = answer_ids(self._processor, question.answer).to(self.model.device)
        return sample

    def text_of(self, ids: Tensor) -> str:
        text: str = self._processor.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def asked(processor: Any, question: str, whose: str) -> str:
    """The prompt that asks `question` about one image, by the chat template of `processor`, which
    is that of `whose`. Raises BadInput where it cannot."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    try:
        prompt: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the checkpoint's: it fails anyhow
        raise BadInput(
            f"the chat template of {whose} takes no question about an image: {error}"
        ) from error
    return prompt


def answer_ids(processor: Any, text: str) -> Tensor:
    """(1, m) ids of an answer, and the token that ends it where there is one."""
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token or ""
    ids: Tensor = tokenizer(text + end, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


def _check_weights(path: str, told: dict[str, Any]) -> None:
    """Raises BadInput where the files are not the weights that the config describes: transformers
    would go on with random numbers in their place. told: its output_loading_info."""
    odd = [
        f"{name} (of shape {tuple(found)}, not {tuple(wanted)})"
        for name, found, wanted in told["mismatched_keys"]
    ]
    if names := [*sorted(told["missing_keys"]), *sorted(odd)]:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise BadInput(
            f"{path} lacks weights that its config.json describes: {', '.join(names[:_SHOWN])}"
            f"{more}. One of them is of another checkpoint, or cut off: download it again"
        )
