"""What one answer of a model takes: how many tokens its prompt has, of text and of images, and the
time of the prefill and of each further token. Watches a model from outside, by hooks."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from yopo.engine.layout import VisualLayout
from yopo.models.known_layouts import recall
from yopo.models.told import CALL


class PrefillMeter:
    """Watches `model` from now on, a causal LM of any kind that is called by its generate.

    placeholder: the token that stands for images in the ids that generate is given, one for an
    image or one for each feature of it; None: not known. Visual are the tokens that a plan takes
    for visual; of a model without a plan, what the language model is given beyond the prompt's
    other tokens: features of images, and newlines among them if it has those.

    Time is of the language model, logits included: the vision tower is no part of it.
    """

    def __init__(self, model: nn.Module, placeholder: int | None) -> None:
        self._placeholder = placeholder
        self._text: int | None = None
        self._tokens = 0
        self._visual: int | None = None
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
        visual = self._tokens - self._text if self._visual is None else self._visual
        return f" ({visual} visual, {self._tokens - visual} text)"

    def _counting(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._placeholder is not None:
            self._text = int((input_ids != self._placeholder).sum())
        return self._generate(input_ids, *args, **kwargs)

    def _start(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids") if given is None else given
        if not self._seconds:
            self._tokens = given.shape[1]
            self._visual = _visual_tokens(given)
        _settle(given.device)
        self._started = time.perf_counter()

    def _stop(self, model: nn.Module, args: Any, output: Any) -> None:
        _settle(next(model.parameters()).device)
        self._seconds.append(time.perf_counter() - self._started)


def _visual_tokens(given: Tensor) -> int | None:
    """How many of the prefill's columns are visual, if that is known: a composite says it of the
    call in progress, LLaVA's prepare of the embeddings."""
    call = CALL.get()
    layout = None if call is None else call.layout
    if call is None and given.dim() == 3:
        layout = recall(given, VisualLayout.empty(len(given)))
    return None if layout is None else int(layout.visual.sum())


def _settle(device: torch.device) -> None:
    """Waits for a GPU, so that times are those of the work and not of its queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
