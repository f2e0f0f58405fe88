"""The KV cache of a pruned pass: text keys and values of every head, visual ones only where the
plan reads them.

`VisualCache` holds all layers' stores (head_store.py) and what the slots stand for. A real
transformers Cache, so that generate() carries it about. No attention and no weights here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yopo.engine.head_store import HeadStore, StoredHeads, empty_stores
from yopo.engine.layout import Grid, VisualLayout
from yopo.engine.packing import Packing
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import (
    DynamicCache,
    StaticCache,
    clear_stock_cache,
    crop_counts_removed,
    emptied,
    longest,
    no_maximum,
    read_stock_cache,
)


def refuse_foreign(cache: Any) -> None:
    """Raises ValueError for a cache object that a pruned pass over an image cannot fill."""
    if cache is None or isinstance(cache, tuple | list | VisualCache):
        return
    offloads = getattr(cache, "offloading", False)
    if type(cache) not in (DynamicCache, StaticCache) or offloads:
        raise ValueError(
            f"past_key_values is {'an offloading' if offloads else 'a'} {type(cache).__name__}, "
            "which a pruned pass over an image cannot fill: its layers store different heads. Pass "
            "a transformers DynamicCache, a StaticCache, or None (generate: leave out "
            "cache_implementation, or 'static')"
        )


def refuse_longer(cache: Any, length: int) -> None:
    """Raises ValueError where a cache of a fixed length has no room for `length` tokens."""
    limit = cache.limit if isinstance(cache, VisualCache) else longest(cache)
    if limit is not None and length > limit:
        raise ValueError(
            f"this call makes the sequence {length} tokens long, but past_key_values is static and "
            f"holds {limit} of them: make it longer (max_cache_len), or pass a DynamicCache, which "
            "grows"
        )


class VisualCache(DynamicCache):
    """Cache of a pruned pass over a prompt with images.

    stores: per layer the two `HeadStore`s, of heads whose text queries see visual tokens and of
        blind heads.
    plan: that of the model which filled it.
    length: tokens seen in each row, visual ones and padding included.
    filling: a forward is under way, or did not come to its end.
    layout: of the whole sequence, (B, length).
    text_order, visual_order: (B, T) and (B, V) int64, the place of each slot in its row's sequence;
        -1 in empty slots.
    valid: (B, length) bool, False at padding.
    even: in no row of the batch a slot is empty.
    limit: how many tokens a row may have: it was a StaticCache, and its stores get room for all of
        them at once, so that no buffer grows or moves while text is decoded. None: any number.

    These tensors lie on the CPU, where masks are made of them: a decode step that needs no mask
    then costs the device nothing. Made by `adopt`, which turns the caller's own cache object into
    one, so that it is filled in place.
    """

    ready: Any = None  # the pass that is made ready for the next forward with this cache
    stores: list[tuple[HeadStore, HeadStore]]
    plan: PruningPlan
    length: int
    filling: bool
    valid: Tensor
    even: bool
    limit: int | None
    _before: tuple[type, dict[str, Any]] | None
    _layouts: list[VisualLayout]
    _orders: list[tuple[Tensor, Tensor]]

    @property
    def gapless(self) -> bool:
        """Whether no slot is empty and none holds padding, or what the last mask hid."""
        return self.even and bool(self.valid.all())

    @property
    def layout(self) -> VisualLayout:
        if len(self._layouts) > 1:
            self._layouts = [VisualLayout.joined(self._layouts)]
        return self._layouts[0]

    @property
    def grids(self) -> tuple[tuple[Grid, ...], ...]:
        return self._layouts[-1].grids

    @property
    def text_order(self) -> Tensor:
        return self._joined_orders()[0]

    @property
    def visual_order(self) -> Tensor:
        return self._joined_orders()[1]

    @property
    def visual_slots(self) -> int:
        return sum(visual.shape[1] for _, visual in self._orders)

    def _joined_orders(self) -> tuple[Tensor, Tensor]:
        if len(self._orders) > 1:
            text, visual = zip(*self._orders, strict=True)
            self._orders = [(torch.cat(text, dim=1), torch.cat(visual, dim=1))]
        return self._orders[0]

    @classmethod
    def adopt(
        cls,
        cache: Any,
        plan: PruningPlan,
        batch: int,
        valid: Tensor,
        stored: list[tuple[StoredHeads, StoredHeads]],
    ) -> VisualCache:
        """The cache for a pass: `cache` itself, turned into a VisualCache, or a new one in place of
        None or a tuple.

        What stock code cached there (text alone) is kept: `stored` tells for each layer what the
        two stores hold, `valid` (B, past) bool its padding.

        Raises ValueError for any other kind of cache object.
        """
        if isinstance(cache, VisualCache):
            return cache
        refuse_foreign(cache)
        past, limit = read_stock_cache(cache), longest(cache)
        if cache is None or isinstance(cache, tuple | list):
            cache = DynamicCache()
        cache._before, cache.limit = emptied(cache), limit
        clear_stock_cache(cache)
        # In place, since the caller goes on with this very object; the classes differ in Python
        # attributes only.
        cache.__class__ = cls
        cache.plan = plan
        cache.stores = empty_stores(stored)
        cache.length = past[0][0].shape[2] if past else 0
        cache.filling = False
        cache.valid, cache.even = valid, bool(valid.all())
        places = torch.arange(cache.length, device="cpu").expand(batch, -1)
        cache._layouts = [VisualLayout.empty(batch, cache.length)]
        cache._orders = [(places.masked_fill(~valid, -1), places[:, :0])]
        for layer, stores, hold in zip(past, cache.stores, stored, strict=False):
            both = torch.stack(layer)  # (2, B, K, past, D)
            for store, of_store in zip(stores, hold, strict=True):
                if len(of_store.heads):
                    store.append(both.index_select(2, of_store.heads.to(both.device)))
        return cache

    def check(self, plan: PruningPlan, batch: int) -> None:
        """Raises ValueError unless a model with `plan` can go on from here with `batch` rows."""
        if self.plan is not plan and self.plan != plan:
            raise ValueError(
                "past_key_values was filled under another plan than the model's, and holds other "
                "heads: start again with past_key_values=None"
            )
        if self.filling:
            raise ValueError(
                "past_key_values was left half filled by a forward that was interrupted (out of "
                "memory, perhaps): start again with past_key_values=None"
            )
        if self.valid.shape[0] != batch:
            raise ValueError(
                f"past_key_values holds {self.valid.shape[0]} rows, this call has {batch}: use "
                "batch_select_indices or batch_repeat_interleave, or start again with None"
            )

    def extend(self, layout: VisualLayout, valid: Tensor, text: Packing, visual: Packing) -> None:
        """Notes the tokens of a forward: `layout` and `valid` (B, length + n), and the packings of
        both kinds."""
        self.filling = True
        # Put together once somebody asks: while plain text is decoded nobody does.
        self._layouts.append(layout)
        self._orders.append((text.order, visual.order))
        self.even = self.even and text.gather is None and visual.gather is None
        self.valid = valid
        self.length = valid.shape[1]
        if self.limit is not None and (len(visual) or self.stores[0][0].reserve is None):
            for store in (store for pair in self.stores for store in pair):
                store.reserve = self.limit - self.length

    def drop_slots(self, count: int) -> None:
        """Forgets the last `count` text slots, in which no row has a token."""
        text, visual = self._orders.pop()
        self._orders.append((text[:, : text.shape[1] - count], visual))

    def nbytes(self, visual_only: bool = False) -> int:
        """Bytes of all filled slots, or of the visual ones alone."""
        return sum(store.nbytes(visual_only) for pair in self.stores for store in pair)

    # What generate() asks of a cache, over all supported versions.

    def get_seq_length(self, layer_idx: int | None = 0, cache_position: Any = None) -> int:
        return self.length

    @property
    def seen_tokens(self) -> int:
        return self.length

    @seen_tokens.setter
    def seen_tokens(self, value: int) -> None:
        raise AttributeError("seen_tokens of a VisualCache follows from the tokens it holds")

    def get_usable_length(self, new_seq_length: int, layer_idx: int | None = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> Any:
        return no_maximum() if self.limit is None else self.limit

    get_max_cache_shape = get_max_length

    @property
    def max_cache_len(self) -> Any:
        return self.get_max_length()

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        width = query_length if isinstance(query_length, int) else len(query_length)
        return self.length + width, 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    # Of a cache without layer objects transformers would find that *all* of them are linear or
    # dummies (all([]) is True), and then hand over the whole prompt again.
    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.stores)

    is_linear = is_dummy = is_sliding

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def batch_size(self) -> int:
        return self.valid.shape[0]

    max_batch_size = batch_size

    def __len__(self) -> int:
        return len(self.stores)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the batch rows `beam_idx`, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for pair in self.stores:
            for store in pair:
                store.select(indices)
        indices = indices.cpu()
        self._layouts = [self.layout.rows(indices)]
        self.valid = self.valid.index_select(0, indices)
        text, visual = self._joined_orders()
        self._orders = [(text.index_select(0, indices), visual.index_select(0, indices))]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.valid.shape[0]).repeat_interleave(repeats))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "this cache was filled by a pruned pass over an image and holds different heads in "
            "each layer; unpruned layers cannot go on from it. Keep the plan applied, or start "
            "again with past_key_values=None"
        )

    def reset(self) -> None:
        """Empties it: it is of the class again that it was before."""
        if self._before is None:
            raise ValueError(
                "a cache filled by a pruned pass cannot be reset in this version of transformers: "
                "take a new one"
            )
        before, blank = self._before
        vars(self).clear()
        vars(self).update(blank)
        self.__class__ = before

    def crop(self, max_length: int) -> None:
        """Forgets the last -max_length tokens of each row, or all but the first `max_length`
        (assisted generation, prompt lookup, going on from one prompt several times). 0: as
        transformers takes it, none of them, or up to 4.57 all.

        Raises ValueError where that would cut an image: its tokens saw each other.
        """
        if max_length == 0 and crop_counts_removed():
            return
        length = max_length if max_length >= 0 else max(0, self.length + max_length)
        if length >= self.length:
            return
        left = self.layout.first(length)
        if left.cuts_an_image(self.layout):
            raise ValueError(
                f"crop({max_length}) would cut an image in the cache of {self.length} tokens, "
                "whose tokens saw each other: crop before or after it, or start again with None"
            )
        text, visual = (order.masked_fill(order >= length, -1) for order in self._joined_orders())
        text_slots, visual_slots = _used(text), _used(visual)
        for store in (store for pair in self.stores for store in pair):
            store.keep(visual_slots, text_slots)
        self._orders = [(text[:, :text_slots], visual[:, :visual_slots])]
        self._layouts, self.valid, self.length = [left], self.valid[:, :length], length
        orders = torch.cat(self._orders[0], dim=1)
        self.even = bool((orders >= 0).all())

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        raise TypeError(
            "a cache filled by a pruned pass has no single (key, value) pair per layer, see "
            "VisualCache.stores: generate without what takes it apart (contrastive search: leave "
            "out penalty_alpha), or take the plan off (yopo.remove)"
        )

    def __iter__(self) -> Any:
        return self[0]

    # generate() of 4.42 to 4.47 asks for this before it converts to tuples, which cannot hold
    # uneven layers.
    to_legacy_cache = None


def _used(order: Tensor) -> int:
    """How many slots (B, S) there are up to the last that a row has a token in."""
    used = (order >= 0).any(0).nonzero()
    return int(used.max()) + 1 if len(used) else 0
