"""What generate() calls of a model around a PrunedDecoder, beside its forward, and how it is saved:
a mixin before the stock class of the outermost model. Chooses no token and holds no cache."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from yopo.engine.visual_cache import VisualCache
from yopo.models.arguments import cache_of
from yopo.models.exchange import Exchanged, stock_method
from yopo.models.host_copies import is_here, note_ones_after
from yopo.models.trained_sinks import settle_sinks
from yopo.versions import newer_than_tested


class Generating(Exchanged):
    """A model that may generate from a prompt with images."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Stock's; sinks that are being trained go with it."""
        settle_sinks(self)
        return stock_method(self, Generating, "save_pretrained")(*args, **kwargs)

    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Stock's, which generate() runs steps by that go on from a static cache; those of a pruned
        pass are not compiled: how many heads and slots a layer has differs."""
        compiled = stock_method(self, Generating, "get_compiled_call")(*args, **kwargs)

        def call(*given: Any, **named: Any) -> Any:
            pruned = isinstance(cache_of(named), VisualCache)
            return (self if pruned else compiled)(*given, **named)

        return call

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Stock's, which puts ones after the mask: a step then need not ask the device for it."""
        stock = stock_method(self, Generating, "_update_model_kwargs_for_generation")
        given = args[1] if len(args) > 1 else kwargs.get("model_kwargs", {})
        before = given.get("attention_mask")
        updated = stock(*args, **kwargs)
        for name in ("attention_mask", "visual_mask"):
            mask = updated.get(name)
            if isinstance(mask, Tensor) and not is_here(mask) and mask.is_inference():
                with torch.inference_mode(False):  # else nobody could tell a change in place
                    updated[name] = mask.clone()
        after = updated.get("attention_mask")
        both = isinstance(before, Tensor) and isinstance(after, Tensor) and before is not after
        known = both and _is_transformers_own(stock) and newer_than_tested() is None
        if known and not is_here(after):
            note_ones_after(before, after)
        return updated


def _is_transformers_own(method: Any) -> bool:
    """Whether a method was written there, and nothing is put around it."""
    function = getattr(method, "__func__", None)
    return isinstance(function, FunctionType) and str(
        function.__globals__.get("__name__", "")
    ).startswith("transformers.")
