"""Choosing heads by a rule: YOPO's released one (its gen_mask scripts), and the plan with it.

A head that spends little of its attention on the image is pruned. How much it spends on one sample
is `visual_ratio`; `released_head_keep` lets many samples vote. Arithmetic only; runs no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, isfinite

import torch
from torch import Tensor

from yopo.calibration.config import RuleConfig
from yopo.calibration.sample_statistics import Statistics
from yopo.plan.pruning_plan import PruningPlan


def plan_by_rule(statistics: Statistics, config: RuleConfig) -> tuple[PruningPlan, float]:
    """The plan that `config` asks for, of the model that the statistics are of, and its alpha."""
    ratios, alpha = statistics.ratios, config.alpha
    if alpha is None:
        alpha = solve_alpha(ratios, 0.5 if config.keep is None else config.keep)
    plan = PruningPlan(
        released_head_keep(ratios, alpha),
        window=config.window,
        window_causal=config.window_causal,
        layer_cut=ratios.shape[1] // 2 if config.layer_cut is None else config.layer_cut,
        ffn_ratio=config.ffn_ratio,
        **config.mass_fields(statistics),
    )
    return plan, alpha


def visual_ratio(attentions: Iterable[Tensor], visual: Tensor) -> Tensor:
    """How much of each head's attention goes to the image, relative to the text, in one sample.

    attentions: the softmax probabilities of each layer, (heads, n, n) each, query rows before key
        columns; a tensor (layers, heads, n, n) or any iterable over the layers.
    visual: (n,) bool, true where the token is visual.
    Returns (layers, heads) float32: the sum over all query rows and visual keys divided by the sum
    over all query rows and text keys (before and after the image alike).
    """
    ratios = []
    for probabilities in attentions:
        received = probabilities.float().sum(dim=-2)  # (heads, n): by each key, from all queries
        ratios.append(received[:, visual].sum(-1) / received[:, ~visual].sum(-1))
    return torch.stack(ratios)


def _votes_to_stay(samples: int, vote: float) -> int:
    """The smallest number of votes that is more than the share `vote` of the samples."""
    return floor(round(vote * samples, 6)) + 1  # rounded: 0.29 * 100 is 28.999999999999996


def released_head_keep(
    ratios: Tensor, alpha: float, vote: float = 0.4, keep_first: int = 2
) -> Tensor:
    """YOPO's head mask: a head stays if its ratio exceeds `alpha` in enough samples.

    ratios: (samples, layers, heads), `visual_ratio` of each sample.
    alpha: a ratio; a head has a sample's vote if its ratio is larger (not equal).
    vote: a head stays if more than this share of the samples vote for it; released: 40 of 100.
    keep_first: this many first layers keep all their heads; released: 2.
    Returns (layers, heads) bool, true where the head is kept.

    Raises ValueError for an alpha that is no finite number.
    """
    if not isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; allowed: finite numbers")
    keep = (ratios > alpha).sum(dim=0) >= _votes_to_stay(len(ratios), vote)
    keep[:keep_first] = True
    return keep


def solve_alpha(ratios: Tensor, keep: float, vote: float = 0.4, keep_first: int = 2) -> float:
    """The alpha at which `released_head_keep` keeps the share `keep` of all heads.

    The heads of the first layers count as kept. The nearest whole number of heads is aimed at; of
    heads that tie at the border none is kept. Never less than 0, so heads that look at no image
    in most samples cannot be asked for.
    """
    _, layers, heads = ratios.shape
    # A head stays exactly if this many-th largest of its ratios exceeds alpha.
    needed = min(_votes_to_stay(len(ratios), vote), len(ratios))
    border = ratios.sort(dim=0, descending=True).values[needed - 1, keep_first:].flatten()
    border = border.double().sort(descending=True).values
    count = round(keep * layers * heads) - min(keep_first, layers) * heads
    count = max(0, min(count, len(border)))
    if len(border) == 0:
        return 0.0
    if count == 0:
        return border[0].item()
    lower = border[count].item() if count < len(border) else 0.0
    return (border[count - 1].item() + lower) / 2
