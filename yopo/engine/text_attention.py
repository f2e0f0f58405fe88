"""Softmax attention of text queries, and what both kinds of queries share: `attend` and `Sight`.

Tensors in, tensors out; masks are built once per forward, on the CPU, and shared by all layers.
Knows nothing of models, weights or a plan's head lists. Visual queries: neighbours.py. Formulas:
YOPO (arXiv 2410.06169), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from yopo.engine.packing import Packing
from yopo.engine.visual_cache import HeadStore, VisualCache


class Sight(Enum):
    """What a query gets from the visual keys that it may see.

    ALL: a share of the softmax, and their values. MASS: a share of the softmax but no value
    (`mass="exact"`: the released code zeroes probabilities after the softmax). NOTHING: they leave
    the softmax ("drop", "calibrated").
    """

    ALL = "all"
    MASS = "mass"
    NOTHING = "nothing"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Softmax attention; q (B, H, Q, D), k (B, H, S, D), v (B, H, S − V, D) → (B, H, Q, D).

    The first V keys have no value (`Sight.MASS`): they take their share of the softmax and give
    nothing. `mask` is bool, broadcast to (B, H, Q, S), True where a query sees a key. `causal`, in
    place of a mask: query i sees the keys up to i (which lets SDPA take its fastest kernels).
    """
    valueless = k.shape[2] - v.shape[2]
    if valueless and q.shape[2] == 1 and not dropout:
        scores = ((q * scale) @ k.transpose(2, 3)).float()  # scaled first: float16 overflows
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)[..., valueless:].to(v.dtype) @ v
    if valueless:
        v = F.pad(v, (0, 0, valueless, 0))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )


def heads(x: Tensor, index: Tensor | None) -> Tensor:
    """The key/value heads (B, H', S, D) that the query heads read: `index` (H,) into x's heads,
    None for all as is.
    """
    return x if index is None else x.index_select(1, index)


@dataclass(frozen=True)
class TextSight:
    """What each text query of this forward sees.

    every: (B, 1, W, V + T) bool over visual then text slots; None: everything.
    text: (B, 1, W, T) bool over the text slots; None: everything, or with `causal` those up to
        its own.
    image_before: (B, 1, W, 1) bool, True where a visual key comes before the query.
    """

    every: Tensor | None
    text: Tensor | None
    causal: bool
    image_before: Tensor

    @classmethod
    def build(cls, text: Packing, cache: VisualCache, valid: Tensor) -> TextSight:
        """`valid` (B, length) bool: which places of the whole sequence are no padding."""
        order = torch.cat([cache.visual_order, cache.text_order], dim=1)  # (B, V + T)
        n_visual = cache.visual_order.shape[1]
        alive = (order >= 0) & valid.gather(1, order.clamp(min=0))
        mine = text.order[:, :, None]
        every = alive[:, None, :] & (order[:, None, :] <= mine)  # (B, W, V + T)
        image_before = every[:, :, :n_visual].any(-1)[:, None, :, None]
        # Empty query slots see all: their output is dropped, but must not be NaN.
        every = (every | (mine < 0))[:, None]
        text_only = every[..., n_visual:]
        # A pad in the last column, behind nothing but an image: no text to see, and not NaN either.
        text_only = text_only | ~text_only.any(-1, keepdim=True)
        width, slots = text_only.shape[2:]
        causal = width == slots > 1 and bool((text_only == torch.ones_like(text_only).tril()).all())
        return cls(
            None if bool(every.all()) else every,
            None if causal or bool(text_only.all()) else text_only.contiguous(),
            causal,
            image_before,
        )


def text_attention(
    q: Tensor,
    store: HeadStore,
    kv_index: Tensor | None,
    sight: Sight,
    masks: TextSight,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Text queries q (B, H, W, D) over one store → (B, H, W, D)."""
    causal = False
    if sight is Sight.NOTHING:
        k, v, mask, causal = store.text_keys, store.text_values, masks.text, masks.causal
    else:
        k, mask = store.keys, masks.every
        v = store.values if sight is Sight.ALL else store.text_values
    return attend(q, heads(k, kv_index), heads(v, kv_index), mask, scale, dropout, causal)
