"""What a decoder's forward was called with, resolved: padding, positions, the cache, and which of
this call's columns are visual tokens. Checks arguments and refuses what cannot be right; computes
nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from yopo.engine.layout import Grid, VisualLayout
from yopo.engine.visual_cache import VisualCache, refuse_foreign, refuse_longer
from yopo.models.exchange import stock_parameters
from yopo.models.host_copies import on_cpu
from yopo.models.layers import layer_in, parts_in
from yopo.models.shown import known_of, layout_of
from yopo.models.unpruned import UNPRUNED
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import CACHE_NAMES, sliding_window

# The name of an argument by which a wrapper around the model treats rows of the batch apart in this
# call (peft_adapters.py): packed rows have no rows of the batch. None: there is none.
BY_ROW: ContextVar[str | None] = ContextVar("yopo_by_row", default=None)

# Arguments of a decoder that a pass knows, and those that say nothing to a decoder.
_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
    *CACHE_NAMES,
}
# What transformers' attention functions take beside; a pass computes attention by itself.
_OF_ATTENTION = {"is_causal", "softcap", "sliding_window", "s_aux", "position_bias", "head_mask"}


@dataclass(frozen=True)
class Resolved:
    """A call with an image in it, or in its cache.

    layout: of this call's n columns. valid: (B, past + n) bool on the CPU, False at padding.
    inputs_embeds: (B, n, d). position_ids: (B, n), or (3, B, n) of M-RoPE; both None where this is
    found out ahead of the decoder's own call. past: how many tokens are cached. cache: to be
    filled; keep_cache: and to be returned. checkpointing: activations are computed again in
    backward.
    """

    layout: VisualLayout
    valid: Tensor
    inputs_embeds: Any
    position_ids: Any
    past: int
    cache: VisualCache
    keep_cache: bool
    checkpointing: bool
    output_hidden_states: bool
    return_dict: bool


def resolve(
    decoder: Any,
    given: Mapping[str, Any],
    visual_mask: Tensor | None,
    visual_grids: Sequence[Sequence[Grid]] | None,
    ahead: bool = False,
) -> Resolved | None:
    """What `decoder`, which has a plan, was (or, ahead, will be) called with, by name; None where
    stock's own forward is to run: no visual token is among its columns or in the cache.

    Raises ValueError where a pruned pass cannot be right.
    """
    ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), cache_of(given)
    if UNPRUNED.get() or (ids is None) == (embeds is None):
        return None  # of the latter stock knows what to say
    batch, n = (ids if embeds is None else embeds).shape[:2]
    asked = partial(past_length, cache)
    layout = known_of(decoder, visual_mask, visual_grids, embeds, cache, asked, (batch, n))
    if layout is None and not isinstance(cache, VisualCache):
        return None
    refuse_foreign(cache)
    past = past_length(cache)
    if isinstance(cache, VisualCache):
        cache.check(decoder.yopo_plan, batch)
    refuse_longer(cache, past + n)
    mask = given.get("attention_mask")
    valid = valid_tokens(mask, cache, batch, past, n)
    layout = layout_of(layout, cache, past, valid[:, past:])
    if not layout.visual.any() and not isinstance(cache, VisualCache):
        return None
    _refuse(decoder, given, layout, cache, past + n)
    checkpointing = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
    if checkpointing and cache is not None:
        raise ValueError(
            "past_key_values is given, but with gradient checkpointing layers run twice and "
            "nothing can be cached: pass past_key_values=None"
        )
    device, places = (ids if embeds is None else embeds).device, given.get("position_ids")
    places = positions(places, batch, past, n, device, mask is not None)
    if embeds is None and not ahead:
        embeds = decoder.embed_tokens(ids)
        places = places.to(embeds.device)
    use_cache = _flag(given, "use_cache", decoder.config)
    stored = decoder._yopo_layer_plans.stored
    adopted = VisualCache.adopt(cache, decoder.yopo_plan, batch, valid[:, :past], stored)
    return Resolved(
        layout=layout,
        valid=valid,
        inputs_embeds=None if ahead else embeds,
        position_ids=None if ahead else places,
        past=past,
        cache=adopted,
        keep_cache=(use_cache and not checkpointing) or cache is not None,
        checkpointing=checkpointing,
        output_hidden_states=_flag(given, "output_hidden_states", decoder.config),
        return_dict=given.get("return_dict") is not False,
    )


def inputs_of(decoder: Any, given: Mapping[str, Any], past: int) -> tuple[Tensor, Tensor]:
    """inputs_embeds and position_ids of a call that was resolved ahead."""
    embeds = given.get("inputs_embeds")
    if embeds is None:
        embeds = decoder.embed_tokens(given["input_ids"])
    batch, n = embeds.shape[:2]
    return embeds, positions(given.get("position_ids"), batch, past, n, embeds.device, True)


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among arguments by name, whatever this transformers calls it."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def _flag(given: Mapping[str, Any], name: str, config: Any) -> Any:
    return getattr(config, name, False) if given.get(name) is None else given[name]


def _refuse(
    decoder: Any, given: Mapping[str, Any], layout: VisualLayout, cache: Any, length: int
) -> None:
    """Raises ValueError for what a pruned pass cannot give, or would silently get wrong."""
    plan, config = decoder.yopo_plan, decoder.config
    if len(decoder.layers) != plan.num_layers:
        raise ValueError(
            f"the plan is for {plan.num_layers} layers, but the model has {len(decoder.layers)} "
            f"(its config says {config.num_hidden_layers}): layers were taken out or added after "
            "the plan was put on. Apply a plan for as many"
        )
    if (by_row := BY_ROW.get()) is not None:
        raise ValueError(
            f"{by_row} treats each row of the batch in its own way, which a pruned pass over "
            "packed rows cannot follow: call the model once for each adapter (model.set_adapter), "
            "or without the plan (yopo.remove)"
        )
    attentions, states = (
        _flag(given, name, config) for name in ("output_attentions", "output_hidden_states")
    )
    refuse_outputs_and_packing(attentions, states, given)
    _refuse_unknown(decoder, given)
    refuse_split_image(plan, layout, cache)
    refuse_long_for_window(config, length)
    dropout = _dropout_in(layer_in(decoder.layers[0])) if decoder.training else None
    if dropout is not None:
        raise ValueError(
            f"{dropout} drops values (resid_pdrop or hidden_dropout in the config): a pruned pass "
            "has no dropout but attention's. Train with 0, or without the plan"
        )


def _dropout_in(layer: nn.Module) -> str | None:
    """The name of a dropout of a layer that a pruned pass leaves out; those of attention, and of
    adapters inside projections, it does not."""
    for name, module in layer.named_modules():
        known = ("attention_dropout" in name) or any(p.endswith("_proj") for p in name.split("."))
        if isinstance(module, nn.Dropout) and module.p > 0 and not known:
            return name
    return None


def _refuse_unknown(decoder: Any, given: Mapping[str, Any]) -> None:
    unknown = [name for name in given if name not in _KNOWN and given[name] is not None]
    if not unknown:
        return
    meant = {*_OF_ATTENTION, *stock_parameters(decoder)}
    for module, _ in parts_in(decoder.layers[0]):
        meant.update(stock_parameters(module))
    refused = [name for name in unknown if name in meant and name not in ("args", "kwargs")]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: a pruned pass over an image does not know what this argument "
            f"of {type(decoder).__name__} does. Leave it out, or take the plan off (yopo.remove)"
        )


def past_length(cache: Any) -> int:
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        return cache[0][0].shape[2] if cache else 0
    return int(cache.get_seq_length())


def valid_tokens(mask: Any, cache: Any, batch: int, past: int, n: int) -> Tensor:
    """(B, past + n) bool on the CPU, False at padding, from a 2-D or a causal 4-D mask.

    For a static cache generate() makes a 4-D one, as wide as the cache is long, or a dict of one
    for each kind of layer, which differ only where a sequence is longer than a sliding window.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        seen = cache.valid if isinstance(cache, VisualCache) else None
        if seen is None:
            seen = torch.ones(batch, past, dtype=torch.bool, device="cpu")
        new = torch.ones(batch, n, dtype=torch.bool, device="cpu")
        return torch.cat([seen, new], dim=1)
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}; a pruned pass takes the 2-D mask (batch, "
            "tokens) of the padding. Load the model with attn_implementation='sdpa'"
        )
    shape = tuple(mask.shape)
    if mask.dim() == 4:
        mask = _columns_seen(mask, past, n).expand(batch, -1)
    if mask.dim() != 2 or mask.shape != (batch, past + n):
        raise ValueError(
            f"attention_mask has shape {shape}; a pruned pass over {n} tokens after {past} cached "
            f"ones takes {(batch, past + n)}"
        )
    return on_cpu(mask) != 0


def _columns_seen(mask: Tensor, past: int, n: int) -> Tensor:
    """(B, past + n) bool, the columns that a causal mask (B, 1, n, past + n or more) lets see.

    Compared where it lies: it may be large."""
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    columns = sees[:, -1, : past + n]
    rows = torch.arange(past, past + n, device=mask.device)[:, None]
    causal = torch.arange(sees.shape[2], device=mask.device) <= rows
    if sees.shape[1] == n and sees.shape[2] >= past + n:
        alive = columns[:, past:, None]  # a padded query may see anything
        shown = torch.nn.functional.pad(columns, (0, sees.shape[2] - past - n))[:, None]
        if torch.equal(sees & alive, causal & shown & alive):
            return columns
    raise ValueError(
        f"attention_mask of shape {tuple(mask.shape)} is not the causal mask of a padded batch; a "
        "pruned pass takes the 2-D mask (batch, tokens) of the padding"
    )


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


def refuse_split_image(plan: PruningPlan, layout: VisualLayout, cache: Any) -> None:
    if (
        plan.windows == (None,) * plan.num_layers
        or plan.window_causal
        or not isinstance(cache, VisualCache)
        or not layout.visual.any()
    ):
        return
    for b, grids in enumerate(cache.grids):
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
