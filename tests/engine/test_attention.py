"""Softmax attention: keys without values, causal text, half precision."""

from __future__ import annotations

import pytest
import torch

from yopo.engine.packing import Packing
from yopo.engine.text_attention import TextSight, additive, attend
from yopo.engine.visual_cache import VisualCache
from yopo.plan.pruning_plan import PruningPlan


def parts(queries: int, keys: int, values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 3, n, 8) for n in (queries, keys, values))


@pytest.mark.parametrize("queries", [1, 4])
def test_keys_without_values_take_their_share_and_give_nothing(queries: int) -> None:
    q, k, v = parts(queries, 7, 5)
    shares = (q @ k.transpose(2, 3) * 0.3).softmax(-1)
    torch.testing.assert_close(attend(q, k, v, None, 0.3), shares[..., 2:] @ v)


def test_causal_is_the_mask_that_it_stands_for() -> None:
    q, k, v = parts(6, 6, 6)
    mask = additive(torch.ones(6, 6, dtype=torch.bool).tril(), q.dtype)
    torch.testing.assert_close(attend(q, k, v, None, 0.3, causal=True), attend(q, k, v, mask, 0.3))


@pytest.mark.parametrize("valueless", [0, 3])
def test_scores_beyond_half_precision_do_not_overflow(valueless: int) -> None:
    """Qwen2's key biases give products that float16 holds only once they are scaled."""
    q = torch.full((1, 1, 1, 64), 40.0, dtype=torch.float16)
    k = torch.full((1, 1, 5, 64), 30.0, dtype=torch.float16)  # 76,800 before scaling
    v = torch.ones(1, 1, 5 - valueless, 64, dtype=torch.float16)
    out = attend(q, k, v, None, 64**-0.5)
    torch.testing.assert_close(out, torch.full_like(out, 1 - valueless / 5))


@pytest.mark.parametrize(
    ("valid", "causal"),
    [
        ([[1, 1, 1, 1]], True),
        ([[1, 1, 1, 1], [1, 1, 1, 1]], True),
        ([[0, 1, 1, 1], [1, 1, 1, 1]], True),  # of the padding an empty slot behind is left
        ([[1]], False),
    ],
)
def test_text_is_called_causal_only_where_it_is(valid: list[list[int]], causal: bool) -> None:
    alive = torch.tensor(valid).bool()
    packing = Packing.build(alive, 0)
    plan = PruningPlan(torch.ones(1, 1))
    cache = VisualCache.adopt(None, plan, len(valid), alive[:, :0], [])
    cache._orders = [(packing.order, packing.order[:, :0])]
    assert TextSight.build(packing, cache, alive).causal == causal
