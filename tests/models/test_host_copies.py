"""A step of generate() does not wait for a mask that lies on a device.

There is no device here: masks on the CPU are taken for ones that are not, and what would be fetched
is counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import a_plan as a_family_plan
from layouts import SHAPE, a_plan, build, left_padded
from random_families import HERE, KINDS, Kind
from random_families import build as build_family
from torch import Tensor

import yopo
from yopo.modeling_llama_prune import LlamaForCausalLM
from yopo.models import generating, host_copies

STEPS = 6


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    masks: list[Tensor] = []

    def counted(mask: Tensor) -> Tensor:
        masks.append(mask)
        return mask.clone()

    monkeypatch.setattr(host_copies, "fetch", counted)
    for module in (host_copies, generating):
        monkeypatch.setattr(module, "is_here", lambda mask: False)
    return masks


def asked(**more: Any) -> dict[str, Any]:
    kwargs = {**left_padded().kwargs(), "max_new_tokens": STEPS, "do_sample": False} | more
    del kwargs["position_ids"]
    return kwargs | {"pad_token_id": 0}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
def test_no_step_fetches_a_mask(inference: bool, beams: int, fetched: list[Tensor]) -> None:
    model = build(SHAPE, a_plan())
    model.generate(**asked())  # probes the layers
    fetched.clear()
    kwargs = asked(num_beams=beams)
    with torch.inference_mode(inference):
        made = model.generate(**kwargs)
    # At the prompt; once more at the first step what generate() or inference mode made anew since.
    assert 2 <= len(fetched) <= 3 + 2 * inference
    assert max(mask.shape[1] for mask in fetched) <= left_padded().shape[1] + 1
    assert torch.equal(made, build(SHAPE, a_plan()).generate(**kwargs))


@pytest.mark.parametrize("kind", [pytest.param(KINDS[n], id=n) for n in HERE])
def test_no_step_of_a_family_fetches_a_mask(kind: Kind, fetched: list[Tensor]) -> None:
    from family_checks import mixed
    from random_families import make

    batch = make(kind, mixed(kind)[:3], pads=[(1, 0)] * 3)
    model = yopo.apply(build_family(kind), a_family_plan())
    given = batch.inputs(model, False)
    model.generate(**given, max_new_tokens=1, do_sample=False)  # probes the layers
    assert any(mask.shape == batch.ids.shape for mask in fetched)
    fetched.clear()
    model.generate(**given, max_new_tokens=STEPS, do_sample=False)
    assert not fetched  # that of the prompt is known from before


def test_a_mask_that_was_changed_is_fetched_anew(fetched: list[Tensor]) -> None:
    mask = torch.ones(2, 4, dtype=torch.long)
    for change in (
        lambda: mask[0].fill_(0),
        lambda: setattr(mask, "data", torch.zeros(2, 4, dtype=torch.long)),
    ):
        assert torch.equal(host_copies.on_cpu(mask), host_copies.on_cpu(mask))
        count = len(fetched)
        change()
        assert torch.equal(host_copies.on_cpu(mask), mask) and len(fetched) == count + 1
    with torch.inference_mode():
        mask[1, 1] = 7
        assert torch.equal(host_copies.on_cpu(mask), mask) and len(fetched) == 4
    longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
    mask[0, 0] = 5  # what is known of it is out of date
    host_copies.note_ones_after(mask, longer)
    assert torch.equal(host_copies.on_cpu(longer), longer) and len(fetched) == 5


class Hiding(LlamaForCausalLM):
    """Whose steps do not see the last word of the prompt."""

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(*args, **kwargs)
        updated["attention_mask"][:, left_padded().shape[1] - 1] = 0
        return updated


class HidingAnew(LlamaForCausalLM):
    """The same, in a mask of its own."""

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(*args, **kwargs)
        mask = updated["attention_mask"].clone()
        mask[:, left_padded().shape[1] - 1] = 0
        return updated | {"attention_mask": mask}


@pytest.mark.parametrize("cls", [Hiding, HidingAnew])
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_somebody_changes_between_steps_counts(
    cls: type, inference: bool, request: pytest.FixtureRequest
) -> None:
    expected = build(SHAPE, a_plan(), cls).generate(**asked())
    assert not torch.equal(expected, build(SHAPE, a_plan()).generate(**asked()))
    request.getfixturevalue("fetched")
    with torch.inference_mode(inference):
        assert torch.equal(build(SHAPE, a_plan(), cls).generate(**asked()), expected)
