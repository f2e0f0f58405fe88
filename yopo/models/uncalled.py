"""What of a model a pruned pass does not call although somebody may expect it: attention functions
and forwards that are not transformers' own. They were compared with the pass on the random rows of
probe.py, which is all that is known of them; what they do beside their numbers does not happen for
rows of an image. So they are named, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from yopo.models.exchange import Exchanged
from yopo.models.functions import attention_function, is_plain
from yopo.models.layers import layer_in, stock_forward


def warn_of_uncalled(decoder: Any) -> None:
    """Says which functions of this decoder a pruned pass does not call, if that was not said of the
    same ones yet."""
    found = tuple(dict.fromkeys(_uncalled(decoder)))
    if found and found != decoder._yopo_uncalled:
        warnings.warn(
            f"a pruned pass over an image computes attention and FFN by itself and does not call "
            f"{', '.join(found)}: what these do beside is not done there",
            stacklevel=2,
        )
    decoder._yopo_uncalled = found


def _uncalled(decoder: Any) -> Iterator[str]:
    for layer in map(layer_in, decoder.layers):
        for part in (layer, layer.self_attn, layer.mlp):
            forward = stock_forward(part)
            # What is not of our classes (peft's wrapper of a module to be saved) is called itself.
            if isinstance(part, Exchanged) and not is_plain(forward):
                yield _named(forward)
    attention = attention_function(decoder)
    if attention is not None and not is_plain(attention):
        yield f"the attention function {_named(attention)}"


def _named(function: Any) -> str:
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', None)}.{name}"
