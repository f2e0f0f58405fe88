"""A plan worked out for one model: which heads of each layer do what.

Index tensors only, made once when a plan is put on a model. Nothing here knows an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yopo.engine.packing import to_device
from yopo.engine.text_attention import Sight
from yopo.plan.pruning_plan import PruningPlan

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
    text_mass: (H',) constants m for queries with an image before them; None: 1.
    """

    q: Tensor | None
    store: int
    kv: Tensor | None
    sight: Sight
    text_mass: Tensor | None


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
    runs_visual: visual rows pass this layer.
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

    @classmethod
    def build(cls, plan: PruningPlan, layer: int, kv_heads: int) -> LayerPlan:
        per_kv = plan.num_heads // kv_heads
        keep = plan.head_keep[layer]
        below_cut = layer < plan.layer_cut
        seeing = keep if below_cut else torch.zeros_like(keep)
        mass = plan.head_mass if below_cut else plan.cut_mass
        blind_sight = Sight.MASS if mass == "exact" else Sight.NOTHING
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
                constants = None
                if mass == "calibrated" and sight is not Sight.ALL:
                    assert plan.text_mass is not None  # a calibrated plan has it: PruningPlan
                    constants = plan.text_mass[layer][q]
                every = None if len(q) == plan.num_heads else q
                made.append(HeadGroup(every, store, None if straight else place, sight, constants))
            return tuple(made)

        text = groups(seeing, ~seeing)
        # Blind visual queries: kept heads past the cut; pruned ones too if these are not zero.
        blind = ~seeing & keep if plan.prune_visual_queries else ~seeing
        runs_visual = below_cut or plan.cut_mass == "exact"
        visual = groups(seeing, blind) if runs_visual else ()
        whole = len(visual) == 1 and visual[0].q is None
        every_key = blind_sight is Sight.MASS
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
        )


def _kv_heads(query_heads: Tensor, per_kv: int) -> Tensor:
    """The key/value heads that `query_heads` (H,) bool read."""
    return (query_heads.nonzero().flatten() // per_kv).unique()


def _heads_in_turn(groups: tuple[HeadGroup, ...]) -> Tensor:
    """The query heads of some groups, of which none has all, one group after the other."""
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.cat([none, *(group.q for group in groups if group.q is not None)])


def head_sizes(config: Any) -> tuple[int, int, int]:
    """(query heads, key/value heads, features of a head), which configs may leave to be derived."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


@dataclass(frozen=True)
class LayerPlans:
    """A plan worked out for one model: each layer's part, how many FFN neurons visual rows use, and
    what attention needs of the config."""

    plans: list[LayerPlan]
    neurons: int | None  # None: all
    ffn_size: int
    head_dim: int
    dropout: float

    @classmethod
    def build(cls, config: Any, plan: PruningPlan) -> LayerPlans:
        neurons = plan.ffn_neurons(config.intermediate_size)
        _, kv_heads, head_dim = head_sizes(config)
        return cls(
            plans=[LayerPlan.build(plan, layer, kv_heads) for layer in range(plan.num_layers)],
            neurons=None if neurons == config.intermediate_size else neurons,
            ffn_size=config.intermediate_size,
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

    def kv_heads(self) -> list[tuple[Tensor, Tensor]]:
        """For each layer the key/value heads of its two stores."""
        return [plan.kv for plan in self.plans]
