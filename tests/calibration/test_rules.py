"""The released head rule on cases small enough to do by hand."""

import pytest
import torch

from yopo.calibration.head_rule import released_head_keep, solve_alpha, visual_ratio


def test_ratio_sums_over_all_queries_and_both_texts() -> None:
    visual = torch.tensor([False, True, True, False])
    first = torch.tensor(
        [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0.25, 0.25, 0.25, 0.25]]
    )
    second = torch.eye(4)
    blind = torch.tensor([[1.0, 0, 0, 0]] * 4)
    layers = torch.stack([torch.stack([first, second]), torch.stack([blind, first])])
    expected = torch.tensor([[1.75 / 2.25, 1.0], [0.0, 1.75 / 2.25]])
    torch.testing.assert_close(visual_ratio(layers, visual), expected)
    # A generator of layers, as collected one by one, and half precision do as well.
    torch.testing.assert_close(visual_ratio((x.half() for x in layers), visual), expected)


def ratios_with_votes(votes: list[int], samples: int = 100) -> torch.Tensor:
    """(samples, 3 layers, heads): in layer 2, head i exceeds 0.1 in votes[i] samples."""
    ratios = torch.zeros(samples, 3, len(votes))
    for head, count in enumerate(votes):
        ratios[:count, 2, head] = 0.2
    return ratios


def test_forty_votes_of_a_hundred_are_not_enough() -> None:
    keep = released_head_keep(ratios_with_votes([39, 40, 41, 100]), alpha=0.1)
    assert keep.dtype == torch.bool
    assert keep[2].tolist() == [False, False, True, True]


@pytest.mark.parametrize(("vote", "samples", "limit"), [(0.29, 100, 29), (0.5, 3, 1), (0.0, 7, 0)])
def test_votes_at_the_limit_with_other_shares(vote: float, samples: int, limit: int) -> None:
    keep = released_head_keep(ratios_with_votes([limit, limit + 1], samples), 0.1, vote)
    assert keep[2].tolist() == [False, True]


def test_a_ratio_equal_to_alpha_is_no_vote() -> None:
    ratios = torch.full((10, 3, 2), 0.25)
    ratios[:, 2, 1] = 0.3
    assert released_head_keep(ratios, alpha=0.25)[2].tolist() == [False, True]


def test_first_layers_keep_all() -> None:
    ratios = torch.zeros(100, 4, 3)
    assert released_head_keep(ratios, 0.1).sum(1).tolist() == [3, 3, 0, 0]
    assert released_head_keep(ratios, 0.1, keep_first=0).sum() == 0
    assert released_head_keep(ratios, 0.1, keep_first=9).all()


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("samples", [1, 5, 100])
def test_solved_alpha_keeps_the_share_asked_for(keep: float, samples: int) -> None:
    ratios = torch.rand(samples, 8, 10, generator=torch.Generator().manual_seed(samples))
    alpha = solve_alpha(ratios, keep)
    assert released_head_keep(ratios, alpha).sum() == round(keep * 80)


def test_solved_alpha_cannot_prune_the_first_layers() -> None:
    ratios = torch.rand(20, 4, 4, generator=torch.Generator().manual_seed(0))
    keep = released_head_keep(ratios, solve_alpha(ratios, 0.1))
    assert keep.sum(1).tolist() == [4, 4, 0, 0]


def test_of_tied_heads_none_is_kept() -> None:
    ratios = torch.full((10, 3, 4), 0.5)
    ratios[:, 2, 0] = 0.9
    keep = released_head_keep(ratios, solve_alpha(ratios, 10 / 12))
    assert keep[2].tolist() == [True, False, False, False]
