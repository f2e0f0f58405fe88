"""Batches to train on: questions about images with their answers, as a model of transformers' own
takes them, and which tokens are the answers'. Reads images; knows no model and no loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from yopo.prompts.transformers_prompts import answer_ids, asked
from yopo.training.distillation import IGNORED, TAUGHT


class AnswerCollator:
    """Makes batches of rows {"image": a path or a PIL image, "question": …, "answer": …}: each by
    the chat template of `processor`, as `python -m yopo calibrate` and `infer` ask, with the answer
    and its end behind it. `labels` are the answers' tokens alone. Rows of `teach` have their
    teacher's answers with them.

    Raises BadInput for a chat template that takes no question about an image.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        processor, name = self._processor, type(self._processor).__name__
        made = processor(
            images=[_image(row["image"]) for row in rows],
            text=[asked(processor, row["question"], name) for row in rows],
            padding=True,
            return_tensors="pt",
        )
        answers = [answer_ids(processor, row["answer"])[0] for row in rows]
        told, ids = made["attention_mask"].bool(), made["input_ids"]
        batch = dict(made)
        for name, value in made.items():
            if isinstance(value, Tensor) and value.shape == ids.shape:  # says what each token is
                behind = [torch.full_like(one, name == "attention_mask") for one in answers]
                batch[name] = _together(value, told, behind, 0)
        batch["input_ids"] = _together(ids, told, answers, processor.tokenizer.pad_token_id)
        batch["labels"] = _together(torch.full_like(ids, IGNORED), told, answers, IGNORED)
        for name in TAUGHT if TAUGHT[0] in rows[0] else ():
            batch[name] = torch.cat([torch.as_tensor(row[name]) for row in rows])
        return batch


def _together(values: Tensor, told: Tensor, answers: Sequence[Tensor], pad: int) -> Tensor:
    """Each row's `values` where it is no padding, and its answer's behind them, padded right."""
    rows = [
        torch.cat([value[mask], answer.to(value.dtype)])
        for value, mask, answer in zip(values, told, answers, strict=True)
    ]
    return pad_sequence(rows, batch_first=True, padding_value=pad)


def _image(given: Any) -> Any:
    from PIL import Image

    image = given if isinstance(given, Image.Image) else Image.open(given)
    return image.convert("RGB")
