"""The meter counts what a prompt holds and every pass of the model, whatever family it is of."""

from __future__ import annotations

import re

import pytest
import torch
from layouts import Shape, build
from random_families import HEADS, HERE, IMAGE, KINDS, LAYERS, Kind
from random_families import build as build_family
from random_llava import picture
from tiny_processors import VOCAB, inputs

import yopo
from yopo.bench.prefill_meter import PrefillMeter
from yopo.plan.pruning_plan import PruningPlan

PLAN = PruningPlan(torch.ones(LAYERS, HEADS).tril(), window=3, layer_cut=2)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["dense", "pruned"])
@pytest.mark.parametrize("kind", [pytest.param(KINDS[n], id=n) for n in HERE])
def test_visual_tokens_are_the_placeholders_of_the_prompt_that_are_no_newlines(
    kind: Kind, plan: PruningPlan | None
) -> None:
    """Of a dense model nobody knows which are newlines: it counts them in."""
    model = build_family(kind, VOCAB)
    if plan is not None:
        yopo.apply(model, plan)
    given = inputs(kind, [("what is this?", [picture(1)])])
    meter = PrefillMeter(model, IMAGE)
    ids = given.pop("input_ids")
    made = model.generate(ids, **given, max_new_tokens=4, do_sample=False)
    visual = int((ids == IMAGE).sum())
    if plan is not None and "next" in kind.name:
        visual -= 6  # lines of the picture, 6 × 8 in its tiles, each with a newline
    assert 0 < visual < ids.shape[1] and made.shape[1] == ids.shape[1] + 4
    prefill, further = meter.report().split("; ")
    told = re.fullmatch(r"prefill: (\d+) tokens \((\d+) visual, (\d+) text\) in [\d.]+ s", prefill)
    assert told is not None
    assert [*map(int, told.groups())] == [ids.shape[1], visual, ids.shape[1] - visual]
    assert re.fullmatch(r"3 further tokens in [\d.]+ ms each", further)


def test_a_model_whose_placeholder_is_not_known_is_not_given_shares() -> None:
    model = build(Shape(), None)
    meter = PrefillMeter(model, None)
    assert meter.report() == "prefill: none was run"
    model.generate(torch.arange(1, 8)[None], max_new_tokens=1, do_sample=False)
    assert re.fullmatch(r"prefill: 7 tokens in [\d.]+ s", meter.report())
