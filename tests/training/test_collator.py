"""Batches of questions with answers: each row is what calibrate and infer ask, with its answer
behind it, and a batch says what its rows say one by one, whatever the family pads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_families import HERE, KINDS, build
from tiny_processors import VOCAB, photos, processor, said

import yopo
from yopo.errors import BadInput

if not HERE:
    pytest.skip("this transformers is older than the families", allow_module_level=True)


def rows() -> list[dict[str, Any]]:
    china, flower = photos()
    return [
        {"image": china, "question": "what is it?", "answer": "a red roof"},
        {"image": flower, "question": "and what is this one, please?", "answer": "no"},
    ]


@pytest.mark.parametrize("name", HERE)
def test_a_batch_is_its_rows_one_by_one(name: str) -> None:
    kind = KINDS[name]
    collate, model = yopo.AnswerCollator(processor(kind)), build(kind, VOCAB)
    batch = collate(rows())
    with torch.no_grad():
        together = model(**batch)
        for number, row in enumerate(rows()):
            alone = collate([row])
            count = alone["input_ids"].shape[1]
            for field in ("input_ids", "labels", "attention_mask"):
                assert torch.equal(batch[field][number, :count], alone[field][0]), field
            assert not batch["attention_mask"][number, count:].any()
            assert (batch["labels"][number, count:] == -100).all()
            logits = model(**alone).logits[0]
            assert torch.allclose(together.logits[number, :count], logits, atol=1e-4)


def test_labels_are_the_answer_and_its_end_behind_the_prompt_that_is_asked_by() -> None:
    kind = KINDS[HERE[0]]
    made, row = processor(kind), rows()[0]
    batch = yopo.AnswerCollator(made)([row])
    prompt = made.apply_chat_template(said(row["question"]), add_generation_prompt=True)
    asked = made(images=[row["image"]], text=[prompt], return_tensors="pt")["input_ids"][0]
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert torch.equal(ids[: len(asked)], asked) and (labels[: len(asked)] == -100).all()
    assert torch.equal(ids[len(asked) :], labels[len(asked) :])
    assert made.tokenizer.decode(labels[len(asked) :]) == "a red roof</s>"


def test_an_image_may_be_a_file(tmp_path: Path) -> None:
    row = rows()[0]
    row["image"].save(tmp_path / "a.png")
    collate = yopo.AnswerCollator(processor(KINDS[HERE[0]]))
    of_file = collate([{**row, "image": str(tmp_path / "a.png")}])
    assert torch.equal(of_file["pixel_values"], collate([row])["pixel_values"])


def test_a_template_that_takes_no_image_is_named() -> None:
    class Deaf:
        tokenizer = processor(KINDS[HERE[0]]).tokenizer

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
            raise TypeError("text only")

    with pytest.raises(BadInput, match="chat template of Deaf takes no question about an image"):
        yopo.AnswerCollator(Deaf())(rows())
