"""Arguments of a pruned forward: what is refused, with the value, and what is understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import Shape, build, make_case

from yopo.models.arguments import valid_tokens
from yopo.plan.pruning_plan import PruningPlan

SHAPE = Shape()
PLAN = PruningPlan(torch.tensor([[1, 0, 1, 0]] * 3), window=3, layer_cut=2, ffn_ratio=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SHAPE, PLAN)


@pytest.fixture
def arguments() -> dict[str, Any]:
    return make_case([[("text", 2), ("image", 2, 2, False), ("text", 3)]], SHAPE.heads * 8).kwargs()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"output_hidden_states": -1}, "output_hidden_states is -1"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "cu_seq_lens_q"),
        ({"attention_mask": torch.ones(1, 8)}, r"attention_mask has shape \(1, 8\)"),
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, "not the causal mask"),
        ({"attention_mask": torch.ones(1, 1, 9, 9).bool()}, "not the causal mask"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])}, "says padding"),
        (
            {"attention_mask": None, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])},
            "start anew",
        ),
        ({"visual_mask": torch.ones(1, 8).bool()}, r"visual_mask has shape \(1, 8\)"),
        ({"visual_mask": torch.ones(2, 9).bool()}, r"visual_mask has shape \(2, 9\)"),
        ({"visual_mask": torch.zeros(1, 8).bool()}, r"visual_mask has shape \(1, 8\)"),
        ({"visual_mask": None}, "visual_grids is given without visual_mask"),
        ({"visual_mask": [[False] * 9]}, "visual_mask is of list"),
        ({"visual_mask": torch.full((1, 9), 0.5)}, "visual_mask is of torch.float32"),
        ({"visual_mask": torch.full((1, 9), 2)}, "visual_mask holds the value 2"),
        ({"visual_grids": [(2, 2)]}, "visual_grids has"),
        ({"visual_grids": [[(2, 2)], [(2, 2)]]}, "grids for 2 rows"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_right_is_refused(
    model: Any, arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    assert model(**arguments, use_cache=False).logits.isfinite().all()
    # TypeError: transformers before 4.45 has no room for cu_seq_lens_q in the first place.
    with pytest.raises((ValueError, TypeError), match=message):
        model(**(arguments | {"visual_grids": [[(2, 2)]]} | changes), use_cache=False)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("pads", [(0, 0), (2, 0), (0, 3)])
@torch.no_grad()
def test_causal_4d_masks_say_the_same_as_2d_ones(additive: bool, pads: tuple[int, int]) -> None:
    two = torch.ones(1, 9, dtype=torch.long)
    two[:, : pads[0]] = 0
    two[:, 9 - pads[1] :] = 0
    four = torch.ones(9, 9).tril().bool() & two.bool()[:, None, None, :]
    if additive:
        four = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    assert torch.equal(valid_tokens(four, None, 1, 0, 9), two.bool())
    later = four[:, :, 4:]  # a chunk of five after four
    assert torch.equal(valid_tokens(later, None, 1, 4, 5), two.bool())


@torch.no_grad()
def test_embeddings_of_which_nothing_is_known_are_refused(arguments: dict[str, Any]) -> None:
    model = build(SHAPE, PLAN)
    embeds = arguments["inputs_embeds"]
    with pytest.raises(ValueError, match="nothing is known of these inputs_embeds .* visual_mask"):
        model(inputs_embeds=embeds)
    nothing = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    same_without = build(SHAPE)(inputs_embeds=embeds).logits
    assert torch.equal(model(inputs_embeds=embeds, visual_mask=nothing).logits, same_without)
