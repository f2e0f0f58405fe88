"""What of a model a pruned pass does not call although somebody may expect it: attention functions
and forwards that are not transformers' own. Their numbers are right (probe.py compares them), but
what else they do does not happen for rows of an image; so that is said, once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from yopo.models.exchange import Exchanged
from yopo.models.layers import layer_in, stock_forward

# Packages whose attention and forwards do nothing but compute.
_PLAIN = {"transformers", "liger_kernel", "torch", "accelerate", "kernels", "yopo"}


def warn_of_uncalled(decoder: Any) -> None:
    """Says which functions of this decoder a pruned pass does not call, if that was not said of the
    same ones yet."""
    found = tuple(_uncalled(decoder))
    if found and found != decoder._yopo_uncalled:
        warnings.warn(
            f"a pruned pass over an image computes attention and FFN by itself and does not call "
            f"{', '.join(found)}: what these do beside is not done there",
            stacklevel=2,
        )
    decoder._yopo_uncalled = found


def _uncalled(decoder: Any) -> Iterator[str]:
    layer = layer_in(decoder.layers[0])
    for part in (layer, layer.self_attn, layer.mlp):
        forward = stock_forward(part)
        # What is not of our classes (peft's wrapper of a module to be saved) is called itself.
        if isinstance(part, Exchanged) and not _is_plain(forward):
            yield _named(forward)
    attention = _attention_function(decoder.config, layer.self_attn)
    if attention is not None and not _is_plain(attention):
        yield f"the attention function {_named(attention)}"


def _attention_function(config: Any, attn: Any) -> Callable[..., Any] | None:
    """What an unpruned layer would call for attention; None before 4.48, where each kind was a
    class of its own."""
    home = sys.modules.get("transformers.modeling_utils")
    registry = getattr(home, "ALL_ATTENTION_FUNCTIONS", None)
    if registry is None:
        return None
    chosen = getattr(config, "_attn_implementation", None)
    if chosen in registry:
        return registry[chosen]
    home = sys.modules.get(stock_forward(attn).__module__)
    return getattr(home, "eager_attention_forward", None)


def _is_plain(function: Callable[..., Any]) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] in _PLAIN


def _named(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', None)}.{name}"
