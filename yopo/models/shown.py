"""Which of a call's columns are visual tokens: what the user, a composite's forward or the
embeddings themselves say of it, in that order. What nothing is known of is refused; nothing is
guessed but by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from yopo.engine.layout import Grid, VisualLayout
from yopo.engine.visual_cache import VisualCache
from yopo.models import known_layouts
from yopo.models.host_copies import on_cpu
from yopo.models.told import CALL, Call, told

RELEASED = "released"  # how the user asks for the released guess


def known_of(
    decoder: Any,
    visual_mask: Tensor | None,
    visual_grids: Sequence[Sequence[Grid]] | None,
    embeds: Tensor | None,
    cache: Any,
    past: Callable[[], int],
    shape: tuple[int, int],
) -> Call | VisualLayout | int | None:
    """What is known of the visual tokens of this call's (B, n) columns; None: there are none; a
    number: the released guess, an image after so many tokens. past: how many tokens are cached; of
    a static cache the device has to be asked, so it is not where nothing hangs on it.

    In this order: the masks given; what a composite's forward says of this very call; token ids,
    which are text; what is remembered of these embeddings, and single tokens of the model's
    vocabulary, which are text; the released guess, where the user asks for it by name (YOPO_LAYOUT,
    or apply's `layout`).

    Raises ValueError for embeddings of which nothing is known.
    """
    batch, n = shape
    known = CALL.get()
    if visual_mask is not None or visual_grids is not None:
        known = told(visual_mask, visual_grids)
    if known is not None and known.visual_mask is not None:
        if past() == 0 and tuple(known.visual_mask.shape) != shape:
            raise ValueError(other_shape(known.visual_mask, batch, n))
        return known if isinstance(cache, VisualCache) or on_cpu(known.visual_mask).any() else None
    if embeds is None or batch == 0:  # without rows there is no image
        return None
    if known is not None and known.layout is None:
        return None
    before = cache.layout if isinstance(cache, VisualCache) else VisualLayout.empty(batch, past())
    if known is not None:
        return known.layout if past() == 0 else known.layout.after(before)
    text = _text_rows(decoder, embeds, before) if n == 1 else []
    if len(text) == batch:
        return None
    layout = known_layouts.recall(embeds, before, text)
    if layout is not None:
        return layout if layout.visual.any() else None
    guess = getattr(decoder.config, "sprompt_len", None)
    if _released_is_asked_for(decoder) and guess is not None and past() == 0:
        return int(guess)
    otherwise = (
        f"; or set YOPO_LAYOUT=released, which takes one 24 × 24 image after {guess} tokens for "
        "granted, as the released code does"
    )
    raise ValueError(
        f"nothing is known of these inputs_embeds of {n} tokens: neither the model's token "
        "embeddings made them nor LLaVA's prepare method (or one put in its place since the last "
        "call: then prepare them again), or they were changed since. Pass visual_mask (batch, "
        "tokens), True at the visual tokens, all False for text alone"
        + ("" if guess is None else otherwise)
    )


def _text_rows(decoder: Any, embeds: Tensor, before: VisualLayout) -> list[int]:
    """The rows of a single column (B, 1, d) that are text: no visual token of anything remembered,
    but a token of the vocabulary, or whatever comes after a prompt with images, each whole."""
    visual = known_layouts.visual_in(embeds)
    text = {*known_layouts.tokens_in(embeds, decoder.embed_tokens)}
    if len(text) < len(embeds) == before.shape[0] and any(before.grids):
        text |= {b for b in range(len(embeds)) if before.is_whole(b)}
    return sorted(text - {*visual})


def _released_is_asked_for(decoder: Any) -> bool:
    chosen = os.environ.get("YOPO_LAYOUT") or decoder.yopo_layout
    if chosen not in (None, RELEASED):
        raise ValueError(f"YOPO_LAYOUT is {chosen!r}; allowed: {RELEASED}, or leave it unset")
    return chosen is not None


def layout_of(
    known: Call | VisualLayout | int | None, cache: Any, past: int, valid: Tensor
) -> VisualLayout:
    """The layout of the columns of this forward; `valid` (B, n) bool is False at padding."""
    batch, n = valid.shape
    if known is None:  # text alone
        text = VisualLayout.empty(batch, n)
        return replace(text, grids=cache.grids) if isinstance(cache, VisualCache) else text
    before = cache.layout if isinstance(cache, VisualCache) else VisualLayout.empty(batch, past)
    if isinstance(known, Call):
        layout = _from_user(known, before, past, n, batch)
    elif isinstance(known, int):
        layout = VisualLayout.from_released(valid, known)
    else:
        layout = known
    if bool((layout.visual & ~valid).any()):
        b, j = (layout.visual & ~valid).nonzero()[0].tolist()
        raise ValueError(
            f"visual_mask is True at row {b}, column {j}, where attention_mask says padding; "
            "padding is neither text nor visual"
        )
    return layout


def other_shape(mask: Tensor, batch: int, n: int) -> str:
    """What to say of a visual_mask that does not fit the (batch, n) tokens of its call."""
    return (
        f"visual_mask has shape {tuple(mask.shape)}; it describes the tokens of this call, which "
        f"are (batch, tokens) = {(batch, n)}"
    )


def _from_user(known: Call, before: VisualLayout, past: int, n: int, batch: int) -> VisualLayout:
    mask, grids = on_cpu(known.visual_mask), known.grids
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(other_shape(mask, batch, n))
    width = mask.shape[1]
    if width == n:
        return VisualLayout.from_mask(mask, grids, before)
    # generate() hands the prompt's mask over again at each step.
    seen = mask[:, :past].bool()
    if past == 0 or width > past + n or not torch.equal(seen, before.visual[:, :width]):
        after = f", after {past} cached tokens with other visual tokens" if past else ""
        raise ValueError(other_shape(mask, batch, n) + after)
    if width <= past:
        return VisualLayout.empty(batch, n)
    new = torch.zeros(batch, n, dtype=torch.bool, device="cpu")
    new[:, : width - past] = mask[:, past:]
    later = (
        None if grids is None else [g[len(b) :] for g, b in zip(grids, before.grids, strict=True)]
    )
    return VisualLayout.from_mask(new, later, before)
