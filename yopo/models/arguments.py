"""What a model's forward was called with, resolved: padding, positions, and which of this call's
columns are visual tokens. Checks arguments and refuses what cannot be right; computes nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yopo.engine.layout import RELEASED_GRID, Call, VisualLayout
from yopo.engine.visual_cache import VisualCache
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import sliding_window


def past_length(cache: Any) -> int:
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        return cache[0][0].shape[2] if cache else 0
    return int(cache.get_seq_length())


def valid_tokens(
    attention_mask: Tensor | None, cache: Any, batch: int, past: int, n: int
) -> Tensor:
    """(B, past + n) bool on the CPU, False at padding, from a 2-D or a causal 4-D mask."""
    if attention_mask is None:
        seen = cache.valid if isinstance(cache, VisualCache) else None
        if seen is None:
            seen = torch.ones(batch, past, dtype=torch.bool, device="cpu")
        new = torch.ones(batch, n, dtype=torch.bool, device="cpu")
        return torch.cat([seen, new], dim=1)
    mask = attention_mask.detach().cpu()
    if mask.dim() == 4:
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0  # (B, n, past + n)
        mask = seen[:, -1].expand(batch, -1)
        rows = torch.arange(past, past + n, device="cpu")[:, None]
        causal = torch.arange(past + n, device="cpu") <= rows
        fits = seen.shape[1:] == causal.shape
        alive = mask[:, past:, None]  # a padded query may see anything
        if not fits or not torch.equal(seen & alive, causal & mask[:, None] & alive):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} is not the causal mask of "
                "a padded batch; a pruned pass takes the 2-D mask (batch, tokens) of the padding"
            )
    if mask.dim() != 2 or mask.shape != (batch, past + n):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; a pruned pass over {n} "
            f"tokens after {past} cached ones takes {(batch, past + n)}"
        )
    return mask != 0


def positions(
    position_ids: Tensor | None,
    batch: int,
    past: int,
    n: int,
    device: torch.device,
    masked: bool,
) -> Tensor:
    """(B, n) positions, or (3, B, n) of M-RoPE, where a fourth set in front (of 5.x: the places in
    the row, for masks) is left out; with `masked=False`, no attention_mask came with them."""
    if position_ids is None:
        position_ids = torch.arange(past, past + n, device=device).unsqueeze(0)
    elif not masked and n > 1 and _start_anew(position_ids):
        raise ValueError(
            "position_ids start anew within a row and there is no attention_mask: several samples "
            "packed into one row cannot be told from one prompt with images. Give each sample a "
            "row of its own and an attention_mask"
        )
    if position_ids.dim() == 3:
        return position_ids[-3:].to(device).expand(-1, batch, -1)
    return position_ids.to(device).expand(batch, -1)


def _start_anew(position_ids: Tensor) -> bool:
    # Of M-RoPE's sets the first (places, or time) never goes back within a prompt.
    order = position_ids[0] if position_ids.dim() == 3 else position_ids
    return bool((order.diff(dim=-1) < 0).any())


def refuse_long_for_window(config: Any, length: int) -> None:
    """Raises ValueError for a sequence that a sliding window would cut: up to it, it does nothing,
    beyond, a pruned pass would attend to too much."""
    window = sliding_window(config)
    if window is not None and length > window:
        raise ValueError(
            f"the sequence is {length} tokens long and the model's sliding_window {window}: a "
            "pruned pass has no sliding window. Give shorter prompts, or remove the plan"
        )


def may_show_image(
    known: Call | None, cache: Any, past: int, batch: int, n: int, embedded: bool, config: Any
) -> bool:
    """Whether visual tokens may be among these (batch, n) tokens or those cached; if not, the call
    is stock's, whatever its other arguments are. `embedded`: they came as inputs_embeds."""
    if isinstance(cache, VisualCache):
        return True
    if known is None:
        released = embedded and past == 0 and getattr(config, "sprompt_len", None) is not None
        return released and n >= config.sprompt_len + RELEASED_GRID[0] * RELEASED_GRID[1]
    if known.visual_mask is None:
        # A prompt's layout is one of embeddings: ids without a cache are another call's.
        return embedded and known.layout is not None
    if past == 0 and tuple(known.visual_mask.shape) != (batch, n):
        raise ValueError(other_shape(known.visual_mask, batch, n))
    return bool(known.visual_mask.any())


def warn_of_foreign_embeddings(n: int, config: Any) -> bool:
    """Says what inputs_embeds (B, n, d) that nobody described are taken for; whether it did."""
    sprompt_len = getattr(config, "sprompt_len", None)
    if sprompt_len is None:
        taken = "it for text"
    elif n < sprompt_len + RELEASED_GRID[0] * RELEASED_GRID[1]:
        return False
    else:
        taken = (
            f"the visual tokens to be one 24 × 24 image after sprompt_len={sprompt_len} tokens, "
            "as the released code does"
        )
    warnings.warn(
        f"inputs_embeds of {n} tokens came without visual_mask: taking {taken}. Pass visual_mask "
        "(batch, tokens) to say where the visual tokens are",
        stacklevel=3,
    )
    return True


def resolve_layout(
    known: Call | None, cache: Any, past: int, valid: Tensor, config: Any
) -> VisualLayout:
    """The layout of the columns of this forward; `valid` (B, n) bool is False at padding."""
    batch, n = valid.shape
    before = cache.layout if isinstance(cache, VisualCache) else VisualLayout.empty(batch, past)
    if known is not None and known.visual_mask is not None:
        layout = _from_user(known, before, past, n, batch)
    elif known is not None:
        layout = _from_prompt(known.layout, before, past, n, batch)
    elif past == 0:
        layout = VisualLayout.from_released(valid, config.sprompt_len)
    else:
        layout = VisualLayout.empty(batch, n)
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
    mask, grids = known.visual_mask, known.grids
    if mask.dim() != 2 or mask.shape[0] != batch:
        raise ValueError(other_shape(mask, batch, n))
    width = mask.shape[1]
    if width == n:
        return VisualLayout.from_mask(mask, grids, before)
    # generate() hands the prompt's mask over again at each step.
    seen = mask[:, :past].to("cpu", torch.bool)
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


def _from_prompt(
    layout: VisualLayout | None, before: VisualLayout, past: int, n: int, batch: int
) -> VisualLayout:
    """The columns of this forward, of the layout that LLaVA's prompt has."""
    if layout is None:
        return VisualLayout.empty(batch, n)
    rows, width = layout.shape
    if batch % rows:
        raise ValueError(
            f"the prompt's layout has {rows} rows, which the batch of {batch} is no multiple of"
        )
    layout = layout.repeat_interleave(batch // rows)
    if width == n:
        return layout.after(before) if past else layout
    if not torch.equal(layout.visual[:, :past], before.visual[:, :width]):
        raise ValueError(
            f"the cache holds {past} tokens whose visual tokens are not those of this prompt of "
            f"{width}: start again with past_key_values=None"
        )
    return layout.columns(past, past + n)


def refuse_split_image(plan: PruningPlan, layout: VisualLayout, cache: Any) -> None:
    if plan.window is None or plan.window_causal or not isinstance(cache, VisualCache):
        return
    for b, grids in enumerate(cache.layout.grids):
        last = layout.image[b, layout.visual[b]]
        if grids and bool((last == len(grids) - 1).any()):
            raise ValueError(
                f"this chunk splits image {len(grids) - 1} of row {b}: with a bidirectional window "
                "its first tokens would have to see its last. Cut the prompt before or after the "
                "image, or use a plan with window_causal=True"
            )


def refuse_outputs_and_packing(
    output_attentions: Any, output_hidden_states: Any, kwargs: Mapping[str, Any]
) -> None:
    """Raises ValueError for what a pruned pass cannot give, or would silently get wrong."""
    if output_attentions:
        raise ValueError(
            "output_attentions=True: a pruned pass never forms the attention matrix; ask for it "
            "without images, or of the model without its plan (yopo.remove)"
        )
    if not isinstance(output_hidden_states, bool):
        raise ValueError(
            f"output_hidden_states is {output_hidden_states!r}; a pruned pass takes True, for all "
            "of them, or False"
        )
    if packed := sorted(name for name in kwargs if name.startswith("cu_seq_lens")):
        raise ValueError(
            f"{', '.join(packed)}: several samples packed into one row; a pruned pass takes one "
            "sample in a row, and an attention_mask"
        )
