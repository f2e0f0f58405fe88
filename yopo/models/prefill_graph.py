"""A prefill of fixed shapes, for graphs.py: the packed rows of a prompt with images go through the
layers, of text as many as a bucket has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yopo.engine.forward import Run, merge, pack, prepare, share, through
from yopo.engine.head_store import HeadStore, empty_stores
from yopo.engine.layer import Shared
from yopo.engine.layer_plan import LayerPlans
from yopo.engine.packing import mapped
from yopo.engine.visual_cache import VisualCache
from yopo.models.captured import Captured, fill, rounded_up, shape_of
from yopo.versions import rope

BUCKET = 32  # text rows are as many as a multiple of this


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
class Prompt:
    """A prompt made ready for the layers. texts: how many text tokens each row has. key: the shapes
    of what a captured prefill of it is for."""

    rows: Tensor
    shared: Shared
    texts: int
    key: Any

    @classmethod
    def of(cls, decoder: Any, called: Any, how: Run) -> Prompt:
        """`called`: what the decoder was called with, resolved. Its cache gets the places."""
        layout, embeds, cache = called.layout, called.inputs_embeds, called.cache
        texts = layout.shape[1] - int(layout.visual[0].sum())
        width = rounded_up(texts, BUCKET)
        on_cpu = embeds.device.type == "cpu"
        index = prepare(layout, called.valid, cache, decoder.yopo_plan, on_cpu, width)
        cos, sin = rope(decoder, embeds, called.position_ids, layout.shape[1])
        plans = decoder._yopo_layer_plans
        shared = share(plans, index, pack(cos, index), pack(sin, index), how)
        rows = pack(embeds, index)
        return cls(rows, shared, texts, (shape_of(rows), shape_of(shared)))


class Prefill:
    """The layers on prompts of one shape."""

    def __init__(self, decoder: Any, plans: LayerPlans, how: Run, like: Prompt) -> None:
        self._decoder, self._plans, self._how = decoder, plans, how
        with torch.inference_mode(False), torch.no_grad():
            device = like.rows.device
            self._rows = torch.zeros_like(like.rows)
            self._shared = mapped(like.shared, lambda each: each.to(device).contiguous().clone())
        self._captured = Captured(like.rows.device)

    def __call__(self, cache: VisualCache, prompt: Prompt, shape: Sequence[int]) -> Tensor:
        """The output (B, n, d), not normed; `cache` gets what the layers stored."""
        self._rows.copy_(prompt.rows)
        fill(self._shared, prompt.shared)
        rows, stores = self._captured(self._through)
        empty = prompt.shared.index.text.width - prompt.texts
        for pair, filled in zip(cache.stores, stores, strict=True):
            for store, own in zip(pair, filled, strict=True):
                store.take(own)
                if store.text:
                    store.part()
                    store.text -= empty  # the last, which the tokens to come will fill
        cache.drop_slots(empty)
        cache.filling = False
        return merge(rows, prompt.shared.index, shape)

    def _through(self) -> tuple[Tensor, list[tuple[HeadStore, HeadStore]]]:
        filled = _Filled(empty_stores(self._plans.stored))
        rows = through(
            self._decoder.layers, self._plans, self._shared, self._rows, filled, self._how
        )
        return rows, filled.stores


@dataclass
class _Filled:
    """What `through` needs of a cache."""

    stores: list[tuple[HeadStore, HeadStore]]
    filling: bool = True
