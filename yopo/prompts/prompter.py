"""What every loaded model can be asked, of whichever kind it is: the inputs that it takes for a
question about an image, and its answer. How one kind does it is llava_prompts.py's and
transformers_prompts.py's; which of them a checkpoint needs, loading.py's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from yopo.prompts.questions import Question
from yopo.prompts.sample import prompt_of

Kind = Literal["llava", "transformers"]


class Prompter(ABC):
    """A loaded model that takes questions. model: in eval mode, under the plan of its config.
    kind: "llava", the original LLaVA's code, or "transformers", a family of transformers' own."""

    kind: ClassVar[Kind]
    model: Any

    @abstractmethod
    def __call__(self, question: Question) -> dict[str, Any]:
        """The sample (sample.py) of `question`, with its answer where it has one."""

    @abstractmethod
    def text_of(self, ids: Tensor) -> str:
        """The words of the tokens `ids` (m,), without special ones."""

    def answer(self, question: Question, max_new_tokens: int) -> str:
        """What the model says to `question`, greedily, in at most so many tokens."""
        prompt = prompt_of(self(replace(question, answer=None)))
        return self.text_of(greedy(self.model, prompt, max_new_tokens)[0]).strip()


@torch.no_grad()
def greedy(model: Any, prompt: dict[str, Any], max_new_tokens: int) -> Tensor:
    """The (1, m) ids that `model` goes on with after `prompt`, inputs of one row."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: from 1")
    given = dict(prompt)
    ids = given.pop("input_ids", None)
    if ids is not None:
        # Without a mask generate() takes ids that equal pad_token_id for padding.
        given.setdefault("attention_mask", torch.ones_like(ids))
    made = model.generate(
        *(() if ids is None else (ids,)),  # by place: LLaVA's generate calls it `inputs`
        **given,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    # What stands before the new tokens is the prompt, a start token, or nothing, by family and
    # version; there are as many scores as new tokens.
    new: Tensor = made.sequences[:, -len(made.scores) :]
    return new
