"""A plan worked out for one model: which heads of each layer do what.

Index tensors only, made once when a plan is put on a model. Nothing here knows an input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from yopo.engine.packing import to_device
from yopo.engine.text_attention import Sight
from yopo.plan.config_fields import head_sizes
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

# The two stores of a layer: key/value heads that some text queries see visual tokens through, and
# the others.
SEEN, BLIND = 0, 1


@dataclass(frozen=True)
class HeadGroup:
    """Query heads treated alike.

    q: (H',) query heads; None: all.
    store: SEEN or BLIND, which keys and values they read.
    kv: (H',) their place among the store's key/value heads; None: one to one.
    sight: what they get from visual keys.
    """

    q: Tensor | None
    store: int
    kv: Tensor | None
    sight: Sight


@dataclass(frozen=True)
class SinkWeights:
    """What predicts the sinks' logits of all H heads of a layer: a (H, 1, 1), b (H, D, 1) or None
    for 0."""

    a: Tensor
    b: Tensor | None


@dataclass(frozen=True)
class LayerPlan:
    """What one layer computes under a plan.

    heads: H, how many query heads the layer has.
    kv: for each store the key/value heads it holds.
    visual_keys, visual_values: whether a store holds those of visual tokens too.
    text, visual: head groups of text and of visual queries (heads in no group give zero).
    text_order: (H,) puts the concatenated outputs of `text` back in head order; None if they are.
    visual_heads: the query heads of `visual` in that order; None: all in order.
    visual_key_heads, visual_value_heads: the key/value heads of which visual rows have keys and
        values; None: all.
    runs_visual: visual rows are not done with before this layer.
    attends_visual: visual rows go through attention (if with no head: its bias is added).
    neurons: how many of the FFN's they use; None: all.
    window: which of the plan's windows (`windows`) they see their neighbours in.
    sink: of its blind heads; None: none has one.
    """

    heads: int
    kv: tuple[Tensor, Tensor]
    visual_keys: tuple[bool, bool]
    visual_values: tuple[bool, bool]
    text: tuple[HeadGroup, ...]
    visual: tuple[HeadGroup, ...]
    text_order: Tensor | None
    visual_heads: Tensor | None
    visual_key_heads: Tensor | None
    visual_value_heads: Tensor | None
    runs_visual: bool
    attends_visual: bool
    neurons: int | None
    window: int
    sink: SinkWeights | None

    @property
    def changes_visual(self) -> bool:
        """Whether visual rows leave this layer other than they came."""
        return self.runs_visual and (self.neurons != 0 or self.attends_visual)

    @property
    def takes_visual(self) -> bool:
        """Whether this layer needs visual rows: to change them, or for keys that heads read."""
        reads = any(
            keys and len(kv) > 0 for keys, kv in zip(self.visual_keys, self.kv, strict=True)
        )
        return self.changes_visual or (self.runs_visual and reads)

    @classmethod
    def build(cls, plan: PruningPlan, layer: int, kv_heads: int, ffn_size: int) -> LayerPlan:
        per_kv = plan.num_heads // kv_heads
        keep = plan.head_keep[layer]
        below_cut = layer < plan.layer_cut
        seeing = keep if below_cut else torch.zeros_like(keep)
        mass = plan.head_mass if below_cut else plan.cut_mass
        blind_sight = _SIGHTS[mass]
        # Of query heads that share keys and values (GQA) some may see and some be blind: then the
        # blind ones read the text in the store of the others, and none is held twice.
        shared = seeing.unflatten(0, (-1, per_kv)).any(1).repeat_interleave(per_kv)
        kv = _kv_heads(shared, per_kv), _kv_heads(~shared, per_kv)

        def groups(seeing: Tensor, blind: Tensor) -> tuple[HeadGroup, ...]:
            made = []
            for chosen, store, sight in (
                (seeing, SEEN, Sight.ALL),
                (blind & shared, SEEN, blind_sight),
                (blind & ~shared, BLIND, blind_sight),
            ):
                q = chosen.nonzero().flatten()
                if len(q) == 0:
                    continue
                place = torch.searchsorted(kv[store], q // per_kv)
                straight = torch.equal(place, torch.arange(len(kv[store]), device="cpu"))
                every = None if len(q) == plan.num_heads else q
                made.append(HeadGroup(every, store, None if straight else place, sight))
            return tuple(made)

        text = groups(seeing, ~seeing)
        # Blind visual queries: kept heads past the cut; pruned ones too if these are not zero.
        blind = ~seeing & keep if plan.prune_visual_queries else ~seeing
        runs_visual = below_cut or plan.cut_mass == "exact"
        attends = runs_visual and plan.visual_attends[layer]
        visual = groups(seeing, blind) if attends else ()
        whole = len(visual) == 1 and visual[0].q is None
        every_key = blind_sight is Sight.MASS
        neurons = plan.ffn_neurons(ffn_size)[layer]
        has_sink = blind_sight is Sight.SINK and not bool(seeing.all())
        values_of = None if len(kv[SEEN]) == kv_heads else kv[SEEN]
        return cls(
            heads=plan.num_heads,
            kv=kv,
            visual_keys=(True, every_key),
            visual_values=(True, False),
            text=text,
            visual=visual,
            text_order=None if len(text) == 1 else _heads_in_turn(text).argsort(),
            visual_heads=None if whole else _heads_in_turn(visual),
            # Where the stores together want the visual keys of all heads, one product makes them.
            visual_key_heads=None if every_key else values_of,
            visual_value_heads=values_of,
            runs_visual=runs_visual,
            attends_visual=attends,
            neurons=None if neurons == ffn_size else neurons,
            window=windows(plan).index(plan.windows[layer]),
            sink=_sink_of(plan.sinks, layer) if has_sink else None,
        )


_SIGHTS = {"exact": Sight.MASS, "sink": Sight.SINK, "drop": Sight.NOTHING}


def windows(plan: PruningPlan) -> tuple[int | None, ...]:
    """The windows that the layers of a plan have, each once."""
    return tuple(dict.fromkeys(plan.windows))


def sink_weights(a: Tensor, b: Tensor | None) -> SinkWeights:
    """Of a layer's a (H,) and b (H, D), through which gradients flow."""
    return SinkWeights(a[:, None, None], None if b is None else b[:, :, None])


def _sink_of(sinks: Sinks | None, layer: int) -> SinkWeights:
    assert sinks is not None  # a plan whose mass is "sink" has them: PruningPlan
    return sink_weights(sinks.a[layer], None if sinks.b is None else sinks.b[layer])


def _kv_heads(query_heads: Tensor, per_kv: int) -> Tensor:
    """The key/value heads that `query_heads` (H,) bool read."""
    return (query_heads.nonzero().flatten() // per_kv).unique()


def _heads_in_turn(groups: tuple[HeadGroup, ...]) -> Tensor:
    """The query heads of some groups, of which none has all, one group after the other."""
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.cat([none, *(group.q for group in groups if group.q is not None)])


@dataclass(frozen=True)
class LayerPlans:
    """A plan worked out for one model: each layer's part, and what is needed of the config."""

    plans: list[LayerPlan]
    ffn_size: int
    head_dim: int
    dropout: float

    @classmethod
    def build(cls, config: Any, plan: PruningPlan) -> LayerPlans:
        size = config.intermediate_size
        _, kv_heads, head_dim = head_sizes(config)
        return cls(
            plans=[
                LayerPlan.build(plan, layer, kv_heads, size) for layer in range(plan.num_layers)
            ],
            ffn_size=size,
            head_dim=head_dim,
            dropout=getattr(config, "attention_dropout", 0.0) or 0.0,
        )

    def on(self, layer: int, device: torch.device) -> LayerPlan:
        """The plan of a layer with its index tensors where the layer computes, moved there once."""
        plan = self.plans[layer]
        if plan.kv[0].device != device:
            with torch.inference_mode(False):  # they outlive this call, and training may follow
                plan = to_device(plan, device)
            self.plans[layer] = plan  # not read back: replicas on other devices write here too
        return plan

    def with_sinks(self, a: Tensor, b: Tensor) -> LayerPlans:
        """These plans with a (L, H) and b (L, H, D) in their sinks' place, wherever one has some;
        gradients reach both."""
        plans = [
            plan
            if plan.sink is None
            else replace(plan, sink=to_device(sink_weights(a[n], b[n]), plan.kv[0].device))
            for n, plan in enumerate(self.plans)
        ]
        return replace(self, plans=plans)

    def kv_heads(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer the key/value heads of its two stores."""
        return [plan.kv for plan in self.plans]
