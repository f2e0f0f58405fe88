"""What one answer of a model takes: how many tokens its prompt has, of text and of images, and the
time of the prefill and of each further token. Watches a model from outside, by hooks."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn


class PrefillMeter:
    """Watches `model` from now on, a causal LM of any kind that is called by its generate.

    placeholder: the token that stands for images in the ids that generate is given, one for an
    image or one for each feature of it; None: not known. What the language model is given beyond
    the prompt's other tokens is the images': their features, newlines among them if it has those.

    Time is of the language model, logits included: the vision tower is no part of it.
    """

    def __init__(self, model: nn.Module, placeholder: int | None) -> None:
        self._placeholder = placeholder
        self._text: int | None = None
        self._tokens = 0
        self._seconds: list[float] = []
        self._started = 0.0
        self._generate = model.generate
        model.generate = self._counting
        model.get_decoder().register_forward_pre_hook(self._start, with_kwargs=True)
        model.register_forward_hook(self._stop)

    def report(self) -> str:
        """One line on what the prefill took; the tokens after it, too."""
        if not self._seconds:
            return "prefill: none was run"
        first, *rest = self._seconds
        line = f"prefill: {self._tokens} tokens{self._shares()} in {first:.3f} s"
        if rest:
            line += f"; {len(rest)} further tokens in {1000 * sum(rest) / len(rest):.1f} ms each"
        return line

    def _shares(self) -> str:
        if self._text is None:
            return ""
        return f" ({self._tokens - self._text} visual, {self._text} text)"

    def _counting(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._placeholder is not None:
            self._text = int((input_ids != self._placeholder).sum())
        return self._generate(input_ids, *args, **kwargs)

    def _start(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids") if given is None else given
        if not self._seconds:
            self._tokens = given.shape[1]
        _settle(given.device)
        self._started = time.perf_counter()

    def _stop(self, model: nn.Module, args: Any, output: Any) -> None:
        _settle(next(model.parameters()).device)
        self._seconds.append(time.perf_counter() - self._started)


def _settle(device: torch.device) -> None:
    """Waits for a GPU, so that times are those of the work and not of its queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
