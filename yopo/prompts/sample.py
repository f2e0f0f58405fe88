"""A sample: the inputs of a model for one prompt, and perhaps its answer. What may be in it, and
the two put together. Knows of no files (questions.py) and runs no model.

A sample is a dict (or a processor's BatchFeature) of what `model(**inputs)` takes for a batch of
one: `input_ids` and `images` for LLaVA; `inputs_embeds` and `visual_mask` (and `visual_grids`) for
a bare language model. Its entry `answer_ids` (1, m), token ids that should follow, is no input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ANSWER = "answer_ids"
Sample = Mapping[str, Any]


def prompt_of(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The model's inputs without the answer. Raises ValueError where `sample` is no sample."""
    mapping = isinstance(sample, Mapping)  # a processor's BatchFeature is no dict
    if not mapping or not {"input_ids", "inputs_embeds"} & set(sample):
        got = sorted(sample) if mapping else type(sample).__name__
        raise ValueError(
            f"a sample is a dict of model inputs with input_ids or inputs_embeds, got {got}"
        )
    inputs = {name: value for name, value in sample.items() if name != ANSWER}
    rows = tokens_of(inputs)
    if rows.shape[0] != 1:
        raise ValueError(
            f"a sample has {rows.shape[0]} rows; calibrating takes prompts one by one: give each "
            "a batch of its own"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError("a sample has padding (attention_mask is 0 somewhere): take it off")
    return inputs


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """`input_ids` (1, n) or `inputs_embeds` (1, n, d)."""
    ids = inputs.get("input_ids")
    return inputs["inputs_embeds"] if ids is None else ids


def with_answer(model: nn.Module, inputs: dict[str, Any], answer: Tensor) -> dict[str, Any]:
    """`inputs` with the tokens `answer` (1, m) behind them, which are text."""
    tokens, more = tokens_of(inputs), answer.shape[1]
    n = tokens.shape[1]
    longer = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape != (1, n):
            continue
        if name == "position_ids":
            steps = torch.arange(1, more + 1, device=value.device)
            longer[name] = torch.cat([value, value[:, -1:] + steps], dim=1)
        else:  # masks of what is visual, or of its type; and the mask of what is no padding
            longer[name] = F.pad(value, (0, more), value=int(name == "attention_mask"))
    if inputs.get("input_ids") is None:
        embedded = model.get_input_embeddings()(answer.to(tokens.device))
        longer["inputs_embeds"] = torch.cat([tokens, embedded.to(tokens.dtype)], dim=1)
    else:
        longer["input_ids"] = torch.cat([tokens, answer.to(tokens.device)], dim=1)
    return longer
