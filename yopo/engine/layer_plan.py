"""A plan worked out for one model: which heads of each layer do what.

Index tensors only, made once when a plan is put on a model. Nothing here knows an input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from yopo.engine.head_store import StoredHeads
from yopo.engine.model_part import WHOLE, ModelPart
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
    """Query heads treated alike, which lie side by side in the plan's order.

    q: (H',) query heads; None: all.
    at: their place among the queries of its rows, in the plan's order.
    store: SEEN or BLIND, which keys and values they read.
    kv: (H',) their place among the store's key/value heads; None: one to one.
    sight: what they get from visual keys.
    """

    q: Tensor | None
    at: slice
    store: int
    kv: Tensor | None
    sight: Sight

    @property
    def count(self) -> int:
        return self.at.stop - self.at.start


@dataclass(frozen=True)
class SinkWeights:
    """What predicts the sinks' logits of the blind heads of a layer, in the plan's order: a
    (H', 1, 1), b (H', D, 1) or None for 0."""

    a: Tensor
    b: Tensor | None


@dataclass(frozen=True)
class LayerPlan:
    """What one layer computes under a plan.

    The plan's order of heads: of queries one group after the other, of keys and of values those of
    one store after those of the other. So whatever is treated alike lies side by side.

    heads: H, how many query heads the layer has.
    kv: for each store the key/value heads it holds; kv_counts: how many that is.
    visual_keys, visual_values: whether a store holds those of visual tokens too.
    text, visual: head groups of text and of visual queries (heads in no group give zero).
    count: H + 2 K, how many queries, keys and values the layer has.
    order: (H + 2 K,) the plan's order of [queries | keys | values]; None: it is the layer's own.
    in_turn: (H,) puts text queries from the plan's order into the layer's; None: they are.
    visual_order: (H',) which of [queries | keys | values] visual rows have: queries in the plan's
        order, keys of blind heads before those that are seen; None: all, in the layer's own.
    visual_counts: how many of each that is.
    visual_heads: the query heads of `visual` in the plan's order; None: all in the layer's own.
    visual_kv_heads: the key and the value heads likewise.
    runs_visual: visual rows are not done with before this layer.
    attends_visual: visual rows go through attention (if with no head: its bias is added).
    reads_visual: some head reads visual keys, of any process that computes a part of the layer.
    neurons: how many of the FFN's they use; None: all. own_neurons: how many of these this process
        computes.
    window: which of the plan's windows (`windows`) they see their neighbours in.
    sink: of its blind heads; None: none has one.
    """

    heads: int
    kv: tuple[Tensor, Tensor]
    kv_counts: tuple[int, int]
    visual_keys: tuple[bool, bool]
    visual_values: tuple[bool, bool]
    text: tuple[HeadGroup, ...]
    visual: tuple[HeadGroup, ...]
    count: int
    order: Tensor | None
    in_turn: Tensor | None
    visual_order: Tensor | None
    visual_counts: tuple[int, int, int]
    visual_heads: Tensor | None
    visual_kv_heads: tuple[Tensor | None, Tensor | None]
    runs_visual: bool
    attends_visual: bool
    reads_visual: bool
    neurons: int | None
    own_neurons: int
    window: int
    sink: SinkWeights | None

    @property
    def changes_visual(self) -> bool:
        """Whether visual rows leave this layer other than they came."""
        return self.runs_visual and (self.neurons != 0 or self.attends_visual)

    @property
    def takes_visual(self) -> bool:
        """Whether this layer needs visual rows: to change them, or for keys that heads read."""
        return self.changes_visual or (self.runs_visual and self.reads_visual)

    @classmethod
    def build(
        cls,
        plan: PruningPlan,
        layer: int,
        kv_heads: int,
        ffn_size: int,
        part: ModelPart = WHOLE,
    ) -> LayerPlan:
        """kv_heads, ffn_size: of the whole model. part: what of it this process computes."""
        sees = layer < plan.layer_cut and bool(plan.head_keep[layer].any())
        plan, kv_heads = part.of_plan(plan), part.size(kv_heads)
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

        def groups(blind: Tensor) -> tuple[HeadGroup, ...]:
            kinds = (
                (seeing, Sight.ALL),
                (blind & shared, blind_sight),
                (blind & ~shared, blind_sight),
            )
            return _grouped(kinds, (SEEN, SEEN, BLIND), kv, per_kv)

        text = groups(~seeing)
        # Blind visual queries: kept heads past the cut; pruned ones too if these are not zero.
        blind = ~seeing & keep if plan.prune_visual_queries else ~seeing
        runs_visual = below_cut or plan.cut_mass == "exact"
        attends = runs_visual and plan.visual_attends[layer]
        visual = groups(blind) if attends else ()
        every_key = blind_sight is Sight.MASS
        neurons = plan.ffn_neurons(ffn_size)[layer]
        has_sink = blind_sight is Sight.SINK and not bool(seeing.all())
        return cls(
            heads=plan.num_heads,
            kv=kv,
            kv_counts=(len(kv[SEEN]), len(kv[BLIND])),
            visual_keys=(True, every_key),
            visual_values=(True, False),
            text=text,
            visual=visual,
            **_orders(text, visual, kv, every_key, plan.num_heads, kv_heads),
            runs_visual=runs_visual,
            attends_visual=attends,
            reads_visual=sees or every_key,
            neurons=None if neurons == ffn_size else neurons,
            own_neurons=part.of_first(neurons, ffn_size),
            window=windows(plan).index(plan.windows[layer]),
            sink=_sink_of(plan.sinks, layer, text) if has_sink else None,
        )

    @property
    def paired(self) -> tuple[bool, bool]:
        """For each store whether it holds as many values as keys."""
        first, second = zip(self.visual_keys, self.visual_values, strict=True)
        return first[0] == first[1], second[0] == second[1]


def _orders(
    text: tuple[HeadGroup, ...],
    visual: tuple[HeadGroup, ...],
    kv: tuple[Tensor, Tensor],
    every_key: bool,
    heads: int,
    kv_heads: int,
) -> dict[str, Any]:
    """The fields of a LayerPlan that say in which order its heads are. every_key: visual rows have
    the keys of blind heads, too."""
    q, k = _heads_in_turn(text, heads), torch.cat(kv)
    visual_q = _heads_in_turn(visual, heads)
    visual_k = torch.cat([kv[BLIND], kv[SEEN]]) if every_key else kv[SEEN]
    first = heads, heads + kv_heads  # of [queries | keys | values]
    own = torch.arange(first[1] + kv_heads, device="cpu")
    order = torch.cat([q, first[0] + k, first[1] + k])
    visual_order = torch.cat([visual_q, first[0] + visual_k, first[1] + kv[SEEN]])
    return {
        "count": len(own),
        "order": _unless(order, own),
        "in_turn": None if _unless(q, own[: len(q)]) is None else q.argsort(),
        "visual_order": _unless(visual_order, own),
        "visual_counts": (len(visual_q), len(visual_k), len(kv[SEEN])),
        "visual_heads": _unless(visual_q, own[:heads]),
        "visual_kv_heads": (_unless(visual_k, own[:kv_heads]), _unless(kv[SEEN], own[:kv_heads])),
    }


def _grouped(
    kinds: Iterable[tuple[Tensor, Sight]],
    stores: Iterable[int],
    kv: tuple[Tensor, Tensor],
    per_kv: int,
) -> tuple[HeadGroup, ...]:
    """A group for each of `kinds` that has heads: which of all (H,) bool, and their sight; `stores`
    are those that they read."""
    made: list[HeadGroup] = []
    for (chosen, sight), store in zip(kinds, stores, strict=True):
        q = chosen.nonzero().flatten()
        if len(q) == 0:
            continue
        at = made[-1].at.stop if made else 0
        place = torch.searchsorted(kv[store], q // per_kv)
        straight = torch.arange(len(kv[store]), device="cpu")
        every = None if len(q) == len(chosen) else q
        group = slice(at, at + len(q))
        made.append(HeadGroup(every, group, store, _unless(place, straight), sight))
    return tuple(made)


_SIGHTS = {"exact": Sight.MASS, "sink": Sight.SINK, "drop": Sight.NOTHING}


def windows(plan: PruningPlan) -> tuple[int | None, ...]:
    """The windows that the layers of a plan have, each once."""
    return tuple(dict.fromkeys(plan.windows))


def sink_weights(a: Tensor, b: Tensor | None, text: tuple[HeadGroup, ...]) -> SinkWeights:
    """Of a layer's a (H,) and b (H, D), through which gradients flow; text: its text groups."""
    blind = [group.q for group in text if group.sight is Sight.SINK]
    if all(q is None for q in blind):
        return SinkWeights(a[:, None, None], None if b is None else b[:, :, None])
    heads = torch.cat([q.to(a.device) for q in blind if q is not None])
    return SinkWeights(a[heads][:, None, None], None if b is None else b[heads][:, :, None])


def _sink_of(sinks: Sinks | None, layer: int, text: tuple[HeadGroup, ...]) -> SinkWeights:
    assert sinks is not None  # a plan whose mass is "sink" has them: PruningPlan
    return sink_weights(sinks.a[layer], None if sinks.b is None else sinks.b[layer], text)


def _kv_heads(query_heads: Tensor, per_kv: int) -> Tensor:
    """The key/value heads that `query_heads` (H,) bool read."""
    return (query_heads.nonzero().flatten() // per_kv).unique()


def _heads_in_turn(groups: tuple[HeadGroup, ...], heads: int) -> Tensor:
    """The query heads of some groups, one group after the other."""
    none, every = torch.zeros(0, dtype=torch.int64, device="cpu"), torch.arange(heads, device="cpu")
    return torch.cat([none, *(every if group.q is None else group.q for group in groups)])


def _unless(index: Tensor, own: Tensor) -> Tensor | None:
    """`index`; None where it is `own`."""
    return None if torch.equal(index, own) else index


@dataclass(frozen=True)
class LayerPlans:
    """A plan worked out for one model: each layer's part, and what is needed of the config."""

    plans: list[LayerPlan]
    ffn_size: int
    head_dim: int
    dropout: float

    @classmethod
    def build(cls, config: Any, plan: PruningPlan, part: ModelPart = WHOLE) -> LayerPlans:
        size = config.intermediate_size
        _, kv_heads, head_dim = head_sizes(config)
        return cls(
            plans=[
                LayerPlan.build(plan, layer, kv_heads, size, part)
                for layer in range(plan.num_layers)
            ],
            ffn_size=part.size(size),
            head_dim=head_dim,
            dropout=getattr(config, "attention_dropout", 0.0) or 0.0,
        )

    def on(self, layer: int, device: torch.device) -> LayerPlan:
        """The plan of a layer with its index tensors where the layer computes, moved there once."""
        plan = self.plans[layer]
        if plan.kv[0].device == device:
            return plan
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
            else replace(
                plan, sink=to_device(sink_weights(a[n], b[n], plan.text), plan.kv[0].device)
            )
            for n, plan in enumerate(self.plans)
        ]
        return replace(self, plans=plans)

    @cached_property
    def stored(self) -> list[tuple[StoredHeads, StoredHeads]]:
        """For each layer what its two stores hold."""
        return [
            (StoredHeads(plan.kv[0], paired), StoredHeads(plan.kv[1], also))
            for plan in self.plans
            for paired, also in [plan.paired]
        ]
