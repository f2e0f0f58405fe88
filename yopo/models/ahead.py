"""Passes made ready ahead of the decoder's own call, for models that torch.compile traces: so
nothing is left to decide where it traces, and a forward is one graph, as stock's is. The cache
carries the pass from the forward around the decoder to the decoder.

Only where that forward is transformers' own, and known to hand on what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from yopo.engine.layout import Grid
from yopo.engine.visual_cache import VisualCache
from yopo.models.arguments import cache_of, resolve
from yopo.models.fused_weights import fused_layers
from yopo.models.ready import can_be_traced, for_tracing, make_ready
from yopo.versions import CACHE_FIELD, CACHE_NAMES, uncompiled


def make_ready_ahead(
    decoder: Any,
    given: Mapping[str, Any],
    visual_mask: Tensor | None = None,
    visual_grids: Sequence[Sequence[Grid]] | None = None,
) -> dict[str, Any] | None:
    """The arguments, by name, of a forward that will call `decoder` with as many tokens: with a
    cache that carries the pass, if there is an image among them or in the cache. None: the pass
    cannot be traced.

    Raises ValueError where a pruned pass cannot be right."""
    called = resolve(decoder, given, visual_mask, visual_grids, ahead=True)
    if called is None:
        return dict(given)
    if not can_be_traced(decoder, called):
        return None
    decoder.look_again()
    like = given.get("inputs_embeds")
    if like is None or like.is_meta:
        like = decoder.get_input_embeddings().weight
    fused = fused_layers(decoder, like) if decoder.yopo_fused else None
    ready = make_ready(decoder, called, fused, like.device)
    called.cache.ready = for_tracing(decoder, ready, like.dtype)
    return with_cache(given, called.cache)


def with_cache(given: Mapping[str, Any], cache: VisualCache) -> dict[str, Any]:
    """Arguments by name with this cache in place of theirs."""
    others = {name: value for name, value in given.items() if name not in CACHE_NAMES}
    return {**others, CACHE_FIELD: cache}


@uncompiled
def forget_ready(given: Mapping[str, Any]) -> None:
    """Of a call that was made with these arguments and has ended: a pass that nobody took, because
    something failed before, is none of the next call's."""
    cache = cache_of(given)
    if getattr(cache, "ready", None) is not None:
        cache.ready = None
