"""Whether the engine computes what a decoder's layers compute: found out, not guessed from names.

A small twin of the decoder, of the same classes and settings, runs by its own forward and by the
pruned pass (twin.py); the live layers are compared with the twin's (live_layers.py). What differs
is refused by name. Outcomes are kept, under the functions that the layers go by (functions.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from yopo.models.exchange import original_of
from yopo.models.functions import Functions
from yopo.models.layers import PrunedLayer, layer_in
from yopo.models.live_layers import Built, classes_of, compare_layers, not_computed
from yopo.models.twin import TOLERANCE, TOLERANCE_OF_HALF, build_twin, run_twin, undisturbed
from yopo.models.uncalled import warn_of_uncalled
from yopo.plan.pruning_plan import RELEASED_FIELDS
from yopo.versions import newer_than_tested


@dataclass(frozen=True)
class _Verdict:
    """What came of a twin.

    difference: in words; None: none. failed: why it could not be run; None: it could.
    returns_tuple: whether its layers do. built: its layers. functions: kept alive, as verdicts are
    found by their ids.
    """

    difference: str | None
    failed: str | None
    returns_tuple: bool
    built: Built | None
    functions: Functions


_VERDICTS: dict[Any, _Verdict] = {}


def probe(decoder: Any, mixin: type) -> None:
    """Marks the decoder, a stock class with `mixin`, as probed; says what a pass will not call.

    Raises TypeError, naming its class, where the pruned pass does not compute what its layers do,
    or that cannot be found out."""
    stock = original_of(type(decoder))
    functions = Functions(decoder)
    layers = list(map(layer_in, decoder.layers))
    kinds = frozenset(map(classes_of, layers))
    key = (stock, _settings(decoder.config), kinds, tuple(map(id, functions.found)))
    if key not in _VERDICTS:
        _VERDICTS[key] = _verdict(decoder, mixin, functions)
    verdict = _VERDICTS[key]
    if verdict.difference is not None:
        raise not_computed(decoder, verdict.difference)
    compare_layers(decoder, functions, verdict.built, verdict.failed or "")
    for layer in layers:
        type(layer).yopo_returns_tuple = verdict.returns_tuple
    if (version := newer_than_tested()) is not None:
        warnings.warn(
            f"transformers {version} is newer than any that yopo was tested with; the layers of "
            f"this {stock.__name__} were probed and compute what yopo computes: going on",
            stacklevel=2,
        )
    warn_of_uncalled(decoder)
    functions.settle()  # trying a module may set something on it
    decoder._yopo_known = functions


def _settings(config: Any) -> str:
    values = config.to_dict()
    for name in ("yopo", *RELEASED_FIELDS):
        values.pop(name, None)
    implementation = getattr(config, "_attn_implementation", None)
    return f"{values} {implementation}"


def _verdict(decoder: Any, mixin: type, functions: Functions) -> _Verdict:
    """Of a twin on the CPU; where it cannot run there (kernels of a device), on the decoder's, and
    there as precise as the decoder."""
    failed = ""
    for device, dtype in _tries(decoder):
        try:
            with undisturbed():
                twin = build_twin(decoder, device, dtype)
                built = Built.of(twin)
                ran = run_twin(twin, decoder, mixin)
        except Exception as error:  # whatever modules raise: then the live ones are asked
            failed = failed or f"{type(error).__name__}: {error}"
            continue
        words = ran.difference
        if isinstance(words, float):
            near = words <= (TOLERANCE if dtype == torch.float32 else TOLERANCE_OF_HALF)
            words = f"on random rows the outputs differ by {words:.2g} of the largest value"
            if near:
                return _Verdict(None, None, ran.returns_tuple, built, functions)
        return _Verdict(words, None, ran.returns_tuple, built, functions)
    return _Verdict(None, failed, PrunedLayer.yopo_returns_tuple, None, functions)


def _tries(decoder: Any) -> list[tuple[torch.device, torch.dtype]]:
    tries = [(torch.device("cpu"), torch.float32)]
    weight = next((p for p in decoder.parameters() if p.device.type not in ("cpu", "meta")), None)
    if weight is not None:
        tries.append((weight.device, torch.float32))
        if weight.dtype in (torch.float16, torch.bfloat16):
            tries.append((weight.device, weight.dtype))
    return tries
