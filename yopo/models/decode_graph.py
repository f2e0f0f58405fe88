"""A decode step of fixed shapes, for graphs.py: each row of the batch gets one text token, over
buffers of a fixed size, with masks over what is not filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from yopo.engine.forward import Run, run
from yopo.engine.head_store import HeadStore, StaticStore
from yopo.engine.layer import Pass
from yopo.engine.layer_plan import BLIND, SEEN, LayerPlans
from yopo.engine.packing import Packing
from yopo.engine.text_attention import Sight, TextSight, shift_behind
from yopo.engine.visual_cache import VisualCache
from yopo.models.captured import Captured, rounded_up
from yopo.versions import rope, takes_any_position

TEXT_SLOTS, VISUAL_SLOTS = 256, 64  # buffers are as long as a multiple of these


def is_step(called: Any) -> bool:
    """Whether each row gets one text token, none has padding, and nothing else is asked for."""
    batch, n = called.layout.shape
    cache = called.cache
    return (
        n == 1
        and batch > 0
        and called.keep_cache
        and not called.output_hidden_states
        and not called.layout.visual.any()
        and cache.even
        and cache.length > 0
        and bool(called.valid.all())
    )


def fits(plans: LayerPlans) -> bool:
    """Whether each store is read as a whole: by heads that see all of it, or hold text alone."""
    return all(
        all(plan.paired)
        and all((group.store == SEEN) == (group.sight is Sight.ALL) for group in plan.text)
        for plan in plans.plans
    )


def has_fixed_angles(decoder: Any) -> bool:
    """Whether rotary angles hang on positions alone, not on how long the sequence has become."""
    kind = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    return takes_any_position(decoder) and kind not in (None, "dynamic", "longrope")


def slots_of(cache: VisualCache) -> tuple[int, int] | None:
    """How many slots the buffers need, for visual tokens and for text, rounded up."""
    pair = next((store for pair in cache.stores for store in pair if store.text), None)
    if pair is None:
        return None
    visual = cache.visual_slots
    return rounded_up(visual, VISUAL_SLOTS), rounded_up(pair.text + 1, TEXT_SLOTS)


@dataclass
class _Inputs:
    """What a captured step reads that changes from step to step.

    embeds: (B, 1, d). places: position_ids. seen_at, blind_at: (1,) int64, the slots that the new
    token takes in the stores of heads that see visual tokens, and in the others. shift: see
    TextSight.sink_shift.
    """

    embeds: Tensor
    places: Tensor
    seen_at: Tensor
    blind_at: Tensor
    shift: Tensor


class Step:
    """One decode step over buffers of its own, which one cache at a time fills."""

    def __init__(
        self,
        decoder: Any,
        plans: LayerPlans,
        how: Run,
        called: Any,
        slots: tuple[int, int],
    ) -> None:
        self._decoder, self._plans, self._how = decoder, plans, how
        self._rotary = decoder.rotary_emb
        embeds = called.inputs_embeds
        device, (batch, _, _) = embeds.device, embeds.shape
        visual, text = slots
        with torch.inference_mode(False):
            self._inputs = _Inputs(
                torch.zeros_like(embeds),
                torch.zeros_like(called.position_ids).contiguous(),
                torch.zeros(1, dtype=torch.int64, device=device),
                torch.zeros(1, dtype=torch.int64, device=device),
                torch.zeros(batch, 1, 1, 1, device=device),
            )
            at = self._inputs.seen_at, self._inputs.blind_at
            lengths = visual + text, text
            self.stores = [
                tuple(
                    StaticStore(embeds, count, plans.head_dim, lengths[n], at[n]) if count else None
                    for n, count in enumerate(plan.kv_counts)
                )
                for plan in plans.plans
            ]
        self._lengths = lengths
        self._owner: Any = lambda: None
        self._captured = Captured(device)

    def __call__(self, cache: VisualCache, embeds: Tensor, places: Tensor) -> Tensor:
        stores = [store for pair in cache.stores for store in pair]
        mine = [store for pair in self.stores for store in pair]
        if self._owner() is not cache or not all(
            own is None or own.is_of(store) for own, store in zip(mine, stores, strict=True)
        ):
            self._take(cache, stores, mine)
        given = self._inputs
        text = next(store.text for store in stores if store.text)
        given.embeds.copy_(embeds)
        given.places.copy_(places)
        given.seen_at.fill_(cache.visual_slots + text)
        given.blind_at.fill_(text)
        if (sinks := self._decoder.yopo_plan.sinks) is not None:
            given.shift.fill_(shift_behind(sinks, cache.visual_slots))
        out: Tensor = self._captured(self._run)
        for store in stores:
            store.text += bool(store.text)
        return out.clone()

    def _take(
        self,
        cache: VisualCache,
        stores: Sequence[HeadStore],
        mine: Sequence[StaticStore | None],
    ) -> None:
        """Moves a cache into this step's buffers; the one that was there gets memory of its own."""
        before = self._owner()
        if before is not None and before is not cache:
            for own, store in zip(mine, (s for pair in before.stores for s in pair), strict=True):
                if own is not None and own.is_of(store):
                    store.part()
        for own, store in zip(mine, stores, strict=True):
            if own is not None and not own.is_of(store):
                own.hold(store)
        self._owner = ref(cache)

    def _run(self) -> Tensor:
        given, decoder = self._inputs, self._decoder
        batch, device = given.embeds.shape[0], given.embeds.device
        sights = [
            torch.zeros(length, dtype=given.embeds.dtype, device=device).masked_fill_(
                torch.arange(length, device=device) > at, -torch.inf
            )[None, None, None]
            for length, at in zip(self._lengths, (given.seen_at, given.blind_at), strict=True)
        ]
        text = Packing.all_of(batch, 1, 0, device)
        index = Pass(
            text=text,
            visual=Packing.all_of(batch, 0, 0, device),
            rows=text.rows,
            is_whole=True,
            text_sight=TextSight(sights[SEEN], sights[BLIND], False, given.shift),
            visual_sight=(),
        )
        cos, sin = rope(decoder, given.embeds, given.places, 1)
        return run(decoder.layers, self._plans, index, given.embeds, cos, sin, self, self._how)
