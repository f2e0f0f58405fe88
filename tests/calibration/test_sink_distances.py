"""Sinks fitted to questions right behind one image, asked far behind it, behind several images, and
in a prompt that begins elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from calibration_samples import inputs
from layouts import Shape, build, make_case
from torch import Tensor

from yopo.calibration.divergence import mean_kl, references
from yopo.calibration.sink_fit import fit_sinks, looks
from yopo.engine import forward as engine
from yopo.plan.pruning_plan import PruningPlan

# As in a trained model, features that carry content hardly turn over the distances in question: of
# a head's four pairs one turns in 6 tokens, the others in 1,000 and more.
SHAPE = Shape(layers=2, theta=1e12)
PLAN = PruningPlan(torch.zeros(2, 4), layer_cut=2)
EXACT = PLAN.with_mass("exact")
COMMON = torch.randn(SHAPE.heads * 8, generator=torch.Generator().manual_seed(5))
QUESTIONS = range(100, 112)  # those fitted to are 0 to 47


def sample(seed: int, text: int = 0, images: int = 1, start: int = 0) -> dict[str, Any]:
    """`text` tokens between the images, which are all somewhat alike, and a question of 5; the
    prompt's first position is `start`."""
    row = [("text", 3), *[("image", 3, 4, False)] * images, ("text", text + 5)]
    case = make_case([row], len(COMMON), seed=seed, positions=True)
    case.inputs_embeds[case.visual] = 0.3 * case.inputs_embeds[case.visual] + COMMON
    case.position_ids = case.position_ids + start
    return inputs(case) | {"answer_ids": torch.tensor([[1]])}


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SHAPE)


@pytest.fixture(scope="module")
def fitted(model: Any) -> PruningPlan:
    return fit_sinks(model, [sample(seed) for seed in range(48)], PLAN).plan


def error_of_m(model: Any, plan: PruningPlan, **place: int) -> float:
    """Mean distance of the share of text from exact mass's, over heads and the questions' tokens,
    with the sinks that the engine makes of the queries."""
    exact: list[Tensor] = []
    drawn: list[Tensor] = []

    @contextmanager
    def watching(sample: int) -> Iterator[None]:
        def observe(call: Any, still: Tensor, q: Tensor, visual_q: Tensor, stores: Any) -> None:
            layer = len(exact) % SHAPE.layers
            (look,) = looks(call, still, q, stores, 5)
            sinks = plan.sinks
            logits = sinks.a[layer][:, None] + (look.still @ sinks.b[layer][..., None])[..., 0]
            exact.append(torch.sigmoid(look.sums[1] - look.sums[0]))
            logits = logits + (look.before / sinks.tokens).log()
            drawn.append(torch.sigmoid(look.sums[1] - logits))

        token = engine.OBSERVER.set(observe)
        yield
        engine.OBSERVER.reset(token)

    references(model, [sample(seed, **place) for seed in QUESTIONS], 1, EXACT, watching)
    return float((torch.stack(exact) - torch.stack(drawn)).abs().mean())


FAR = [dict(text=30), dict(text=100), dict(text=300)]
MANY = [dict(images=2), dict(images=4), dict(images=8)]


@pytest.mark.parametrize("place", [*FAR, *MANY, dict(text=100, images=8)], ids=str)
def test_they_are_no_worse_far_from_the_image_or_behind_several(
    model: Any, fitted: PruningPlan, place: dict[str, int]
) -> None:
    assert error_of_m(model, fitted, **place) < 1.1 * error_of_m(model, fitted) < 0.06
    kl = {}
    for name, where in {"near": {}, "there": place}.items():
        known = references(model, [sample(seed, **where) for seed in QUESTIONS], 1, EXACT)
        kl[name] = mean_kl(model, fitted, known)
    kl["drop"] = mean_kl(model, EXACT.with_mass("drop"), known)
    assert kl["there"] < min(1.2 * kl["near"], 0.5 * kl["drop"]), kl


def test_they_do_not_depend_on_where_the_prompt_begins(model: Any, fitted: PruningPlan) -> None:
    """Nor does exact mass: attention knows only how far tokens are from each other."""
    other = fit_sinks(model, [sample(seed, start=500) for seed in range(48)], PLAN).plan.sinks
    torch.testing.assert_close(other.a, fitted.sinks.a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.b, fitted.sinks.b, atol=1e-4, rtol=1e-4)
    first, moved = (
        references(model, [sample(seed, start=start) for seed in QUESTIONS], 1, EXACT)
        for start in (0, 500)
    )
    kl = mean_kl(model, fitted, first)
    assert mean_kl(model, fitted, moved) == pytest.approx(kl, rel=1e-3)
