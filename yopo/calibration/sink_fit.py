"""Sinks fitted to a model under its plan: `fit_sinks`. Least squares on the log-sum-exp over the
visual keys of blind heads, over the text queries of some samples; nothing n × n is held and no
weight changes. Moving them by gradient is sink_tuning.py's, how far answers are divergence.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from yopo.calibration.collect import blocks, fit_weight, log_sums
from yopo.calibration.divergence import mean_kl, references
from yopo.calibration.sink_tuning import tune_sinks
from yopo.engine import forward as engine
from yopo.engine.layer import LayerCall, Stores
from yopo.engine.text_attention import heads as heads_of
from yopo.models.parts import plan_of
from yopo.models.trial import decoder_of
from yopo.plan.config_fields import head_dim
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks
from yopo.plan.value_checks import integer
from yopo.prompts.sample import Sample

TARGETS = ("exact", "dense")
HELD_OUT = 4  # every fourth sample chooses the ridge, and whether b helps
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of b, times the mean of its diagonal


@dataclass(frozen=True, eq=False)
class SinkFit:
    """What a fit came to.

    plan: with the sinks. samples: how many they were fitted to. target: as asked. before, after: KL
    (nats a token) from the target of the answers to the samples held out, with drop in the sinks'
    place and with them; nan: too few samples to hold one out. with_b: share of the blind heads in
    which b helps; nan: none is blind. `str` says it.
    """

    plan: PruningPlan
    samples: int
    target: str
    before: float
    after: float
    with_b: float

    def __str__(self) -> str:
        aim = "the dense model" if self.target == "dense" else "exact mass"
        said = [f"KL from {aim} {self.before:.3g} with drop, {self.after:.3g} with them"]
        if isnan(self.before):
            said = [f"none held out to measure them by (every {HELD_OUT}th is)"]
        said += [f"the query helps in {100 * self.with_b:.0f} % of the blind heads"]
        if isnan(self.with_b):
            said = ["no head is blind under this plan, so none has a use for them"]
        return f"sinks fitted to {self.samples} samples: {'; '.join(said)}"


def fit_sinks(
    model: nn.Module,
    samples: Iterable[Sample],
    plan: PruningPlan | None = None,
    *,
    target: str = "exact",
    limit: int | None = None,
    tune: int | None = None,
    answer_tokens: int = 16,
    progress: bool = False,
) -> SinkFit:
    """Sinks for `model` under `plan`, its own if None, from `samples`, model inputs of one prompt
    each (sample.py); the model and its plan stay as they are. A plan with no mass "sink" gets
    sink/sink.

    target: whose visual mass the sinks give: "exact", of the plan under exact/exact, which released
    checkpoints were fine-tuned under; "dense", of the model without a plan. limit: take only so
    many samples. tune: so many steps then move them by gradient (sink_tuning.py). answer_tokens: of
    an answer at most, where a sample has none.

    Raises ValueError for a model without a plan, samples without an image or text behind it or too
    few to tune by, and logits that are not finite.
    """
    plan = plan_of(model) if plan is None else getattr(plan, "plan", plan)
    if plan is None:
        raise ValueError(
            "the model has no plan, so no head is blind: give one (plan=), or apply it first"
        )
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; allowed: {', '.join(TARGETS)}")
    for name, number in (("limit", limit), ("tune", tune), ("answer_tokens", answer_tokens)):
        if number is not None:
            integer(name, number, 1, None)
    taken = list(islice(samples, limit))
    if len(taken) < (1 if tune is None else HELD_OUT):
        least = "one" if tune is None else f"{HELD_OUT}, to tune by"
        raise ValueError(f"{len(taken)} samples to fit sinks to; give at least {least}")
    aim = plan.with_mass("exact") if target == "exact" else None
    config = decoder_of(model).config
    sums = _Sums(plan.num_layers, plan.num_heads, head_dim(config) + 1)
    bar = tqdm(taken, "sinks", disable=not progress, mininterval=1)
    known = references(model, bar, answer_tokens, aim, sums.watching)
    if not sums.grams.any():
        raise ValueError("no sample has text behind its image, which is what reads by sinks")
    a, b = sums.solve()
    sinks = Sinks(a, b, sums.tokens)
    masses = plan.head_mass, plan.cut_mass
    masses = masses if "sink" in masses else ("sink", "sink")
    fitted = replace(plan, sinks=sinks, head_mass=masses[0], cut_mass=masses[1])
    held = [one for i, one in enumerate(known) if _is_held_out(i)]
    if tune is not None:
        taught = [one for i, one in enumerate(known) if not _is_held_out(i)]
        fitted = tune_sinks(model, fitted, taught, held, tune, progress)
    dropped = fitted.with_mass("/".join(masses).replace("sink", "drop"))
    before, after = (mean_kl(model, one, held) for one in (dropped, fitted))
    helped = (b != 0).any(-1)[blind_heads(plan)].double().mean()
    return SinkFit(fitted, len(known), target, before, after, float(helped))


def _is_held_out(index: int) -> bool:
    return index % HELD_OUT == HELD_OUT - 1


def blind_heads(plan: PruningPlan) -> Tensor:
    """(L, H) bool, True where no text query reads the image."""
    blind = ~plan.head_keep
    blind[plan.layer_cut :] = True
    return blind


class Look(NamedTuple):
    """What some heads make of some text queries with an image before them.

    heads: (H',) int64, which of the layer's, on the CPU. still: (H', Q, D) the queries before their
    rotation. sums: (2, H', Q), their `log_sums`. before: (Q,) how many visual tokens come before
    each.
    """

    heads: Tensor
    still: Tensor
    sums: Tensor
    before: Tensor


def looks(
    call: LayerCall, still: Tensor, q: Tensor, stores: Stores, last: int | None = None
) -> Iterator[Look]:
    """Of all heads of a layer that engine.OBSERVER was told of, and all text queries with an image
    before them, or the `last` ones; still, q (T, H, D): before and after their rotation."""
    index = call.shared.index
    text_at, visual_at = (x.order[0].to(q.device) for x in (index.text, index.visual))
    keys_at, n_visual = torch.cat([visual_at, text_at]), len(visual_at)
    behind = (text_at > visual_at[0]).nonzero().flatten()
    behind = behind if last is None else behind[-last:]
    before = (visual_at[None, :] < text_at[behind, None]).sum(1)
    for group in call.plan.text:
        keys = heads_of(stores[group.store].keys, group.kv)[0]
        where = torch.arange(q.shape[1]) if group.q is None else group.q.cpu()
        for block in blocks(len(behind), keys.shape[0] * keys.shape[1]):
            at = behind[block]
            chosen, mine = (x[at][:, where.to(x.device)] for x in (still, q))
            sums = log_sums(mine, text_at[at], keys, keys_at, n_visual, call.shared.scale)
            yield Look(where, chosen.transpose(0, 1), sums, before[block])


class _Sums:
    """The normal equations of every head, of the samples that fit and of those held out.

    Features of a text query are 1 and q, unrotated; its weight is m(1 − m). grams (2, L, H, F, F),
    moments (2, L, H, F), squares (2, L, H), float64.
    """

    def __init__(self, layers: int, heads: int, features: int) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64)
        self.grams = zeros(2, layers, heads, features, features)
        self.moments = zeros(2, layers, heads, features)
        self.squares = zeros(2, layers, heads)
        self.tokens = 0  # how many visual tokens a sink stands for: the first sample's

    @contextmanager
    def watching(self, sample: int) -> Iterator[None]:
        """Adds what the layers of a pass over that sample attend to."""
        self._part, self._layer = int(_is_held_out(sample)), 0
        token = engine.OBSERVER.set(self._attention)
        try:
            yield
        finally:
            engine.OBSERVER.reset(token)

    def _attention(
        self, call: LayerCall, still: Tensor, q: Tensor, visual_q: Tensor, stores: Stores
    ) -> None:
        """still, q (T, H, D): text queries before and after their rotation."""
        self.tokens = self.tokens or len(call.shared.index.visual)
        for seen in looks(call, still, q, stores):
            features = F.pad(seen.still.double(), (1, 0), value=1)
            weighted = features * fit_weight(seen.sums)[..., None]
            shift = (seen.before.double() / self.tokens).log()
            self._add(seen.heads, features, weighted, seen.sums[0] - shift)
        self._layer += 1

    def _add(self, where: Tensor, features: Tensor, weighted: Tensor, target: Tensor) -> None:
        """features, weighted (H', Q, F), target (H', Q) of the heads `where` of this layer."""
        at = self._part, self._layer
        self.grams[at].index_add_(0, where, (weighted.mT @ features).cpu())
        self.moments[at].index_add_(0, where, (weighted * target[..., None]).sum(1).cpu())
        self.squares[at].index_add_(0, where, (weighted[..., 0] * target.square()).sum(1).cpu())

    def solve(self) -> tuple[Tensor, Tensor]:
        """a (L, H) and b (L, H, D), 0 where the samples held out are not nearer with it."""
        gram, held = self.grams
        ridge = gram.diagonal(dim1=-2, dim2=-1)[..., 1:].mean(-1)  # (L, H)
        penalty = torch.ones(gram.shape[-1], dtype=gram.dtype)
        penalty[0] = 0

        def solved(gram: Tensor, moment: Tensor, share: float) -> Tensor:
            added = (share * ridge)[..., None] * penalty + 1e-9
            return torch.linalg.solve(gram + torch.diag_embed(added), moment)

        def constant(gram: Tensor, moment: Tensor) -> Tensor:
            found = torch.zeros_like(moment)
            found[..., 0] = moment[..., 0] / gram[..., 0, 0].clamp(min=1e-12)
            return found

        def error(weights: Tensor) -> Tensor:  # (L, H), over the samples held out
            drawn = (held @ weights[..., None])[..., 0]
            return self.squares[1] + (weights * (drawn - 2 * self.moments[1])).sum(-1)

        gram_all, moment_all = self.grams.sum(0), self.moments.sum(0)
        tried = [constant(gram, self.moments[0])]
        final = [constant(gram_all, moment_all)]
        for share in RIDGES:
            tried.append(solved(gram, self.moments[0], share))
            final.append(solved(gram_all, moment_all, share))
        best = torch.stack([error(weights) for weights in tried]).argmin(0)
        weights = torch.stack(final).take_along_dim(best[None, ..., None], 0)[0].float()
        return weights[..., 0].contiguous(), weights[..., 1:].contiguous()
