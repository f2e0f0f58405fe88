"""The KV cache of a pruned pass: text keys and values of every head, visual ones only where the
plan reads them.

`HeadStore` holds one layer's keys and values of one group of heads, `VisualCache` all layers and
what the slots stand for. A real transformers Cache, so that generate() carries it about. No
attention and no weights here.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from yopo.engine.layout import VisualLayout
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import DynamicCache, clear_dynamic_cache, no_maximum, read_stock_cache

GROWTH = (
    1.5  # a full buffer is copied into one this much longer, so that a decode step copies no prefix
)
SPARE = 64


class HeadStore:
    """Keys and values of some heads: a visual region in front, then text slots in order of arrival.

    `keys` (B, H, Vk + T, D), `values` (B, H, Vv + T, D), where Vk and Vv are the visual slots
    stored of each: all, or 0 where the plan never reads them.
    """

    def __init__(self) -> None:
        # None until the first append. `| Any` and not `| None`: who reads a store has filled it,
        # and every layer reads, so there is no check.
        self._keys: Tensor | Any = None
        self._values: Tensor | Any = None
        self.visual_keys = 0
        self.visual_values = 0
        self.text = 0

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self.visual_keys + self.text]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self.visual_values + self.text]

    @property
    def text_keys(self) -> Tensor:
        return self._keys[:, :, self.visual_keys : self.visual_keys + self.text]

    @property
    def text_values(self) -> Tensor:
        return self._values[:, :, self.visual_values : self.visual_values + self.text]

    def append(
        self,
        text_keys: Tensor,
        text_values: Tensor,
        visual_keys: Tensor | None = None,
        visual_values: Tensor | None = None,
        spare: bool = True,
    ) -> None:
        """Adds (B, H, slots, D) text keys and values, and visual ones if given.

        `spare=False` keeps no room for later tokens and writes nothing in place: the pass ends
        here, or has gradients.
        """
        new_keys = visual_keys.shape[2] if visual_keys is not None else 0
        new_values = visual_values.shape[2] if visual_values is not None else 0
        self._keys = _grown(self._keys, self.visual_keys, self.text, visual_keys, text_keys, spare)
        self._values = _grown(
            self._values, self.visual_values, self.text, visual_values, text_values, spare
        )
        self.visual_keys += new_keys
        self.visual_values += new_values
        self.text += text_keys.shape[2]

    def fork(self) -> HeadStore:
        """A store with the same content, whose `append(spare=False)` leaves this one as it is."""
        return copy(self)

    def take(self, other: HeadStore) -> None:
        """Holds what `other` holds."""
        vars(self).update(vars(other))

    def select(self, index: Tensor) -> None:
        """Keeps the batch rows `index`, in that order (beams)."""
        if self._keys is not None:
            self._keys = self._keys.index_select(0, index.to(self._keys.device))
            self._values = self._values.index_select(0, index.to(self._values.device))

    def nbytes(self, visual_only: bool = False) -> int:
        """Bytes of the filled slots."""
        if self._keys is None:
            return 0
        slots = self.visual_keys + self.visual_values + (0 if visual_only else 2 * self.text)
        return slots * self._keys[:, :, :1].numel() * self._keys.element_size()


def _grown(
    old: Tensor | None,
    visual: int,
    text: int,
    new_visual: Tensor | None,
    new_text: Tensor,
    spare: bool,
) -> Tensor:
    """The buffer with room for, and filled with, the new visual and text slots."""
    used = visual + text
    if not spare:
        parts = [] if old is None else [old[:, :, :visual]]
        parts += [] if new_visual is None else [new_visual]
        parts += [] if old is None else [old[:, :, visual:used]]
        return torch.cat([*parts, new_text], dim=2)
    extra = 0 if new_visual is None else new_visual.shape[2]
    needed = used + extra + new_text.shape[2]
    frozen = old is not None and old.is_inference() and not torch.is_inference_mode_enabled()
    if old is None or extra or needed > old.shape[2] or frozen:
        batch, heads, width, dim = new_text.shape
        # The visual region stays in front: it never grows while decoding, the text behind it does.
        room = visual + extra + int(GROWTH * (text + width)) + SPARE
        buffer = new_text.new_empty(batch, heads, room, dim)
        if old is not None:
            buffer[:, :, :visual] = old[:, :, :visual]
            buffer[:, :, visual + extra : used + extra] = old[:, :, visual:used]
        if new_visual is not None:
            buffer[:, :, visual : visual + extra] = new_visual
        old = buffer
    old[:, :, used + extra : needed] = new_text
    return old


def refuse_foreign(cache: Any) -> None:
    """Raises ValueError for a cache object that a pruned pass over an image cannot fill."""
    if cache is None or isinstance(cache, tuple | list | VisualCache):
        return
    offloads = getattr(cache, "offloading", False)
    if type(cache) is not DynamicCache or offloads:
        raise ValueError(
            f"past_key_values is {'an offloading' if offloads else 'a'} {type(cache).__name__}, "
            "which a pruned pass over an image cannot fill: its layers store different heads. Pass "
            "a transformers DynamicCache, or None (generate: leave out cache_implementation)"
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

    These tensors lie on the CPU, where masks are made of them: a decode step that needs no mask
    then costs the device nothing. Made by `adopt`, which turns the caller's own cache object into
    one, so that it is filled in place.
    """

    stores: list[tuple[HeadStore, HeadStore]]
    plan: PruningPlan
    length: int
    filling: bool
    layout: VisualLayout
    text_order: Tensor
    visual_order: Tensor
    valid: Tensor

    @classmethod
    def adopt(
        cls,
        cache: Any,
        plan: PruningPlan,
        batch: int,
        valid: Tensor,
        kv_heads: list[tuple[Tensor, Tensor]],
    ) -> VisualCache:
        """The cache for a pass: `cache` itself, turned into a VisualCache, or a new one in place of
        None or a tuple.

        What stock code cached there (text alone) is kept: `kv_heads` names for each layer the
        key/value heads that the two stores hold, `valid` (B, past) bool tells its padding.

        Raises ValueError for any other kind of cache object.
        """
        if isinstance(cache, VisualCache):
            return cache
        refuse_foreign(cache)
        past = read_stock_cache(cache)
        if cache is None or isinstance(cache, tuple | list):
            cache = DynamicCache()
        clear_dynamic_cache(cache)
        # In place, since the caller goes on with this very object; the two classes differ in
        # Python attributes only.
        cache.__class__ = cls
        cache.plan = plan
        cache.stores = [(HeadStore(), HeadStore()) for _ in kv_heads]
        cache.length = past[0][0].shape[2] if past else 0
        cache.filling = False
        cache.layout = VisualLayout.empty(batch, cache.length)
        cache.valid = valid
        places = torch.arange(cache.length, device="cpu").expand(batch, -1)
        cache.text_order = places.masked_fill(~valid, -1)
        cache.visual_order = places[:, :0]
        for (keys, values), stores, heads in zip(past, cache.stores, kv_heads, strict=False):
            for store, head in zip(stores, heads, strict=True):
                if len(head):
                    at = head.to(keys.device)
                    store.append(keys.index_select(1, at), values.index_select(1, at))
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

    def extend(
        self, layout: VisualLayout, valid: Tensor, text_order: Tensor, visual_order: Tensor
    ) -> None:
        """Notes the tokens of a forward: `layout` and `valid` (B, length + n), orders (B, new
        slots) of each kind.
        """
        self.filling = True
        self.layout = self.layout.then(layout)
        self.valid = valid
        self.text_order = torch.cat([self.text_order, text_order], dim=1)
        self.visual_order = torch.cat([self.visual_order, visual_order], dim=1)
        self.length = valid.shape[1]

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
        return no_maximum()

    def get_max_cache_shape(self, layer_idx: int | None = None) -> Any:
        return no_maximum()

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
        return False

    @property
    def batch_size(self) -> int:
        return self.valid.shape[0]

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
        self.layout = self.layout.rows(indices)
        self.valid, self.text_order, self.visual_order = (
            x.index_select(0, indices) for x in (self.valid, self.text_order, self.visual_order)
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.valid.shape[0]).repeat_interleave(repeats))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "this cache was filled by a pruned pass over an image and holds different heads in "
            "each layer; unpruned layers cannot go on from it. Keep the plan applied, or start "
            "again with past_key_values=None"
        )

    def reset(self) -> None:
        raise ValueError("a cache filled by a pruned pass cannot be reset: take a new DynamicCache")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "a cache filled by a pruned pass cannot be cropped (assisted generation and prompt "
            "lookup do that): generate without assistant_model or prompt_lookup_num_tokens"
        )

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
