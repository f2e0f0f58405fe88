"""What a composite knows of its images belongs to the call and to the embeddings: not to the
thread beside it, and not to columns that come one by one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from family_checks import a_plan
from random_families import HERE, KINDS, Kind, build, into_stack, make
from torch import Tensor
from transformers import DynamicCache

import yopo
from yopo.engine.layout import VisualLayout
from yopo.models import known_layouts
from yopo.models.known_layouts import remember

pytestmark = pytest.mark.parametrize("kind", [pytest.param(KINDS[n], id=n) for n in HERE])

STEPS = 4


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SHOWN", "_TEXT"):
        monkeypatch.setattr(known_layouts, name, known_layouts._Store())


def one_row(kind: Kind, seed: int, texts: tuple[int, int] = (3, 4)) -> Any:
    """Qwen's models keep the offset of their positions, which the image's size makes, on
    themselves: only prompts with the same one can run at a time, without a plan too."""
    size = 0 if kind.qwen else seed % len(kind.sizes)
    return make(kind, [[("text", texts[0]), ("image", size), ("text", texts[1])]], seed=seed)


def test_eight_threads_are_as_one(kind: Kind) -> None:
    """Each with its own prompt, by images and by embeddings, and text alone between them."""
    model = build(kind)
    prompts = []
    for number in range(12):
        batch = one_row(kind, number, (1 + number % 3, 2 + number % 2))
        prompts.append((batch, into_stack(model, batch.inputs(model))))
    yopo.apply(model, a_plan())

    def work(number: int) -> list[Tensor]:
        batch, fed = prompts[number]
        given = batch.inputs(model, positions=False)
        places = {} if fed.positions is None else {"position_ids": fed.positions}
        told = dict(visual_mask=batch.layout.visual, visual_grids=batch.grids)
        how = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
        text = make(kind, [[("text", 6 + number)]], seed=number)
        with torch.no_grad():
            return [
                model.generate(**given, **how),
                model(**batch.inputs(model)).logits,
                model(inputs_embeds=fed.embeds, **told, **places).logits,
                model(**text.inputs(model)).logits,
            ]

    alone = [work(number) for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, [*range(12), *range(12)]))
    for number, found in enumerate(together):
        for a, b in zip(alone[number % 12], found, strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
def test_a_visual_column_by_itself_is_never_text(kind: Kind) -> None:
    """Unknown, it is refused; remembered, it is what it was in its prompt."""
    model, batch = build(kind), one_row(kind, 1)
    fed = into_stack(model, batch.inputs(model))
    yopo.apply(model, a_plan(window=None))
    first = int(batch.layout.visual[0].nonzero()[0])

    def places(start: int, stop: int) -> dict[str, Any]:
        turned = fed.positions
        return {} if turned is None else {"position_ids": turned[..., start:stop]}

    def columns(cuts: list[int]) -> Tensor:
        cache, logits = DynamicCache(), []  # which Qwen2-VL of 4.45 does not make by itself
        for start, stop in pairwise(cuts):
            out = model(
                inputs_embeds=fed.embeds[:, start:stop].clone(),
                attention_mask=batch.mask[:, :stop],
                past_key_values=cache,
                use_cache=True,
                **places(start, stop),
            )
            cache = out.past_key_values
            logits.append(out.logits)
        return torch.cat(logits, 1)

    n = fed.embeds.shape[1]
    columns([*range(first + 1)])  # the text before it, each token by itself, is text
    for cuts in ([*range(n + 1)], [*range(first), first, first + 1]):
        with pytest.raises(ValueError, match="nothing is known of these inputs_embeds of 1 token"):
            columns(cuts)
    found = batch.layout
    remember(fed.embeds, VisualLayout(found.visual, found.image, found.row, found.col,
                                      tuple(map(tuple, batch.grids))))  # fmt: skip
    expected = columns([0, n])
    for cuts in ([*range(n + 1)], [0, first, first + 1, n], [0, n - 1, n]):
        assert (columns(cuts) - expected).abs().max() < 1e-4
