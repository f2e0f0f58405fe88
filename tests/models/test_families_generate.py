"""generate() through each family's own processor on photographs: chat template, batch, streaming,
pipeline. Weights are random: judged is that nothing is lost on the way to the pruned pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_checks import a_plan, check, run, truth
from family_photos import QUESTIONS, described, one_photo
from random_families import (
    HEADS,
    HERE,
    KINDS,
    LAYERS,
    Kind,
    build,
    into_stack,
)
from tiny_processors import VOCAB, inputs, photos, processor, said
from torch import Tensor

import yopo
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import CACHE_FIELD

pytestmark = pytest.mark.parametrize("kind", [pytest.param(KINDS[n], id=n) for n in HERE])

STEPS = 5


def generate(model: Any, given: dict[str, Tensor], **how: Any) -> Tensor:
    """(B, STEPS) new tokens, greedily."""
    made = model.generate(**given, max_new_tokens=STEPS, do_sample=False, **how)
    return made[:, given["input_ids"].shape[1] :]


@pytest.mark.feature("processor: chat template, photograph")
def test_a_photograph_is_pruned_as_the_oracle_says(kind: Kind) -> None:
    model, given = build(kind, VOCAB), one_photo(kind)
    batch = described(kind, given)
    expected = truth(model, a_plan(), batch, into_stack(model, given)).logits
    found = run(yopo.apply(model, a_plan()), given).logits
    check(found, expected, batch.mask.bool())


@pytest.mark.feature("processor: chat template, photograph")
def test_a_plan_that_keeps_everything_answers_as_the_dense_model(kind: Kind) -> None:
    model, given = build(kind, VOCAB), one_photo(kind)
    dense, logits = generate(model, given), run(model, given).logits
    yopo.apply(model, PruningPlan(torch.ones(LAYERS, HEADS)))
    assert torch.equal(generate(model, given), dense)
    yopo.apply(model, a_plan())
    generate(model, given)
    assert not torch.allclose(run(model, given).logits, logits, atol=1e-2)
    assert torch.equal(generate(yopo.remove(model), given), dense)


@pytest.mark.feature("processor: chat template, photograph")
def test_the_whole_template_at_once(kind: Kind) -> None:
    """apply_chat_template(tokenize=True) with the picture in the message (from 4.48 or so on)."""
    model = yopo.apply(build(kind, VOCAB), a_plan())
    messages = said(QUESTIONS[0])
    messages[0]["content"][0] = {"type": "image", "image": photos()[0]}
    try:
        given = processor(kind).apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        given = dict(given)
    except (TypeError, ValueError, KeyError) as error:
        pytest.skip(f"no pictures in messages on this transformers: {error}")
    if "pixel_values" not in given:
        pytest.skip("no pictures in messages on this transformers")
    assert torch.equal(generate(model, given), generate(model, one_photo(kind)))


@pytest.mark.feature("processor: batch")
def test_a_batch_answers_as_its_rows(kind: Kind) -> None:
    """One photograph in a row and two in the other, of different shapes, padded on the left."""
    china, flower = photos()
    rows = [(QUESTIONS[0], [china]), (QUESTIONS[1], [flower, china])]
    model = yopo.apply(build(kind, VOCAB), a_plan())
    together = generate(model, inputs(kind, rows))
    alone = [generate(model, inputs(kind, [row])) for row in rows]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.feature("processor: streaming")
def test_streaming_gives_the_same_text(kind: Kind) -> None:
    texts: list[str] = []

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            texts.append(text)

    words = processor(kind).tokenizer
    model, given = yopo.apply(build(kind, VOCAB), a_plan()), one_photo(kind)
    tokens = generate(model, given, streamer=Streamer(words, skip_prompt=True))
    assert torch.equal(tokens, generate(model, given))
    assert "".join(texts) == words.decode(tokens[0]) and texts


@pytest.mark.feature("pipeline image-text-to-text")
def test_the_pipeline_gives_the_same_text(kind: Kind) -> None:
    from transformers.pipelines import SUPPORTED_TASKS

    if "image-text-to-text" not in SUPPORTED_TASKS:
        pytest.skip("this transformers has no such pipeline")
    model, made = yopo.apply(build(kind, VOCAB), a_plan()), processor(kind)
    pipe = transformers.pipeline("image-text-to-text", model=model, processor=made)
    messages = said(QUESTIONS[0])
    messages[0]["content"][0] = {"type": "image", "image": photos()[0]}
    answer = pipe(
        text=messages,
        return_full_text=False,
        generate_kwargs=dict(max_new_tokens=STEPS, do_sample=False),
    )
    text = answer[0]["generated_text"]
    expected = generate(model, one_photo(kind))
    assert text == made.tokenizer.decode(expected[0], skip_special_tokens=True)


def test_a_further_turn_goes_on_from_what_is_cached(kind: Kind) -> None:
    given = one_photo(kind)

    def two_turns(model: Any) -> tuple[Tensor, Tensor]:
        """Of the second turn: all at once, and from the cache of the first."""
        more = dict(max_new_tokens=2, do_sample=False)
        first = model.generate(**given, **more, return_dict_in_generate=True)
        further = torch.cat([first.sequences, given["input_ids"][:, -3:]], 1)
        asked = dict(input_ids=further, attention_mask=torch.ones_like(further))
        whole = {**given, **asked}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in given:
                whole[name] = torch.zeros_like(further)
                whole[name][:, : given[name].shape[1]] = given[name]
        cache = getattr(first, CACHE_FIELD)
        return model.generate(**whole, **more), model.generate(
            **asked, **more, **{CACHE_FIELD: cache}
        )

    expected, found = two_turns(build(kind, VOCAB))
    if not torch.equal(expected, found):
        pytest.skip("stock itself gives other tokens (4.45 forgets M-RoPE's deltas in between)")
    expected, found = two_turns(yopo.apply(build(kind, VOCAB), a_plan()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_static_cache_gives_the_tokens_of_one_that_grows(kind: Kind, beams: int) -> None:
    """Twice: the second generate finds what the first left on the model."""
    china, flower = photos()
    rows = [(QUESTIONS[0], [china]), (QUESTIONS[1], [flower])]
    given, how = inputs(kind, rows), dict(num_beams=beams)
    try:
        generate(build(kind, VOCAB), given, **how, cache_implementation="static")
    except Exception as error:
        pytest.skip(f"stock itself cannot: {error}")
    model = yopo.apply(build(kind, VOCAB), a_plan())
    expected = generate(model, given, **how)
    for _ in range(2):
        found = generate(model, given, **how, cache_implementation="static")
        assert torch.equal(found, expected)
