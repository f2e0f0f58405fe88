"""A prefill of fixed shapes, for graphs.py: the packed rows of a prompt with images go through the
layers, of text as many as a bucket has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yopo.engine.forward import Run, merge, prepare, share, through
from yopo.engine.head_store import HeadStore, empty_stores
from yopo.engine.layer import Pass
from yopo.engine.layer_plan import LayerPlans
from yopo.engine.packing import Packing, mapped, to_device
from yopo.models.captured import Captured, fill, rounded_up, shape_of
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import rope

BUCKET = 32  # text rows are as many as a multiple of this
LAYOUTS = 32  # are known at a time


def is_prefill(called: Any) -> bool:
    """Whether it is a whole prompt with images, of as many text and visual tokens in each row of
    the batch, none of them padding."""
    visual = called.layout.visual
    counts = visual.sum(1)
    return (
        called.cache.length == 0
        and called.keep_cache
        and not called.output_hidden_states
        and bool(called.valid.all())
        and bool((counts == counts[:1]).all())
        and 0 < int(counts[:1].sum()) < visual.shape[1]
    )


@dataclass(frozen=True)
class Placed:
    """Who is where in prompts of one layout. text, visual: packings on the CPU. index: on the
    device. rows: (Nt + Nv,) there, what stands for no token repeats the last one. texts: how many
    text tokens each row has. shape: of what a captured prefill of such prompts is for."""

    text: Packing
    visual: Packing
    index: Pass
    rows: Tensor
    texts: int
    shape: Any

    @classmethod
    def of(cls, called: Any, plan: PruningPlan, width: int, texts: int) -> Placed:
        """`called`: what the decoder was called with, resolved. Its cache gets the places."""
        device = called.inputs_embeds.device
        index = prepare(
            called.layout, called.valid, called.cache, plan, device.type == "cpu", width
        )
        with torch.inference_mode(False):
            there = to_device(index, device)
            rows = there.rows.clamp(max=called.layout.visual.numel() - 1)
        return cls(index.text, index.visual, there, rows, texts, shape_of(index))


class Places:
    """Where the tokens are of the prompts seen last: most differ in their text alone."""

    def __init__(self) -> None:
        self._known: dict[Any, Placed] = {}
        self._plan: PruningPlan | None = None

    def of(self, called: Any, plan: PruningPlan) -> Placed:
        """`called`: what the decoder was called with, resolved. Its cache gets the places."""
        if self._plan is not plan:
            self._known, self._plan = {}, plan
        layout, device = called.layout, called.inputs_embeds.device
        texts = layout.shape[1] - int(layout.visual[0].sum())
        width = rounded_up(texts, BUCKET)
        each = (layout.visual, layout.image, layout.row, layout.col)
        key = (layout.shape, layout.grids, device, *(x.numpy().tobytes() for x in each))
        placed = self._known.pop(key, None)
        if placed is None:
            placed = Placed.of(called, plan, width, texts)
        else:
            called.cache.extend(layout, called.valid, placed.text, placed.visual)
        self._known = {**dict(list(self._known.items())[-(LAYOUTS - 1) :]), key: placed}
        return placed


class Prefill:
    """The layers on prompts of one shape."""

    def __init__(self, decoder: Any, plans: LayerPlans, how: Run, placed: Placed) -> None:
        self._decoder, self._plans, self._how = decoder, plans, how
        self._rotary = decoder.rotary_emb
        with torch.inference_mode(False):
            self._index = mapped(placed.index, lambda each: each.contiguous().clone())
        self._filled_for: Placed | None = placed
        self._packed: tuple[Tensor, ...] | None = None  # rows, and cos and sin of their angles
        self._captured = Captured(placed.rows.device)

    def __call__(self, called: Any, placed: Placed) -> Tensor:
        """The output (B, n, d), not normed, of what the decoder was `called` with, resolved; its
        cache gets what the layers stored."""
        cache, embeds = called.cache, called.inputs_embeds
        angles = rope(self._decoder, embeds, called.position_ids, embeds.shape[1])
        packed = tuple(x.flatten(0, 1)[placed.rows] for x in (embeds, *angles))
        if self._packed is None:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = mapped(packed, torch.zeros_like)
        fill(self._packed, packed)
        if self._filled_for is not placed:
            fill(self._index, placed.index)
            self._filled_for = placed
        rows, stores = self._captured(self._through)
        empty = placed.text.width - placed.texts
        for pair, filled in zip(cache.stores, stores, strict=True):
            for store, own in zip(pair, filled, strict=True):
                store.take(own)
                if store.text:
                    store.part()
                    store.text -= empty  # the last, which the tokens to come will fill
        cache.drop_slots(empty)
        cache.filling = False
        return merge(rows, placed.index, embeds.shape)

    def _through(self) -> tuple[Tensor, list[tuple[HeadStore, HeadStore]]]:
        assert self._packed is not None
        rows, cos, sin = self._packed
        shared = share(self._plans, self._index, cos, sin, self._how)
        filled = _Filled(empty_stores(self._plans.stored))
        rows = through(self._decoder.layers, self._plans, shared, rows, filled, self._how)
        return rows, filled.stores


@dataclass
class _Filled:
    """What `through` needs of a cache."""

    stores: list[tuple[HeadStore, HeadStore]]
    filling: bool = True
