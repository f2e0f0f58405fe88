"""The `yopo` block: a plan as JSON, the way config.json and plan files hold it. Turns the values of
PruningPlan's fields into a block and back; knows neither the class nor configs nor files.

Format 2; every key but the last must be there, no other may:
  format                 2
  layers, heads          shape of the masks
  head_keep              one hex string per layer, 2 * ceil(heads / 8) digits: head 0 is the most
                         significant bit of the first byte; the surplus bits of the last byte are 0
  window                 int or null, or a list of these, one for each layer
  layer_cut, ffn_ratio   numbers
  ffn                    null or int, or a list of these
  visual_attention       true or false, or a list of these
  head_mass, cut_mass    "exact", "drop" or "sink"
  window_causal, prune_visual_queries   true or false
  sinks                  null, or an object: see sinks.py
  ffn_order              only where FFN neurons were put in another order: "sha256:" and 64 digits

Format 1 is read too: it has no ffn, visual_attention and sinks, and may have the mass "calibrated"
with text_mass, one list of numbers per layer: the share m of a blind head that stays on text.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np

from yopo.plan import sinks
from yopo.plan.value_checks import as_numbers, integer, listed

FORMAT = 2
_OPTIONAL = frozenset({"ffn_order"})
_SHAPE = frozenset({"format", "layers", "heads"})
_FIRST = frozenset(
    {"head_keep", "window", "layer_cut", "ffn_ratio", "head_mass", "cut_mass", "window_causal"}
    | {"prune_visual_queries"}
    | _OPTIONAL
)
_FIELDS = {1: _FIRST | {"text_mass"}, 2: _FIRST | {"ffn", "visual_attention", "sinks"}}
# Format 1 does not say what the text's part of the softmax was when its constants were fitted: that
# of so many keys with the logit 0 is taken for it.
_TEXT_KEYS = 60


def pack(values: dict[str, Any]) -> dict[str, Any]:
    """The block of a plan with these `values`, tensors among them."""
    layers, heads = values["head_keep"].shape
    block = {"format": FORMAT, "layers": layers, "heads": heads} | values
    rows = np.packbits(values["head_keep"].numpy(), axis=1)
    block["head_keep"] = [row.tobytes().hex() for row in rows]
    for key in ("window", "ffn", "visual_attention"):
        block[key] = list(values[key]) if isinstance(values[key], tuple) else values[key]
    return {key: value for key, value in block.items() if key not in _OPTIONAL or value is not None}


def unpack(
    block: object, checkpoint: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """The values of the fields in `block`, as the plan's constructor takes and checks them.
    checkpoint, revision: the folder or Hub repository that has its sinks.

    Raises ValueError for what is no block of a format that this yopo reads.
    """
    if not isinstance(block, dict):
        raise ValueError(f"it must be a JSON object, got {type(block).__name__}")
    version = block.get("format")
    if type(version) is not int or version not in _FIELDS:
        raise ValueError(
            f"format is {version!r}; this yopo reads {listed(map(str, _FIELDS))}: make the plan "
            "again, or use the yopo that wrote it"
        )
    known = _FIELDS[version]
    missing = sorted((known | _SHAPE) - block.keys() - _OPTIONAL)
    unknown = sorted(map(str, block.keys() - known - _SHAPE))
    if missing or unknown:
        raise ValueError(f"missing keys: {listed(missing)}; unknown keys: {listed(unknown)}")
    layers = integer("layers", block["layers"], 1, None)
    heads = integer("heads", block["heads"], 1, None)
    values = {field: block.get(field) for field in known}
    values["head_keep"] = _mask(block["head_keep"], layers, heads)
    # The constructor reads None as "find it"; in a block that is a value lost.
    values["layer_cut"] = integer("layer_cut", block["layer_cut"], 0, layers)
    if version == 1:
        _constants_to_sinks(values, layers, heads)
    else:
        values["sinks"] = sinks.from_block(block, (layers, heads), checkpoint, revision)
    return values


def _constants_to_sinks(values: dict[str, Any], layers: int, heads: int) -> None:
    """Puts sinks in place of the constants m of calibrated mass, by m = sigmoid(text's lse - a)."""
    masses = [values["head_mass"], values["cut_mass"]]
    constants = values.pop("text_mass")
    if ("calibrated" in masses) != (constants is not None):
        raise ValueError(
            f"head_mass {masses[0]!r}, cut_mass {masses[1]!r} and text_mass do not fit: text_mass "
            "is given exactly when a mass is 'calibrated'"
        )
    if constants is None:
        return
    m = as_numbers("text_mass", constants, 2)
    if tuple(m.shape) != (layers, heads) or bool(((m < 0) | (m > 1)).any()):
        raise ValueError(f"text_mass must be {layers} rows of {heads} numbers from 0 to 1")
    # A constant was the same for any image: tokens=None.
    values["sinks"] = sinks.Sinks(math.log(_TEXT_KEYS) - m.logit(eps=1e-6), tokens=None)
    for name in ("head_mass", "cut_mass"):
        values[name] = "sink" if values[name] == "calibrated" else values[name]
    warnings.warn(
        "a plan has mass 'calibrated', which is no more: each constant is read as the sink that "
        f"gives it behind {_TEXT_KEYS} text tokens. For the numerics of exact mass, {sinks.REMEDY}",
        stacklevel=2,
    )


def is_block(content: dict[str, Any]) -> bool:
    """Whether a JSON object is a block itself, and no config that has one in it."""
    return not content.keys().isdisjoint({"format", "head_keep"}) and "yopo" not in content


def _mask(rows: object, layers: int, heads: int) -> np.ndarray:
    """The (layers, heads) mask of the hex `rows`."""
    if not isinstance(rows, list) or len(rows) != layers:
        got = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise ValueError(f"head_keep must be a list of {layers} rows (layers), got {got}")
    digits = 2 * ((heads + 7) // 8)
    mask = []
    for index, row in enumerate(rows):
        # ASCII digits only, and no blanks: bytes.fromhex alone would pass over those.
        is_hex = isinstance(row, str) and re.fullmatch("[0-9a-fA-F]*", row)
        if not is_hex or len(row) != digits:
            raise ValueError(
                f"head_keep[{index}] is {row!r}; allowed: {digits} hex digits for {heads} heads"
            )
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(row), dtype=np.uint8))
        if bits[heads:].any():
            raise ValueError(f"head_keep[{index}] is {row!r}: it has bits beyond head {heads - 1}")
        mask.append(bits[:heads])
    return np.stack(mask)
